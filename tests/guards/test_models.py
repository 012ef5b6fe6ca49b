"""Models from practice: real architectures, compiled, wrapped, copied, checkpointed."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from libraries import library, needs_torch_27
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import flatlora
from flatlora import inject_lora, lora_parameters, lora_state_dict, perturbed

# ---- Models that multiply by a weight instead of calling its layer -------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_attention_computes_with_w_prime_plus_eps(fused, monkeypatch):
    """The layer multiplies by the weight of its out_proj. In eval mode without gradients, it is one fused kernel."""
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).double().eval()
    model = ref.with_nonzero_B(inject_lora(copy.deepcopy(plain), r=2, targets=".*"))
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    kernel, calls = torch._transformer_encoder_layer_fwd, []

    def counting_kernel(*arguments):
        calls.append("fused")
        return kernel(*arguments)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counting_kernel)
    with perturbed(model, 0.3, seed=0), torch.set_grad_enabled(not fused):
        torch.testing.assert_close(model(x), ref.dense_call(plain, model, x))
    assert bool(calls) == fused
    assert "self_attn.out_proj" in flatlora.lora_layers(model)


WORDS = torch.arange(24).reshape(2, 12) % 20  # (B, T)
SOUND = torch.linspace(-1, 1, 128, dtype=torch.float64).view(2, 64)  # (B, samples)
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 20}
ATTENTION = {"num_attention_heads": 2, "intermediate_size": 24}
CONVOLUTION = {"conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (8,), "num_feat_extract_layers": 1}
POSITIONS = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_buckets": 8}
SETTINGS = {  # of architectures that read a weight directly, each in a different way
    "WavLM": {**SMALL, **ATTENTION, **CONVOLUTION, **POSITIONS},
    "Mamba": {**SMALL, "state_size": 4, "time_step_rank": 3},
    "T5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 20},
}


class LastState(nn.Module):
    """The last hidden state (B, T, C) of a small model of transformers with random weights."""

    def __init__(self, kind):
        super().__init__()
        transformers = library("transformers")
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**SETTINGS[kind])
        self.body = getattr(transformers, f"{kind}Model")(config).double().eval()
        self.x = SOUND if kind == "WavLM" else WORDS
        self.more = {"decoder_input_ids": WORDS[:, :7]} if kind == "T5" else {}
        for p in self.body.parameters():
            nn.init.normal_(p, mean=p.dim() == 1, std=0.2)  # the norms' weights are around 1

    def forward(self, x):
        return self.body(x, **self.more)[0]


@pytest.mark.parametrize("sigma", [0.0, 0.3])
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_real_model_computes_with_w_prime_plus_eps(kind, sigma):
    plain = LastState(kind)
    model = ref.with_nonzero_B(inject_lora(copy.deepcopy(plain), r=2, targets=".*"))
    clean = model(model.x)

    with perturbed(model, sigma, seed=0):
        out = model(model.x)
        dense = ref.dense_call(plain, model, model.x)

    torch.testing.assert_close(out, dense)
    given = torch.autograd.grad(out.square().mean(), lora_parameters(model))
    expected = torch.autograd.grad(dense.square().mean(), lora_parameters(model))
    torch.testing.assert_close(given, expected)
    assert all(gradient.any() for gradient in given)  # each adapter is in the computation
    torch.testing.assert_close(flatlora.merge_lora(model)(model.x), clean)


# ---- Compiled ------------------------------------------------------------------------------------------------


def output_and_gradients(net, model, x):
    out = net(x)
    return [out, *torch.autograd.grad(out.square().sum(), lora_parameters(model))]


@needs_torch_27
def test_twelve_compiled_steps_with_and_without_noise_are_two_graphs_that_keep_no_noisy_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24), nn.LayerNorm(24), nn.Linear(24, 96))
    ref.with_nonzero_B(inject_lora(model.double(), r=2, targets=".*"))
    x = torch.randn(5, 24, dtype=torch.float64)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")  # keeps the same tensors as the default compiler
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    for step in range(12):
        with perturbed(model, 0.1 * (step % 3), seed=step):
            with torch.autograd.graph.saved_tensors_hooks(keep, keep):
                given = output_and_gradients(compiled, model, x)
            expected = output_and_gradients(model, model, x)
        torch.testing.assert_close(given, expected)
    assert counter.frame_count <= 2

    own = {ref.storage_address(p) for p in model.parameters()}
    own.add(ref.storage_address(flatlora.normal_table(x.dtype, x.device)))
    assert kept
    assert all(tensor.numel() < 96 * 24 or ref.storage_address(tensor) in own for tensor in kept)


# ---- Wrapped, copied -----------------------------------------------------------------------------------------


class ChildCalledModule(nn.Module):
    """A model whose children have the names `module` and `_orig_mod`, like those that wrappers add."""

    def __init__(self):
        super().__init__()
        self.module = nn.ModuleDict({"fc": nn.Linear(6, 8)})
        self._orig_mod = nn.Linear(8, 4)

    def forward(self, x):
        return self._orig_mod(self.module["fc"](x))


def compiled_inside(model):
    model.module = torch.compile(model.module, backend="eager")
    return model


@pytest.fixture
def one_rank():
    """A process group that contains only this process."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WRAPPERS = {
    "DDP": nn.parallel.DistributedDataParallel,
    "compiled": torch.compile,
    "DDP of compiled": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model)),
    "AveragedModel": AveragedModel,
    "checkpointed": checkpoint_wrapper,
    "compiled inside": compiled_inside,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_changes_neither_the_noise_nor_the_state(wrap, one_rank):
    model = inject_lora(ChildCalledModule(), r=2, targets=".*")
    wrapped = wrap(copy.deepcopy(model))
    ref.assert_same_bits(ref.noise_of(wrapped), ref.noise_of(model))
    state = lora_state_dict(model)
    assert list(lora_state_dict(wrapped)) == list(state)

    state["fc.lora_B"] += 1
    flatlora.load_lora_state_dict(wrapped, state)
    ref.assert_same_bits(lora_state_dict(wrapped), state)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("make", [copy.copy, pickled, AveragedModel])
def test_a_copy_made_inside_perturbed_is_clean(make):
    layer = ref.adapted_layer()
    x = torch.randn(5, 12)
    clean = layer(x)
    with perturbed(layer, 0.3, seed=0):
        assert torch.equal(make(layer)(x), clean)


def test_four_threads_may_run_one_perturbed_model():
    model = nn.Sequential(nn.Linear(192, 256), nn.Linear(256, 192))
    inject_lora(model, r=3, targets=".*")
    inputs = [torch.randn(8, 192) for _ in range(40)]

    def gradients(x):
        return torch.autograd.grad(model(x).square().sum(), lora_parameters(model))

    with perturbed(model, 0.3, seed=0), ThreadPoolExecutor(4) as pool:
        given = list(pool.map(gradients, inputs))
        expected = [gradients(x) for x in inputs]
    torch.testing.assert_close(given, expected)


# ---- Checkpointed, fully trained ------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_gradient_of_the_dense_formula(use_reentrant):
    model = ref.adapted_model()
    x, y = ref.batch()
    with perturbed(model, 0.3, seed=0):
        out = checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant)
        F.cross_entropy(out, y).backward()
        expected = ref.dense_gradients(model, (x, y))
    torch.testing.assert_close(ref.gradients(model), expected)


def test_the_gradient_of_an_unfrozen_w_is_taken_at_w_prime_plus_eps():
    model, data = ref.adapted_model(), ref.batch()
    model.requires_grad_(True)
    parameters = list(model.parameters())
    with perturbed(model, 0.3, seed=0):
        given = torch.autograd.grad(ref.loss_fn(model, data), parameters)
        expected = torch.autograd.grad(ref.dense_loss(model, data), parameters)
    torch.testing.assert_close(given, expected)


# ---- Memory and work -----------------------------------------------------------------------------------------


def test_no_tensor_of_the_size_of_w_lives_between_forward_and_backward():
    model = nn.Sequential(nn.Linear(300, 500), nn.Linear(500, 300)).double()
    ref.with_nonzero_B(inject_lora(model, r=2, targets=".*"))
    size = 8 * 300 * 500  # bytes of a weight
    flatlora.normal_table(torch.float64, torch.device("cpu"))
    before = ref.storage_addresses(size)

    with perturbed(model, 0.3, seed=0):
        out = model(torch.randn(5, 300, dtype=torch.float64))
        assert ref.storage_addresses(size) <= before
        out.sum().backward()
        assert ref.storage_addresses(size) <= before


def test_no_gradient_of_x_is_computed_where_x_needs_none(monkeypatch):
    model, data = ref.adapted_model(), ref.batch()
    model[0].bias.requires_grad_()  # otherwise autograd skips the layer
    real, computed = flatlora.dense, []

    def recording_dense(weight, dtype):
        computed.append(weight.shape)
        return real(weight, dtype)

    monkeypatch.setattr(flatlora, "dense", recording_dense)
    with perturbed(model, 0.3, seed=0):
        loss = ref.loss_fn(model, data)
        computed.clear()
        loss.backward()
    assert computed == [(4, 16)]  # the W of the second layer, and not of the first
