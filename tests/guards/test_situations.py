"""Situations in which flatlora.py once gave a wrong result without a word, or an error that nobody could read."""

import copy
import importlib.util
import re
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim.swa_utils import AveragedModel

import flatlora
from flatlora import inject_lora, lora_parameters, lora_state_dict, perturbed


def two_layers(module=flatlora):
    """6 -> 8 -> 4, adapted, with B as in the middle of training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    module.inject_lora(model, r=2)
    for p in module.lora_parameters(model):
        nn.init.normal_(p)
    return model


def inputs():
    return torch.linspace(-1, 1, 30).view(5, 6)


def mean_square(model, x):
    return model(x).square().mean()


def noisy_output(model, sigma=0.3, seed=0, module=flatlora):
    with torch.no_grad(), module.perturbed(model, sigma, seed):
        return model(inputs())


def fresh_module():
    """flatlora as a new process imports it: no noise has been drawn yet."""
    spec = importlib.util.spec_from_file_location("fresh_flatlora", flatlora.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where torch.export looks for it
    spec.loader.exec_module(module)
    return module


# ---- Compilers and modes -------------------------------------------------------------------------------------


class CountingBackend:
    """aot_eager, with the plan of the default compiler for what is kept and what is computed again."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return torch._dynamo.backends.debugging.aot_eager_decomp_partition(graph, example_inputs)


def unchanged(tensor):
    return tensor


def output_and_gradients(net, parameters, x, when_saved=unchanged):
    with torch.autograd.graph.saved_tensors_hooks(when_saved, unchanged):
        out = net(x)
    return out, *torch.autograd.grad(out.square().sum(), parameters)


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


@pytest.mark.skipif(torch.__version__ < "2.5", reason="torch 2.4 does not see that a module has changed")
def test_a_model_that_is_compiled_before_any_noise_is_one_graph_and_keeps_no_noisy_weight():
    module = fresh_module()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24), nn.LayerNorm(24), nn.Linear(24, 96))
    module.inject_lora(model, r=2)
    parameters = module.lora_parameters(model)
    for p in parameters:
        nn.init.normal_(p, std=0.1)
    x = torch.randn(5, 24)
    backend = CountingBackend()
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for step in range(4):
        with module.perturbed(model, 0.1 + step / 10, seed=step):
            given = output_and_gradients(compiled, parameters, x, keep)
            expected = output_and_gradients(model, parameters, x)
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    assert backend.graphs == 1

    own = {storage(p) for p in model.parameters()}
    for layer in module.lora_layers(model).values():
        with module.perturbed(model, 0.1, seed=0):
            own.add(storage(layer.noise.normals))
    assert any(storage(tensor) in own for tensor in saved)
    if torch.__version__ >= "2.13":  # 2.5 and 2.6 keep it, those in between were not tried
        for tensor in saved:
            assert tensor.numel() < 96 * 24 or storage(tensor) in own


def in_default_dtype(dtype):
    def draw(module):
        model = two_layers(module)
        torch.set_default_dtype(dtype)
        try:
            with module.perturbed(model, 0.3, seed=0):
                model(torch.ones(5, 6, dtype=torch.float32))
        finally:
            torch.set_default_dtype(torch.float32)

    return draw


def on_default_device(module):
    model = two_layers(module)
    x = inputs()
    with torch.device("meta"), module.perturbed(model, 0.3, seed=0):
        model(x)


def in_fake_tensor_mode(module):
    for _ in range(2):  # two modes: the tensors of one cannot be used in the other
        with FakeTensorMode():
            model = module.inject_lora(nn.Sequential(nn.Linear(6, 8)), r=2)
            with module.perturbed(model, 0.3, seed=0):
                model(torch.ones(3, 6)).sum().backward()


def in_export(module):
    model = module.inject_lora(nn.Sequential(nn.Linear(6, 8)), r=2)
    with module.perturbed(model, 0.3, seed=0):
        expected = model(inputs())
        exported = torch.export.export(model, (inputs(),)).module()
    torch.testing.assert_close(exported(inputs()), expected)


def in_inference_mode(module):
    with torch.inference_mode():
        noisy_output(two_layers(module), module=module)


FIRST_DRAWS = {
    "float64": in_default_dtype(torch.float64),
    "bfloat16": in_default_dtype(torch.bfloat16),
    "default device": on_default_device,
    "fake tensors": in_fake_tensor_mode,
    "export": in_export,
    "inference": in_inference_mode,
}


@pytest.mark.parametrize("draw", FIRST_DRAWS.values(), ids=FIRST_DRAWS)
def test_the_noise_does_not_depend_on_the_modes_in_which_it_is_first_drawn(draw):
    plain = fresh_module()
    expected = noisy_output(two_layers(plain), module=plain)
    other = fresh_module()
    draw(other)
    assert torch.equal(noisy_output(two_layers(other), module=other), expected)


def test_a_model_may_be_traced_inside_the_noise():
    model = two_layers()
    with perturbed(model, 0.3, seed=0):
        expected = model(inputs())
        traced = torch.jit.trace(model, (inputs(),))
    torch.testing.assert_close(traced(inputs()), expected)


# ---- Names ---------------------------------------------------------------------------------------------------


class ChildCalledModule(nn.Module):
    """A model of somebody who calls a child `module`, and another one `_orig_mod`."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(6, 8)
        self._orig_mod = nn.ModuleDict({"fc": nn.Linear(8, 4)})

    def forward(self, x):
        return self._orig_mod["fc"](self.module(x))


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def compiled(module):
    return torch.compile(module, backend="eager")


def in_ddp(module):
    return nn.parallel.DistributedDataParallel(module)


def in_fsdp(module):
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)


AROUND_MODELS = {
    "DataParallel": nn.DataParallel,
    "DDP": in_ddp,
    "compiled": compiled,
    "compiled DDP": lambda model: compiled(in_ddp(model)),
    "DDP of compiled": lambda model: in_ddp(compiled(model)),
    "AveragedModel": AveragedModel,
    "checkpointed": checkpoint_wrapper,
    "FSDP of one rank": in_fsdp,
}


@pytest.mark.parametrize("wrap", AROUND_MODELS.values(), ids=AROUND_MODELS)
def test_names_and_noise_are_those_of_the_model_without_its_wrapper(wrap, one_rank):
    model = inject_lora(ChildCalledModule(), r=2)
    wrapped = wrap(copy.deepcopy(model))
    state = lora_state_dict(wrapped)
    assert list(state) == list(lora_state_dict(model))
    assert {"module.lora_A", "_orig_mod.fc.lora_B"} < state.keys()
    assert {"module.lora_A", "_orig_mod.fc.lora_B"} < model.state_dict().keys()
    output = noisy_output(wrapped).cpu()  # DataParallel computes on a GPU, if there is one
    torch.testing.assert_close(output, noisy_output(model))


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, compiled, in_fsdp], ids=["checkpointed", "compiled", "FSDP"])
def test_a_wrapped_block_has_the_name_of_the_block(wrap, one_rank):
    model = inject_lora(nn.Sequential(nn.Sequential(nn.Linear(6, 8)), nn.Linear(8, 4)), r=2)
    model[0] = wrap(model[0])
    assert [name for name in lora_state_dict(model) if name.endswith("A")] == ["0.0.lora_A", "1.lora_A"]


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, compiled], ids=["checkpointed", "compiled"])
def test_a_layer_in_a_wrapped_block_is_found_by_its_name(wrap):
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8)), nn.Linear(8, 4))
    model[0] = wrap(model[0])
    inject_lora(model, r=2, targets=["0.0"])
    assert list(flatlora.lora_layers(model)) == ["0.0"]


def test_a_class_of_ones_own_that_is_called_like_a_wrapper_is_none():
    class DataParallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(6, 8)
            self.other = nn.Linear(6, 8)

    model = inject_lora(DataParallel(), r=2)
    assert list(flatlora.lora_layers(model)) == ["module", "other"]


def sharded(model):
    """Each A and B is left as FSDP leaves it on a rank that has none of it."""
    for p in lora_parameters(model):
        p.data = torch.empty(0)
    return model


def as_dtensors(model):
    tensor = pytest.importorskip("torch.distributed.tensor")
    if not hasattr(tensor, "distribute_tensor"):
        pytest.skip("needs torch 2.5")
    mesh = init_device_mesh("cpu", (1,))
    for layer in flatlora.lora_layers(model).values():
        layer.lora_A = nn.Parameter(tensor.distribute_tensor(layer.lora_A.data, mesh))
    return model


def offloaded(model):
    accelerate = pytest.importorskip("accelerate", reason="comes with peft")
    return accelerate.cpu_offload(model)


NOT_WHOLE = {
    "shards": sharded,
    "DTensors": as_dtensors,
    "meta": lambda model: model.to("meta"),
    "offloaded": offloaded,
}


@pytest.mark.parametrize("change", NOT_WHOLE.values(), ids=NOT_WHOLE)
def test_what_is_not_whole_or_not_in_memory_is_an_error(change, one_rank):
    state = lora_state_dict(two_layers())
    model = change(two_layers())
    words = "must be"
    with pytest.raises(ValueError, match=words):
        lora_state_dict(model)
    with pytest.raises(ValueError, match=words):
        flatlora.load_lora_state_dict(model, state)
    with pytest.raises(ValueError, match=words), perturbed(model, 0.3, seed=0):
        pass


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_data_parallel_on_two_gpus():
    model = two_layers().cuda()
    x = inputs().cuda()
    with perturbed(model, 0.3, seed=0):
        torch.testing.assert_close(nn.DataParallel(model, [0, 1])(x), model(x))


def test_a_replica_on_another_device_takes_the_noise_there():
    """nn.DataParallel copies the attributes of a layer, and its parameters to the other device. Here that is "meta"."""
    layer = two_layers()[0]
    replica = flatlora.LoRALinear(nn.Linear(6, 8, device="meta"), r=2)
    with perturbed(layer, 0.3, seed=0):
        for name, value in vars(layer).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                vars(replica)[name] = value
        assert replica(inputs().to("meta")).device.type == "meta"
        assert replica.weight.device.type == "meta"


# ---- What trains ---------------------------------------------------------------------------------------------


def test_a_later_injection_touches_its_new_layers_only():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    inject_lora(model, r=2, targets=["0"])
    model[0].lora_A.requires_grad_(False)  # someone trains B alone
    model[2].requires_grad_(True)  # and a head
    inject_lora(model, r=2, targets=["1"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["0.lora_B", "1.lora_A", "1.lora_B", "2.weight", "2.bias"]
    assert len(lora_parameters(model)) == 5


@pytest.mark.parametrize("step", [flatlora.flat_lora_step, flatlora.sam_step])
def test_a_frozen_parameter_in_the_optimizer_is_an_error(step):
    model = two_layers()
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    model[0].lora_A.requires_grad_(False)
    settings = {"sigma": 0.1, "seed": 0} if step is flatlora.flat_lora_step else {"rho": 0.1}
    with pytest.raises(ValueError, match="holds 1 frozen parameter"):
        step(model, mean_square, [inputs()], optimizer, **settings)


def test_a_state_of_another_alpha_is_an_error():
    model = inject_lora(nn.Sequential(nn.Linear(6, 8)), r=2, alpha=16)
    state = lora_state_dict(inject_lora(nn.Sequential(nn.Linear(6, 8)), r=2, alpha=64))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"0\.alpha is 64\.0 in the state and 16\.0 in the model"):
        flatlora.load_lora_state_dict(model, state)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_the_alpha_of_a_lone_layer_counts_too():
    layer = flatlora.LoRALinear(nn.Linear(6, 8), alpha=16)
    with pytest.raises(ValueError, match="alpha is 64"):
        flatlora.load_lora_state_dict(layer, lora_state_dict(flatlora.LoRALinear(nn.Linear(6, 8), alpha=64)))


def test_a_state_without_alpha_loads():  # as version 0.1 wrote it
    model, other = two_layers(), two_layers()
    state = {name: p + 1 for name, p in lora_state_dict(model).items() if "lora_" in name}
    flatlora.load_lora_state_dict(other, state)
    torch.testing.assert_close(other[0].lora_A, model[0].lora_A + 1)


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_of_the_base_finds_its_layers(strict):
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    model = inject_lora(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), r=2)
    checkpoint = base.state_dict()
    if strict:  # complete with adapters
        checkpoint |= {name: p for name, p in model.state_dict().items() if "lora_" in name}
    result = model.load_state_dict(checkpoint, strict=strict)
    assert not result.unexpected_keys
    assert torch.equal(model(inputs()), base(inputs()))
    assert list(base.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]  # the caller's is as it was


# ---- Seeds, strengths, batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [float, np.float32, torch.tensor, np.array])
def test_fractions_are_different_seeds(kind):
    model = two_layers()
    outputs = [noisy_output(model, seed=(0, kind(seed))) for seed in (0.0, 0.25, 0.9)]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("seed", [1.0, True, np.int64(1), np.float32(1), torch.tensor(1), np.array(1)], ids=str)
def test_equal_numbers_are_the_same_seed(seed):
    model = two_layers()
    assert torch.equal(noisy_output(model, seed=(seed, 0)), noisy_output(model, seed=(1, 0)))


@pytest.mark.parametrize("seed", [None, float("nan"), float("inf"), {1}, (1, None), 1j], ids=str)
@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_what_is_no_seed_is_an_error(seed, sigma):
    with pytest.raises(ValueError, match="seed must be"), perturbed(two_layers(), sigma, seed):
        pass


def optimizer_for(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


CALLS = {
    "perturbed": lambda model: perturbed(model, 0.0, seed=0).__enter__(),
    "step": lambda model: flatlora.flat_lora_step(model, mean_square, [inputs()], optimizer_for(model), 0.0, seed=0),
    "sharpness": lambda model: flatlora.sharpness(model, mean_square, [inputs()], 0.0, samples=1, seed=0),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_sigma_zero_raises_what_any_sigma_raises(call):
    model = two_layers()
    with pytest.raises(RuntimeError, match="perturbed already"), perturbed(model, 0.3, seed=0):
        call(model)
    with pytest.raises(ValueError, match="has no LoRALinear"):
        call(nn.Sequential(nn.Linear(6, 8)))


@pytest.mark.parametrize("batches", [[], (), torch.ones(2, 5, 6), {"x": 1}, iter([1])], ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("name", ["flat_lora_step", "sam_step", "sharpness"])
def test_batches_are_a_list(name, batches):
    model = two_layers()
    settings = {
        "flat_lora_step": {"optimizer": optimizer_for(model), "sigma": 0.1, "seed": 0},
        "sam_step": {"optimizer": optimizer_for(model), "rho": 0.1},
        "sharpness": {"sigma": 0.1, "samples": 1, "seed": 0},
    }
    with pytest.raises(ValueError, match="batches must be a list"):
        getattr(flatlora, name)(model, mean_square, batches, **settings[name])


def test_no_samples_are_an_error():
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        flatlora.sharpness(two_layers(), mean_square, [inputs()], 0.1, samples=0, seed=0)


def test_a_loss_per_sample_is_an_error_that_changes_nothing():
    model = two_layers()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=re.escape("loss_fn must return the mean over the batch, one number, got (5,)")
    ):
        flatlora.flat_lora_step(model, lambda m, x: m(x).mean(dim=1), [inputs()], optimizer_for(model), 0.1, seed=0)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.fixture
def accelerate():
    module = pytest.importorskip("accelerate", reason="comes with peft")
    yield module
    module.state.AcceleratorState._reset_state(reset_partial_state=True)  # else all later tests get cpu=True


def test_a_step_inside_accelerates_accumulation_is_an_error(accelerate):
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=4, cpu=True)
    model, optimizer = accelerator.prepare(two_layers(), optimizer_for(two_layers()))
    optimizer.param_groups[0]["params"][:] = lora_parameters(model)
    with pytest.raises(ValueError, match="accelerate's `accumulate`"), accelerator.accumulate(model):
        flatlora.flat_lora_step(model, mean_square, [inputs()], optimizer, 0.1, seed=0)


def test_a_loop_under_accelerate_takes_the_step_of_flat_lora_step(accelerate):
    """Two micro-batches in `accumulate`, both under the noise of their optimizer step."""
    batches = [torch.randn(5, 6), torch.randn(5, 6)]
    expected = two_layers()
    model = copy.deepcopy(expected)
    flatlora.flat_lora_step(expected, mean_square, batches, optimizer_for(expected), 0.3, seed=(0, 1))

    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer_for(model))
    for batch in batches:
        with accelerator.accumulate(model):
            with perturbed(model, 0.3, seed=(0, 1)):
                accelerator.backward(mean_square(model, batch))
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model.state_dict(), expected.state_dict())


def test_jagged_tensors_are_computed_row_by_row():
    layer = two_layers()[0]
    rows = [torch.randn(3, 6), torch.randn(5, 6)]
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
    dense = torch.cat(rows).requires_grad_()
    with perturbed(layer, 0.3, seed=0):
        outputs = [layer(jagged).values(), layer(dense)]
    torch.testing.assert_close(*outputs)
    parameters = [layer.lora_A, layer.lora_B]
    by_jagged = torch.autograd.grad(outputs[0].square().sum(), [jagged, *parameters])
    by_dense = torch.autograd.grad(outputs[1].square().sum(), [dense, *parameters])
    torch.testing.assert_close([by_jagged[0].values(), *by_jagged[1:]], list(by_dense))


# ---- Bases that no adapter can stand on ----------------------------------------------------------------------


def quantised_by_torchao(model):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def quantised_dynamically(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


class ForeignTensor(torch.Tensor):
    """As the weights of quantised layers are, of a class of its own."""


def of_a_foreign_class(model):
    for layer in model:
        layer.weight = nn.Parameter(layer.weight.data.as_subclass(ForeignTensor))
    return model


BASES = {
    "torchao": lambda: quantised_by_torchao(nn.Sequential(nn.Linear(64, 64))),
    "foreign": lambda: of_a_foreign_class(nn.Sequential(nn.Linear(6, 8))),
    "dynamic": lambda: quantised_dynamically(nn.Sequential(nn.Linear(6, 8))),
    "no inputs": lambda: nn.Sequential(nn.Linear(0, 8)),
    "no outputs": lambda: nn.Sequential(nn.Linear(8, 0)),
    "complex": lambda: nn.Sequential(nn.Linear(6, 8, dtype=torch.complex64)),
    "float8": lambda: nn.Sequential(nn.Linear(6, 8)).to(torch.float8_e4m3fn),
    "524,289 rows": lambda: nn.Sequential(nn.Linear(1, 2**19 + 1)),
    "4,194,305 columns": lambda: nn.Sequential(nn.Linear(2**22 + 1, 1)),
}


@pytest.mark.filterwarnings("ignore")  # torch's on deprecated quantisation and empty tensors
@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_a_base_of_another_kind_is_refused_before_anything_changes(make):
    model = make()
    before = [(name, type(module)) for name, module in model.named_modules()]
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"must have|must be|fits none"):
        inject_lora(model, r=2)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert [p.requires_grad for p in model.parameters()] == trained


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantise", [quantised_by_torchao, quantised_dynamically])
def test_a_base_that_is_quantised_later_is_refused(quantise):
    model = quantise(inject_lora(nn.Sequential(nn.Linear(64, 64)), r=2))
    with pytest.raises(ValueError, match=r"base\.weight .*must be"), perturbed(model, 0.3, seed=0):
        pass


@pytest.mark.parametrize("columns", [3, 2**20, 2**22])
def test_every_window_lies_in_the_table(columns):
    """The rows must not reach beyond its end, wherever the first one starts."""
    weight = torch.ones(2, columns)
    for seed in range(200):
        noise = flatlora.draw_noise(weight, 0.3, seed)
        assert noise.normals[-1, -1].isfinite()


@pytest.mark.parametrize(("sigma", "share"), [(0.01, 0.82), (0.001, 0.22)])
def test_in_bfloat16_a_small_sigma_rounds_away_as_the_departures_say(sigma, share):
    torch.manual_seed(0)
    weight = torch.randn(256, 1024).bfloat16()
    noisy = flatlora.draw_noise(weight, sigma, seed=0).added_to(weight)
    assert (noisy != weight).double().mean().item() == pytest.approx(share, abs=0.02)


def test_a_lone_linear_layer_may_be_the_model():
    linear = nn.Linear(6, 8)
    layer = inject_lora(linear, r=2)
    assert layer.base is linear
    merged = flatlora.merge_lora(layer)
    assert type(merged) is nn.Linear
    assert torch.equal(merged(inputs()), linear(inputs()))
