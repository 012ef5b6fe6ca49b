"""Half precision, odd shapes, thread counts and several processes change a run by rounding only."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import reference as ref
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import flatlora


def assert_rounded_once(given, exact):
    """A single rounding is off by half the distance of two neighbours; 1e-6 is for the sum in float32 before it."""
    spacing = torch.finfo(given.dtype).eps * 2 ** exact.abs().log2().floor()
    assert ((given.double() - exact).abs() <= 0.501 * spacing + 1e-6).all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", ref.DTYPES[1:])
def test_merging_and_the_noise_round_once(dtype, autocast):
    model = ref.adapted_model(dtype)
    exact = [ref.dense_weight(layer).detach() for layer in copy.deepcopy(model).double()[::2]]
    with torch.autocast("cpu", dtype, enabled=autocast):
        flatlora.merge_lora(model)
    for layer, weight in zip(model[::2], exact):
        assert_rounded_once(layer.weight, weight)
    half = flatlora.inject_lora(nn.Sequential(model[0]), r=2)  # B is zero: W' is W
    double = copy.deepcopy(half).double()
    with flatlora.perturbed(half, 0.3, 0), flatlora.perturbed(double, 0.3, 0):
        assert_rounded_once(half[0].weight, double[0].weight.detach())
        assert half[0].weight.dtype == dtype and not torch.equal(half[0].weight, half[0].base.weight)


def test_an_overflow_of_the_merged_weight_is_an_error_that_changes_nothing():
    model = ref.adapted_model(torch.float16)
    nn.init.constant_(model[4].lora_B, 1e8)  # float16 ends at 65504; the last layer, that is after two good ones
    before, start = ref.frozen_bytes(model), ref.adapters(model)
    with pytest.raises(RuntimeError, match=r"4 cannot be merged: .*W' is not finite in torch\.float16"):
        flatlora.merge_lora(model)
    assert ref.frozen_bytes(model) == before and all(map(torch.equal, ref.adapters(model), start))


@pytest.mark.parametrize("dtype", ref.DTYPES[1:])
def test_autocast_with_a_scaler_trains_as_float32_does_and_leaves_the_base_alone(dtype):
    ends, start = [], torch.cat([p.flatten() for p in ref.adapters(ref.adapted_model(torch.float32))])
    for enabled in (False, True):
        model = ref.adapted_model(torch.float32)
        scaler, before = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled), ref.frozen_bytes(model)
        for step in range(10):
            data = [ref.batch(dtype=torch.float32, seed=step)]
            with torch.autocast("cpu", dtype, enabled=enabled):
                flatlora.flat_lora_step(model, ref.loss_fn, data, ref.sgd(model, 0.02), 0.1, step, 1.0, scaler)
        assert ref.frozen_bytes(model) == before
        ends.append(torch.cat([p.flatten() for p in ref.adapters(model)]))
    assert 0 < (ends[1] - ends[0]).norm() / (ends[0] - start).norm() < 0.05


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("name", ref.STEPS)
def test_what_is_not_finite_stops_before_the_update(name, what):
    model, passes = ref.adapted_model(), []
    optimizer, start = torch.optim.AdamW(flatlora.lora_parameters(model)), ref.adapters(model)

    def failing_loss_fn(model, data):
        passes.append(loss := ref.loss_fn(model, data))
        root = (loss - loss.detach()).sqrt()  # 0, with an infinite slope
        spoilt = loss * math.nan if what == "loss" else loss + root
        return spoilt if len(passes) == (2 if "sam" in name else 1) else loss  # in the last pass of the step

    with pytest.raises(FloatingPointError, match=f"the {what} is not finite"):
        ref.STEPS[name](model, failing_loss_fn, [ref.batch()], optimizer)
    assert all(map(torch.equal, ref.adapters(model), start)) and not optimizer.state


@pytest.mark.parametrize(("n", "m", "before"), [(1, 5, (3,)), (5, 1, (3,)), (300, 2, (3,)), (7, 5, ()), (7, 5, (0,))])
def test_odd_shapes_compute_what_the_dense_weight_does(n, m, before):
    layer = ref.in_training(flatlora.LoRALinear(nn.Linear(n, m).double(), r=2))
    x = torch.randn(*before, n, dtype=torch.float64, requires_grad=True)
    with flatlora.perturbed(layer, 0.3, 0):
        eps, out = ref.read_eps(layer)[""], layer(x)
    dense = nn.functional.linear(x, ref.dense_weight(layer) + eps, layer.base.bias)
    torch.testing.assert_close(out, dense)
    grads = (torch.autograd.grad(y.square().sum(), [x, layer.lora_A, layer.lora_B]) for y in (out, dense))
    torch.testing.assert_close(*grads)


def test_a_row_may_have_a_million_inputs_and_more_are_an_error():
    layers = [flatlora.LoRALinear(nn.Linear(n, 2, bias=False), r=1) for n in (2**20, 2**20 + 2)]
    with torch.no_grad(), flatlora.perturbed(layers[0], 0.3, 0):
        moved = (layers[0].weight - layers[0].base.weight).norm(dim=1) / layers[0].base.weight.norm(dim=1)
    assert moved.tolist() == pytest.approx([0.3, 0.3], rel=0.005)
    with pytest.raises(RuntimeError, match="out of bounds for storage"), flatlora.perturbed(layers[1], 0.3, 0):
        layers[1](torch.ones(2**20 + 2))


def test_what_was_made_in_inference_mode_serves_training(monkeypatch):
    models, data = [ref.adapted_model(torch.float32) for _ in range(2)], ref.batch(dtype=torch.float32)
    ref.STEPS["flat"](models[0], ref.loss_fn, [data], ref.sgd(models[0]))
    monkeypatch.setattr(flatlora, "_tables", {})
    monkeypatch.setattr(flatlora, "_thread", type(flatlora._thread)())
    with torch.inference_mode(), flatlora.perturbed(models[1], 0.3, 0):
        models[1][4](torch.ones(8))  # the smallest layer first, so that the memory must grow afterwards
    ref.STEPS["flat"](models[1], ref.loss_fn, [data], ref.sgd(models[1]))
    assert all(map(torch.equal, *map(ref.adapters, models)))


def test_the_number_of_threads_changes_a_run_by_rounding_only():
    ends, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        model = ref.adapted_model(torch.float32)
        for step in range(10):
            ref.STEPS["flat"](model, ref.loss_fn, [ref.batch(256, torch.float32, seed=step)], ref.sgd(model))
        ends.append(torch.cat([p.flatten() for p in ref.adapters(model)]))
    torch.set_num_threads(threads)
    assert (ends[0] - ends[1]).norm() / ends[0].norm() < 1e-5


def take(name, net, optimizer, step, rank, clip):
    data = [ref.batch(seed=100 * step + 10 * rank + i) for i in range(3)]
    if name == "flat":
        flatlora.flat_lora_step(net, ref.loss_fn, data, optimizer, 0.3, (0, step, rank), clip)
    else:
        flatlora.sam_step(net, ref.loss_fn, data, optimizer, 0.1, name, clip)


def one_rank(rank, folder):
    """What each process of the test below does."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for name in ("flat", "lora", "full"):
        net, exchanges = nn.parallel.DistributedDataParallel(ref.adapted_model()), []
        net.register_comm_hook(exchanges, lambda seen, bucket: seen.append(bucket) or allreduce_hook(None, bucket))
        for step in range(5):
            take(name, net, ref.sgd(net), step, rank, clip=0.2)
        torch.save((flatlora.lora_state_dict(net), len(exchanges)), Path(folder) / f"{name}-{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads can abort a Python that ends in order (pytorch/pytorch#179291)


def test_two_ranks_take_the_step_of_one_process_with_both_noises_and_batches(tmp_path):
    places = os.pathsep.join(str(Path(__file__).parents[up]) for up in (1, 2))  # reference.py, flatlora.py
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), tmp_path], env=environment) for rank in (0, 1)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    for name in ("flat", "lora", "full"):
        model = ref.adapted_model()
        for step in range(5):
            twins = [copy.deepcopy(model), copy.deepcopy(model)]
            for rank, twin in enumerate(twins):  # a learning rate of 0: for the gradient alone
                take(name, twin, ref.sgd(twin, lr=0), step, rank, clip=math.inf)
            for p, one, two in zip(*map(flatlora.lora_parameters, [model, *twins])):
                p.grad = (one.grad + two.grad) / 2
            nn.utils.clip_grad_norm_(flatlora.lora_parameters(model), 0.2)
            ref.sgd(model).step()
        exchanges = 5 * (1 if name == "flat" else 2)  # one per pass, for three micro-batches
        for rank in (0, 1):  # the same names, without DDP's prefix
            saved = torch.load(tmp_path / f"{name}-{rank}.pt")
            torch.testing.assert_close(saved, (flatlora.lora_state_dict(model), exchanges))


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), sys.argv[2])
