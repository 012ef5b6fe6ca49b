"""Models as people have them: real architectures, compiled, wrapped, checkpointed."""

import copy
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports: nothing here needs a network

import pytest
import reference as ref
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import flatlora

WORDS = torch.arange(24).reshape(2, 12) % 20  # (B, T)
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 20}
ATTENTION = {"num_attention_heads": 2, "intermediate_size": 24}
CONVOLUTION = {"conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (8,), "num_feat_extract_layers": 1}
POSITIONS = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_buckets": 8}
SETTINGS = {  # of architectures that read some weight past the forward, in a way of their own
    "WavLM": {**SMALL, **ATTENTION, **CONVOLUTION, **POSITIONS},
    "Mamba": {**SMALL, "state_size": 4, "time_step_rank": 3},
    "T5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 20},
}


class LastState(nn.Module):
    """The last hidden state (B, T, C) of a small model of transformers with random weights."""

    def __init__(self, kind):
        super().__init__()
        transformers = pytest.importorskip("transformers", reason='needs pip install -e ".[interop]"')
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**SETTINGS[kind])
        self.body = getattr(transformers, f"{kind}Model")(config).double().eval()
        self.more = {"decoder_input_ids": WORDS[:, :7]} if config.is_encoder_decoder else {}
        for p in self.body.parameters():
            nn.init.normal_(p, mean=p.dim() == 1, std=0.2)  # the norms' weights are around 1

    def forward(self, x):
        return self.body(x, **self.more)[0]


@pytest.mark.parametrize("kind", ["WavLM", "Mamba", "T5"])
def test_adapters_of_real_models_compute_train_and_merge(kind):
    plain, x = LastState(kind), torch.linspace(-1, 1, 128).double().view(2, 64) if kind == "WavLM" else WORDS
    model = ref.in_training(flatlora.inject_lora(copy.deepcopy(plain), r=2))
    before, parameters = ref.frozen_bytes(model), flatlora.lora_parameters(model)
    for sigma in (0.0, 0.3):
        with flatlora.perturbed(model, sigma, seed=0):
            eps, out = ref.read_eps(model), model(x)
            grads = torch.autograd.grad(out.square().mean(), parameters)
        dense = ref.dense_call(plain, model, eps, x)
        torch.testing.assert_close(out, dense)
        torch.testing.assert_close(grads, torch.autograd.grad(dense.square().mean(), parameters))
        assert all(grad.any() for grad in grads)  # each adapter is in the computation
    optimizer, losses = torch.optim.AdamW(parameters, lr=0.01), []
    for step in range(5):
        losses.append(flatlora.flat_lora_step(model, lambda m, x: m(x).square().mean(), [x], optimizer, 0.02, step))
    assert losses[-1] < losses[0] and ref.frozen_bytes(model) == before
    expected = model(x)
    torch.testing.assert_close(flatlora.merge_lora(model)(x), expected)
    assert not ref.layers(model)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@pytest.mark.skipif(torch.__version__ < "2.5", reason="torch 2.4 does not see that a module has changed")
@pytest.mark.parametrize("shape", [(5, 12), (2, 5, 12)], ids=str)
def test_a_compiled_layer_equals_the_eager_one(shape):
    layer, x = ref.in_training(flatlora.LoRALinear(nn.Linear(12, 6), r=2, alpha=6)), torch.randn(shape)
    compiled = torch.compile(layer)
    for sigma, seed in ((0, 0), (0.3, 0), (0.3, 1)):
        results = []
        with flatlora.perturbed(layer, sigma, seed):
            for module in (layer, compiled):
                out = module(x)
                results.append([out, *torch.autograd.grad(out.square().sum(), flatlora.lora_parameters(layer))])
        torch.testing.assert_close(*results)


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled block": lambda model: nn.Sequential(torch.compile(model[0], backend="eager")),
    "DataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_does_not_show_in_the_names(wrap):
    model, other = (nn.Sequential(ref.adapted_model()) for _ in range(2))
    wrapped, state = wrap(model), flatlora.lora_state_dict(other)
    assert list(flatlora.lora_state_dict(wrapped)) == list(state)
    flatlora.load_lora_state_dict(wrapped, {name: p + 1 for name, p in state.items()})
    assert all(torch.equal(p, old + 1) for p, old in zip(ref.adapters(model), state.values()))
    assert not ref.layers(flatlora.merge_lora(wrapped))


@pytest.mark.parametrize("inside", [True, False])
def test_reentrant_checkpointing_is_right_if_the_backward_is_inside_the_perturbation(inside):
    (x, y), grads = ref.batch(), []
    for checkpointed in (False, True):
        model = ref.adapted_model()
        with flatlora.perturbed(model, 0.3, seed=0):
            hidden = checkpoint(model[:3], x.requires_grad_(), use_reentrant=True) if checkpointed else model[:3](x)
            loss = nn.functional.cross_entropy(model[3:](hidden), y)
            if inside:
                loss.backward()
        if not inside:  # the forward runs again, without the noise: a caveat that the docstring states
            loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in flatlora.lora_parameters(model)]))
    assert torch.allclose(*grads, rtol=1e-10) == inside
