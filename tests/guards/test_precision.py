"""Half precision, autocast, devices, odd and large shapes, thread counts and several processes."""

import copy
import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import reference as ref
import torch
from processes import ended, started
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import flatlora
from flatlora import inject_lora, lora_parameters, perturbed

HALVES = [torch.bfloat16, torch.float16]
STEPS = [ref.lora_step, ref.flat_step, ref.sam_step]


def end_of(model):
    """All that trains, as one vector."""
    return torch.cat([p.flatten() for p in ref.adapters(model)])


# ---- Half precision ----


def assert_rounded_once(given, exact):
    """A single rounding is off by half the distance of two neighbours; 1e-6 is for the sum in float32 before it."""
    spacing = torch.finfo(given.dtype).eps * 2 ** exact.abs().log2().floor()
    error = (given.double() - exact).abs()
    assert (error <= 0.501 * spacing + 1e-6).all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_merging_rounds_once(dtype, autocast):
    layer = ref.adapted_layer(m=64, n=48).to(dtype)
    exact = ref.merged(copy.deepcopy(layer).double())
    with torch.autocast("cpu", dtype, enabled=autocast):
        merged = flatlora.merge_lora(layer)
    assert merged.weight.dtype == dtype
    assert_rounded_once(merged.weight, exact)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_weight_rounds_once(dtype, autocast):
    layer = flatlora.LoRALinear(nn.Linear(48, 64, dtype=dtype), r=2)
    nn.init.normal_(layer.lora_B, std=0.1)
    with perturbed(layer, 0.3, seed=0), torch.autocast("cpu", dtype, enabled=autocast):
        weight = layer.weight
        eps = layer.noise.signed_std.double() * layer.noise.normals.double()
    exact = ref.merged(copy.deepcopy(layer).double()) + eps
    assert weight.dtype == dtype
    assert_rounded_once(weight, exact)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_adapter_path_rounds_once(dtype):
    layer = flatlora.LoRALinear(nn.Linear(48, 64, bias=False, dtype=dtype), r=2)
    nn.init.normal_(layer.lora_B)
    nn.init.zeros_(layer.base.weight)
    x = torch.randn(5, 48, dtype=dtype)
    exact = x.double() @ ref.merged(copy.deepcopy(layer).double()).T
    assert_rounded_once(layer(x), exact)


@pytest.mark.parametrize("dtype", HALVES)
def test_noise_is_in_the_dtype_of_w(dtype):
    layer = flatlora.LoRALinear(nn.Linear(48, 64, dtype=dtype), r=2)
    with perturbed(layer, 0.3, seed=0):
        assert layer.noise.signed_std.dtype == layer.noise.normals.dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
def test_norms_are_taken_in_float32(dtype):
    weight = torch.randn(64, 1000).to(dtype)
    expected = flatlora.filter_std(weight.double(), 1.0)
    torch.testing.assert_close(flatlora.filter_std(weight, 1.0).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_are_within_the_rounding_of_the_dense_ones(dtype, autocast):
    layer = flatlora.LoRALinear(nn.Linear(192, 256, dtype=torch.float32 if autocast else dtype), r=3)
    nn.init.normal_(layer.lora_B, std=0.5)
    exact = copy.deepcopy(layer).double()
    exact_x = torch.randn(32, 192, dtype=torch.float64, requires_grad=True)
    x = exact_x.to(layer.base.weight.dtype)

    with perturbed(layer, 0.3, seed=0):
        eps = ref.eps_of(layer).double()
        with torch.autocast("cpu", dtype, enabled=autocast):
            out = layer(x)
    dense = nn.functional.linear(exact_x, ref.merged(exact) + eps, exact.base.bias)

    assert out.dtype == dtype
    assert_close_in_norm(out, dense, 8 * torch.finfo(dtype).eps)
    given = torch.autograd.grad(out.float().square().sum(), [exact_x, layer.lora_A, layer.lora_B])
    expected = torch.autograd.grad(dense.square().sum(), [exact_x, exact.lora_A, exact.lora_B])
    for one, other in zip(given, expected):
        assert_close_in_norm(one, other, 8 * torch.finfo(dtype).eps)


def assert_close_in_norm(given, expected, tolerance):
    assert (given - expected).norm() <= tolerance * expected.norm()


def test_an_overflow_of_a_merged_weight_changes_nothing():
    model = ref.adapted_model(torch.float16)
    nn.init.constant_(model[2].lora_B, 1e8)  # float16 ends at 65504; the last layer, that is after a good one
    base, start = ref.base_bytes(model), ref.adapters(model)
    with pytest.raises(RuntimeError, match=r"2 cannot be merged: W' is not finite in torch\.float16"):
        flatlora.merge_lora(model)
    assert ref.base_bytes(model) == base
    ref.assert_same_bits(ref.adapters(model), start)


# ---- Autocast ----


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_with_a_scaler_trains_as_float32_does(dtype):
    start = end_of(ref.adapted_model(torch.float32))
    ends = []
    for enabled in (False, True):
        model = ref.adapted_model(torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        optimizer = ref.sgd(model, 0.02)
        for step in range(10):
            batches = [ref.batch(dtype=torch.float32, seed=step)]
            with torch.autocast("cpu", dtype, enabled=enabled):
                flatlora.flat_lora_step(model, ref.loss_fn, batches, optimizer, 0.1, step, 1.0, scaler)
        ends.append(end_of(model))
    rounding = (ends[1] - ends[0]).norm() / (ends[0] - start).norm()
    assert 0 < rounding < 0.05


def losses_of_three_steps(step, around, device):
    """Each step's loss and the sharpness after it, with autocast around the loop or inside the loss."""

    def autocast_loss_fn(model, batch):
        with torch.autocast(device, torch.bfloat16):
            return ref.loss_fn(model, batch)

    model = ref.adapted_model(torch.float32, device)
    optimizer = ref.sgd(model, lr=0.5)
    batches = [ref.batch(dtype=torch.float32, device=device)]
    losses = []
    outer = nullcontext()
    if around:
        outer = torch.autocast(device, torch.bfloat16)  # which keeps casts of A and B
    with outer:
        for _ in range(3):
            losses.append(step(model, autocast_loss_fn, batches, optimizer))
            losses.append(flatlora.sharpness(model, autocast_loss_fn, batches, sigma=0.3, samples=1, seed=0))
    return losses


@pytest.mark.parametrize("device", ref.DEVICES)
@pytest.mark.parametrize("step", STEPS)
def test_autocast_may_surround_the_loop(step, device):
    around = losses_of_three_steps(step, True, device)
    inside = losses_of_three_steps(step, False, device)
    assert around == inside
    assert around[0] != around[2]


def test_autocast_keeps_the_gradient_of_an_input():
    layer = ref.adapted_layer()
    x = torch.randn(5, 12, requires_grad=True)  # a leaf, of which autocast keeps the cast
    with perturbed(layer, 0.3, seed=0):
        dense = nn.functional.linear(x, ref.merged(layer) + ref.eps_of(layer), layer.bias)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)

    (given,) = torch.autograd.grad(out.float().square().sum(), x)
    (expected,) = torch.autograd.grad(dense.square().sum(), x)
    assert_close_in_norm(given, expected, 0.05)


def test_autocast_may_surround_the_loading():
    model = ref.adapted_model(torch.float32)
    state = flatlora.lora_state_dict(model)
    state["2.lora_B"] *= 2
    x, _ = ref.batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        flatlora.load_lora_state_dict(model, state)
        assert not torch.equal(model(x), before)


# ---- What is not finite ----


@pytest.mark.parametrize(("step", "passes"), [(ref.lora_step, 1), (ref.flat_step, 1), (ref.sam_step, 2)])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_update(step, passes, what):
    model = ref.adapted_model()
    optimizer = torch.optim.AdamW(lora_parameters(model))
    start = ref.adapters(model)
    losses = []

    def failing_loss_fn(model, batch):
        loss = ref.loss_fn(model, batch)
        losses.append(loss)
        if len(losses) < passes:
            return loss
        if what == "loss":
            return loss * math.nan
        return loss + (loss - loss.detach()).sqrt()  # + 0, with an infinite slope

    with pytest.raises(FloatingPointError, match=f"the .*{what} is not finite"):
        step(model, failing_loss_fn, [ref.batch()], optimizer)
    ref.assert_same_bits(ref.adapters(model), start)
    assert not optimizer.state


def test_sharpness_of_a_loss_that_is_not_finite_is_an_error():
    def failing_loss_fn(model, batch):
        return ref.loss_fn(model, batch) * math.nan

    with pytest.raises(FloatingPointError, match="the loss is not finite"):
        flatlora.sharpness(ref.adapted_model(), failing_loss_fn, [ref.batch()], 0.3, samples=1, seed=0)


# ---- Shapes ----


SHAPES = [(1, 5, (3,)), (5, 1, (3,)), (300, 2, (3,)), (7, 5, ()), (7, 5, (0,)), (7, 5, (2, 3, 4))]


@pytest.mark.parametrize(("n", "m", "before"), SHAPES)
def test_odd_shapes(n, m, before):
    layer = ref.adapted_layer(m, n).double()
    x = torch.randn(*before, n, dtype=torch.float64, requires_grad=True)
    with perturbed(layer, 0.3, seed=0):
        out = layer(x)
        dense = nn.functional.linear(x, ref.merged(layer) + ref.eps_of(layer), layer.bias)

    torch.testing.assert_close(out, dense)
    wrt = [x, layer.lora_A, layer.lora_B]
    given = torch.autograd.grad(out.square().sum(), wrt)
    torch.testing.assert_close(given, torch.autograd.grad(dense.square().sum(), wrt))


@pytest.mark.parametrize("r", [1, 300])  # a rank above the layer's size is a waste, but no error
def test_odd_ranks(r):
    layer = ref.with_nonzero_B(flatlora.LoRALinear(nn.Linear(12, 16), r=r, alpha=6))
    x = torch.randn(5, 12)
    expected = layer.base(x) + 6 / r * (x @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ref.DEVICES)
def test_steps_write_no_bit_of_a_million_weights(dtype, device):
    layer = nn.Linear(1024, 1024, device=device, dtype=dtype)
    model = ref.with_nonzero_B(inject_lora(nn.Sequential(layer), r=2))
    optimizer = ref.sgd(model, lr=1e-3)
    x = torch.randn(4, 1024, device=device).mul(0.01).to(dtype)
    base = ref.base_bytes(model)

    def mean_square(model, x):
        return model(x).float().square().mean()

    for step in range(3):
        flatlora.flat_lora_step(model, mean_square, [x, x], optimizer, sigma=0.3, seed=step)
    flatlora.sam_step(model, mean_square, [x, x], optimizer, rho=0.3)
    flatlora.sharpness(model, mean_square, [x], sigma=0.3, samples=2, seed=0)
    flatlora.merge_lora(copy.deepcopy(model))

    assert ref.base_bytes(model) == base


# ---- Devices, threads, modes ----


@pytest.mark.parametrize("device", ref.DEVICES)
def test_the_noise_is_the_same_on_every_device_in_every_thread_and_process(device):
    model = ref.adapted_model()
    expected = ref.noise_of(model)
    flatlora._real_table.cache_clear()  # as in another process
    elsewhere = model.to(device)
    torch.manual_seed(99)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))

    with ThreadPoolExecutor(1) as pool:
        given = pool.submit(ref.noise_of, elsewhere).result()

    torch.set_num_threads(threads)
    for name, eps in expected.items():
        torch.testing.assert_close(given[name].cpu(), eps)


@pytest.mark.parametrize("device", ref.DEVICES)
def test_no_global_generator_is_used(device):
    flatlora._real_table.cache_clear()  # so that the table is drawn here
    model = ref.adapted_model(device=device)
    batches = [ref.batch(device=device)]
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all()

    for step in STEPS:
        step(model, ref.loss_fn, batches, ref.sgd(model))
    flatlora.sharpness(model, ref.loss_fn, batches, sigma=0.3, samples=2, seed=0)

    assert torch.equal(torch.get_rng_state(), cpu)
    ref.assert_same_bits(torch.cuda.get_rng_state_all(), cuda)


@pytest.mark.parametrize("device", ref.DEVICES)
def test_gradients_on_every_device(device):
    model = ref.adapted_model(device=device)
    data = ref.batch(device=device)
    with perturbed(model, 0.3, seed=0):
        ref.loss_fn(model, data).backward()
        expected = ref.dense_gradients(model, data)
    torch.testing.assert_close(ref.gradients(model), expected)


@pytest.mark.parametrize("device", ref.DEVICES)
def test_a_grad_scaler_on_every_device(device):
    model = ref.adapted_model(torch.float32, device)
    twin = ref.adapted_model(torch.float32, device)
    batches = [ref.batch(dtype=torch.float32, device=device)]
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    same = {"sigma": 0.3, "seed": 0, "max_grad_norm": 0.01}

    flatlora.flat_lora_step(model, ref.loss_fn, batches, ref.sgd(model), **same)
    flatlora.flat_lora_step(twin, ref.loss_fn, batches, ref.sgd(twin), **same, scaler=scaler)

    ref.assert_same_bits(ref.adapters(twin), ref.adapters(model))


def test_what_was_made_in_inference_mode_serves_training():
    model = ref.adapted_model(torch.float32)
    batches = [ref.batch(dtype=torch.float32)]
    twin = copy.deepcopy(model)
    ref.flat_step(twin, ref.loss_fn, batches, ref.sgd(twin))

    flatlora._real_table.cache_clear()
    flatlora._memory.by_dtype.clear()
    with torch.inference_mode(), perturbed(model, 0.3, seed=0):
        model[2](torch.ones(16))  # the smaller layer first, so that the memory must grow afterwards
    ref.flat_step(model, ref.loss_fn, batches, ref.sgd(model))

    ref.assert_same_bits(ref.adapters(model), ref.adapters(twin))


def test_the_number_of_threads_changes_a_run_by_rounding_only():
    threads = torch.get_num_threads()
    ends = []
    for count in (1, 2):
        torch.set_num_threads(count)
        model = ref.adapted_model(torch.float32)
        for step in range(10):
            batches = [ref.batch(256, torch.float32, seed=step)]
            ref.flat_step(model, ref.loss_fn, batches, ref.sgd(model))
        ends.append(end_of(model))
    torch.set_num_threads(threads)
    assert_close_in_norm(ends[0], ends[1], 1e-5)


@pytest.mark.parametrize("step", STEPS)
def test_ctrl_c_leaves_nothing_behind(step):
    model = ref.adapted_model(torch.bfloat16)
    x, y = ref.batch(4, torch.bfloat16)
    base, start, clean = ref.base_bytes(model), ref.adapters(model), model(x)
    passes = []

    def interrupted_later(model, batch):
        passes.append(1)
        if len(passes) == 2:  # the second micro-batch
            raise KeyboardInterrupt
        return ref.loss_fn(model, batch)

    with pytest.raises(KeyboardInterrupt):
        step(model, interrupted_later, [(x, y), (x, y)], ref.sgd(model))

    assert ref.base_bytes(model) == base
    ref.assert_same_bits(ref.adapters(model), start)
    assert torch.equal(model(x), clean)


def test_ctrl_c_in_sharpness_leaves_nothing_behind():
    model = ref.adapted_model()
    x, y = ref.batch()
    clean = model(x)

    def interrupted_in_the_noise(model, batch):
        if model[0].noise is not None:
            raise KeyboardInterrupt
        return ref.loss_fn(model, batch)

    with pytest.raises(KeyboardInterrupt):
        flatlora.sharpness(model, interrupted_in_the_noise, [(x, y)], 0.3, samples=2, seed=0)
    assert torch.equal(model(x), clean)


def test_an_error_while_the_noise_is_drawn_leaves_nothing_behind(monkeypatch):
    model = ref.adapted_model()
    x, _ = ref.batch()
    clean = model(x)
    draw, drawn = flatlora.draw_noise, []

    def failing_draw(*arguments):
        if drawn:  # the second layer
            raise KeyboardInterrupt
        drawn.append(1)
        return draw(*arguments)

    monkeypatch.setattr(flatlora, "draw_noise", failing_draw)
    with pytest.raises(KeyboardInterrupt), perturbed(model, 0.3, seed=0):
        pass
    assert torch.equal(model(x), clean)


# ---- Two processes ----


def batches_of(step, rank):
    return [ref.batch(seed=100 * step + 10 * rank + i) for i in range(3)]


def flat_steps(net, rank):
    for step in range(5):
        batches = batches_of(step, rank)
        flatlora.flat_lora_step(net, ref.loss_fn, batches, ref.sgd(net), 0.3, (0, step, rank), max_grad_norm=0.2)


def sam_steps(net, rank):
    for step in range(5):
        batches = batches_of(step, rank)
        flatlora.sam_step(net, ref.loss_fn, batches, ref.sgd(net), rho=0.1, max_grad_norm=0.2)


def one_rank(rank, folder):
    """What each process of the tests below does."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for steps in (flat_steps, sam_steps):
        net = nn.parallel.DistributedDataParallel(ref.adapted_model())
        exchanges = []

        def count(seen, bucket):
            seen.append(bucket)
            return allreduce_hook(None, bucket)

        net.register_comm_hook(exchanges, count)
        steps(net, rank)
        torch.save((flatlora.lora_state_dict(net), len(exchanges)), Path(folder) / f"{steps.__name__}-{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads can abort a Python that ends in order (pytorch/pytorch#179291)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The folder in which two processes have left what they trained."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [started(one_rank, rank, folder) for rank in (0, 1)]
    assert [ended(rank) for rank in ranks] == [0, 0]
    return folder


def mean_gradients(model, step):
    """Of both ranks, each with its own noise and batches."""
    means = [torch.zeros_like(p) for p in lora_parameters(model)]
    for rank in (0, 1):
        twin = copy.deepcopy(model)
        optimizer = ref.sgd(twin, lr=0)
        flatlora.flat_lora_step(twin, ref.loss_fn, batches_of(step, rank), optimizer, 0.3, (0, step, rank))
        for mean, gradient in zip(means, ref.gradients(twin)):
            mean += gradient / 2
    return means


def test_two_ranks_take_the_step_of_one_process_with_both_noises(two_ranks):
    model = ref.adapted_model()
    for step in range(5):
        for p, mean in zip(lora_parameters(model), mean_gradients(model, step)):
            p.grad = mean
        nn.utils.clip_grad_norm_(lora_parameters(model), 0.2)
        ref.sgd(model).step()

    for rank in (0, 1):
        state, exchanges = torch.load(two_ranks / f"flat_steps-{rank}.pt")
        torch.testing.assert_close(state, flatlora.lora_state_dict(model))  # the names too, without DDP's prefix
        assert exchanges == 5  # one per step, for three micro-batches


def test_two_ranks_take_the_sam_step_of_one_process_with_all_batches(two_ranks):
    model = ref.adapted_model()
    for step in range(5):
        batches = batches_of(step, 0) + batches_of(step, 1)
        flatlora.sam_step(model, ref.loss_fn, batches, ref.sgd(model), rho=0.1, max_grad_norm=0.2)

    for rank in (0, 1):
        state, exchanges = torch.load(two_ranks / f"sam_steps-{rank}.pt")
        torch.testing.assert_close(state, flatlora.lora_state_dict(model))
        assert exchanges == 10  # two per step
