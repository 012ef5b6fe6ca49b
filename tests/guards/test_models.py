"""Models as people have them: real architectures, compiled, wrapped, copied, checkpointed."""

import copy
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports: nothing here needs a network

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import flatlora
from flatlora import inject_lora, lora_parameters, perturbed

# ---- Models that read a weight past the forward ----


class FunctionalAttention(nn.Module):
    """WavLM's attention hands the weights of its projections to a function."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(16, 16)
        self.k = nn.Linear(16, 16)
        self.v = nn.Linear(16, 16)
        self.out = nn.Linear(16, 16)

    def forward(self, x):  # (B, T, C)
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        attended = F.multi_head_attention_forward(
            query=x,
            key=x,
            value=x,
            embed_dim_to_check=16,
            num_heads=2,
            in_proj_weight=None,
            in_proj_bias=bias,
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.out.weight,
            out_proj_bias=self.out.bias,
            use_separate_proj_weight=True,
            q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight,
        )
        return attended[0]


def encoder_layer():
    """Its nn.MultiheadAttention hands over its out_proj; in evaluation the whole layer is one fused kernel."""
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)


@pytest.mark.parametrize("sigma", [0.0, 0.3])
@pytest.mark.parametrize("make", [FunctionalAttention, encoder_layer])
def test_a_model_that_reads_weight_computes_with_w_prime_plus_eps(make, sigma):
    torch.manual_seed(0)
    plain = make().double().eval()
    model = ref.with_nonzero_B(inject_lora(copy.deepcopy(plain), r=2))
    x = torch.randn(2, 6, 16, dtype=torch.float64)

    with perturbed(model, sigma, seed=0):
        out = model(x)
        dense = ref.dense_call(plain, model, x)

    torch.testing.assert_close(out, dense)
    given = torch.autograd.grad(out.square().sum(), lora_parameters(model))
    expected = torch.autograd.grad(dense.square().sum(), lora_parameters(model))
    torch.testing.assert_close(given, expected)


def test_the_fused_kernel_computes_with_w_prime_plus_eps(monkeypatch):
    torch.manual_seed(0)
    plain = encoder_layer().double().eval()
    model = ref.with_nonzero_B(inject_lora(copy.deepcopy(plain), r=2))
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    kernel, calls = torch._transformer_encoder_layer_fwd, []

    def counting_kernel(*arguments):
        calls.append(1)
        return kernel(*arguments)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counting_kernel)
    with perturbed(model, 0.3, seed=0), torch.no_grad():
        torch.testing.assert_close(model(x), ref.dense_call(plain, model, x))
    assert calls


WORDS = torch.arange(24).reshape(2, 12) % 20  # (B, T)
SOUND = torch.linspace(-1, 1, 128, dtype=torch.float64).view(2, 64)  # (B, samples)
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
        transformers = pytest.importorskip("transformers", reason='needs pip install -e ".[gpt2]"')
        if not transformers.utils.is_torch_available():
            pytest.skip(f"this transformers does not run on torch {torch.__version__}")
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**SETTINGS[kind])
        self.body = getattr(transformers, f"{kind}Model")(config).double().eval()
        self.x = SOUND if kind == "WavLM" else WORDS
        self.more = {}
        if config.is_encoder_decoder:
            self.more["decoder_input_ids"] = WORDS[:, :7]
        for p in self.body.parameters():
            nn.init.normal_(p, mean=p.dim() == 1, std=0.2)  # the norms' weights are around 1

    def forward(self, x):
        return self.body(x, **self.more)[0]


KINDS = ["WavLM", "Mamba", "T5"]


@pytest.mark.parametrize("sigma", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_real_model_computes_with_w_prime_plus_eps(kind, sigma):
    plain = LastState(kind)
    model = ref.with_nonzero_B(inject_lora(copy.deepcopy(plain), r=2))

    with perturbed(model, sigma, seed=0):
        out = model(model.x)
        dense = ref.dense_call(plain, model, model.x)

    torch.testing.assert_close(out, dense)
    given = torch.autograd.grad(out.square().mean(), lora_parameters(model))
    expected = torch.autograd.grad(dense.square().mean(), lora_parameters(model))
    torch.testing.assert_close(given, expected)
    assert all(gradient.any() for gradient in given)  # each adapter is in the computation


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_model_trains(kind):
    model = ref.with_nonzero_B(inject_lora(LastState(kind), r=2))
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.01)
    base = ref.base_bytes(model)

    def mean_square(model, x):
        return model(x).square().mean()

    losses = []
    for step in range(5):
        losses.append(flatlora.flat_lora_step(model, mean_square, [model.x], optimizer, sigma=0.02, seed=step))

    assert losses[-1] < losses[0]
    assert ref.base_bytes(model) == base


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_model_merges(kind):
    model = ref.with_nonzero_B(inject_lora(LastState(kind), r=2))
    expected = model(model.x)
    flatlora.merge_lora(model)
    torch.testing.assert_close(model(model.x), expected)


# ---- Compiled ----

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")


def output_with_gradients(module, layer, x):
    out = module(x)
    gradients = torch.autograd.grad(out.square().sum(), lora_parameters(layer))
    return [out, *gradients]


@needs_compiler
def test_a_compiled_layer_equals_the_eager_one():
    layer = ref.adapted_layer()
    compiled = torch.compile(layer)
    x = torch.randn(2, 5, 12)
    for seed in (0, 1):
        with perturbed(layer, 0.3, seed):
            expected = output_with_gradients(layer, layer, x)
            given = output_with_gradients(compiled, layer, x)
        torch.testing.assert_close(given, expected)


def compiled_model():
    torch.compiler.reset()
    model = ref.adapted_model(torch.float32)
    return model, torch.compile(model, backend="aot_eager", fullgraph=True)  # an error unless it is one graph


def test_a_compiled_model_takes_the_step_of_the_eager_one():
    model, compiled = compiled_model()
    twin = ref.adapted_model(torch.float32)
    data = ref.batch(dtype=torch.float32)

    ref.flat_step(twin, ref.loss_fn, [data], ref.sgd(twin))
    ref.flat_step(compiled, ref.loss_fn, [data], ref.sgd(model))

    torch.testing.assert_close(ref.adapters(model), ref.adapters(twin))


@pytest.mark.skipif(torch.__version__ < "2.5", reason="torch 2.4 compiles again for each noise")
def test_a_later_step_compiles_nothing_anew():
    model, compiled = compiled_model()
    optimizer = ref.sgd(model)
    batches = [ref.batch(dtype=torch.float32)]

    graphs = []
    for step in range(4):
        flatlora.flat_lora_step(compiled, ref.loss_fn, batches, optimizer, 0.1 * (step + 1), seed=step)
        graphs.append(counters["stats"]["unique_graphs"])

    assert len(set(graphs)) == 1


# ---- Wrapped, copied ----


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_block(model):
    return nn.Sequential(torch.compile(model[0], backend="eager"))


WRAPPERS = [compiled, compiled_block, ref.data_parallel]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_does_not_show_in_the_state(wrap):
    model = nn.Sequential(ref.adapted_model())
    expected = list(flatlora.lora_state_dict(model))
    assert list(flatlora.lora_state_dict(wrap(model))) == expected


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_does_not_change_the_noise(wrap):
    model = nn.Sequential(ref.adapted_model())
    expected = ref.noise_of(model)
    torch.testing.assert_close(ref.noise_of(wrap(model)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_state_loads_into_a_wrapped_model(wrap):
    model = nn.Sequential(ref.adapted_model())
    state = flatlora.lora_state_dict(model)
    state["0.2.lora_B"] += 1
    flatlora.load_lora_state_dict(wrap(model), state)
    assert torch.equal(model[0][2].lora_B, state["0.2.lora_B"])


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_is_merged(wrap):
    model = nn.Sequential(ref.adapted_model())
    flatlora.merge_lora(wrap(model))
    assert type(model[0][0]) is type(model[0][2]) is nn.Linear


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickled, AveragedModel])
def test_a_copy_taken_inside_a_perturbation_is_clean(make):
    layer = ref.adapted_layer()
    x = torch.randn(5, 12)
    clean = layer(x)
    with perturbed(layer, 0.3, seed=0):
        twin = make(layer)
        assert torch.equal(twin(x), clean)


def test_four_threads_may_run_one_perturbed_model():
    layers = [nn.Linear(n, 448 - n) for n in (192, 256, 192, 256)]
    model = inject_lora(nn.Sequential(*layers), r=3)
    inputs = [torch.randn(8, 192, requires_grad=True) for _ in range(40)]

    def gradients(x):
        return torch.autograd.grad(model(x).square().sum(), [x, *lora_parameters(model)])

    with perturbed(model, 0.3, seed=0), ThreadPoolExecutor(4) as pool:
        given = list(pool.map(gradients, inputs))
        expected = [gradients(x) for x in inputs]
    torch.testing.assert_close(given, expected)


# ---- Checkpointed, trained besides ----


def test_checkpointing_takes_the_gradient_of_the_dense_formula():
    model = ref.adapted_model()
    x, y = ref.batch()
    with perturbed(model, 0.3, seed=0):
        out = checkpoint(model, x, use_reentrant=False)
        F.cross_entropy(out, y).backward()
        expected = ref.dense_gradients(model, (x, y))
    torch.testing.assert_close(ref.gradients(model), expected)


def test_reentrant_checkpointing_does_so_if_the_backward_is_inside():
    model = ref.adapted_model()
    x, y = ref.batch()
    with perturbed(model, 0.3, seed=0):
        out = checkpoint(model, x.requires_grad_(), use_reentrant=True)
        F.cross_entropy(out, y).backward()
        expected = ref.dense_gradients(model, (x, y))
    torch.testing.assert_close(ref.gradients(model), expected)


def test_reentrant_checkpointing_is_wrong_if_the_backward_is_outside():  # the docstring of `perturbed` says so
    model = ref.adapted_model()
    x, y = ref.batch()
    with perturbed(model, 0.3, seed=0):
        out = checkpoint(model, x.requires_grad_(), use_reentrant=True)
        expected = ref.dense_gradients(model, (x, y))
    F.cross_entropy(out, y).backward()
    assert not torch.allclose(ref.gradients(model)[0], expected[0], rtol=0.01)


def test_checkpointing_with_the_backward_outside_is_an_error():
    model = ref.adapted_model()
    x, _ = ref.batch()
    with perturbed(model, 0.3, seed=0):
        out = checkpoint(model, x, use_reentrant=False)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        out.sum().backward()


def test_whoever_trains_the_base_gets_its_gradient_at_w_prime_plus_eps():
    model = ref.adapted_model()
    x, y = ref.batch()
    model.requires_grad_(True)
    wrt = list(model.parameters())
    with perturbed(model, 0.3, seed=0):
        given = torch.autograd.grad(ref.loss_fn(model, (x, y)), wrt)
        expected = torch.autograd.grad(ref.dense_loss(model, (x, y)), wrt)
    torch.testing.assert_close(given, expected)


# ---- Memory ----


def test_a_perturbed_model_holds_one_more_tensor_of_the_size_of_w():
    layers = [nn.Linear(300, 500), nn.Linear(500, 300), nn.Linear(300, 499), nn.Linear(499, 300)]
    model = ref.with_nonzero_B(inject_lora(nn.Sequential(*layers).double(), r=2))
    size = 8 * 300 * 499  # bytes of the smallest weight
    before = ref.memories(size)

    with perturbed(model, 0.3, seed=0):
        table = ref.memory_of(model[0].noise.normals)
        x = torch.randn(5, 300, dtype=torch.float64)
        out = model(x)
        between = ref.memories(size) - before - {table}
        out.sum().backward()
        after = ref.memories(size) - before - {table}

    assert len(between) <= 1  # the memory that W + eps is made in
    assert after == between
