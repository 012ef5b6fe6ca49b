"""The noise: its size, its schedule, what it does to a model, its seed, what it never touches, its statistics."""

import copy
import math
import random

import numpy as np
import pytest
import reference as ref
import torch
from torch import nn

from flatlora import (
    filter_std,
    flat_lora_step,
    inject_lora,
    lora_parameters,
    perturbed,
    sigma_at,
)

# ---- Its size ----


@pytest.mark.parametrize("n", [2_500, 10_000])
@torch.no_grad()
def test_each_row_moves_by_sigma_of_its_norm(n):  # eq. 7
    layer = ref.adapted_layer(m=8, n=n)
    clean = layer.weight

    with perturbed(layer, sigma=0.3, seed=0):
        moved = layer.weight - clean

    ratio = moved.norm(dim=1) / clean.norm(dim=1)  # (m,)
    error = 5 / math.sqrt(2 * n)  # five standard errors of the norm of n normals
    torch.testing.assert_close(ratio, torch.full((8,), 0.3), rtol=error, atol=0)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 2.0])
def test_the_std_of_a_row_is_that_of_eq_7(sigma):
    """The noise of row i has the standard deviation sigma |W'_i| / sqrt(n). (eps is signed_std * normals.)"""
    layer = ref.adapted_model()[0]
    with perturbed(layer, sigma, seed=0):
        given = layer.noise.signed_std.abs()  # the sign is drawn, too

    expected = []
    for row in ref.merged(layer):
        expected.append(sigma * row.norm() / math.sqrt(len(row)))
    torch.testing.assert_close(given.flatten(), torch.stack(expected))


def test_filter_std_is_eq_7():
    weight = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(filter_std(weight, 0.3), ref.row_std(weight, 0.3))


def test_the_std_follows_training():
    layer = ref.adapted_model()[0]
    for b in (1.0, 2.0):
        nn.init.constant_(layer.lora_B, b)
        with perturbed(layer, sigma=0.3, seed=0):
            given = layer.noise.signed_std.abs()
        torch.testing.assert_close(given, ref.row_std(ref.merged(layer), 0.3))


def test_the_cosine_schedule():
    assert sigma_at(0, 100, sigma=0.2) == 0
    assert sigma_at(50, 100, sigma=0.2) == pytest.approx(0.1)
    assert sigma_at(100, 100, sigma=0.2) == pytest.approx(0.2)
    quarter = (1 - math.cos(math.pi / 4)) / 2
    assert sigma_at(25, 100, sigma=0.2) == pytest.approx(0.2 * quarter)


def test_the_constant_schedule():
    for step in (0, 50, 99):
        assert sigma_at(step, 100, sigma=0.2, schedule="constant") == 0.2


# ---- What it does to a model ----


@torch.no_grad()
def test_the_layer_computes_with_w_prime_plus_eps():
    layer = ref.adapted_model()[0]
    x, _ = ref.batch()
    with perturbed(layer, sigma=0.3, seed=0):
        eps = layer.noise.signed_std * layer.noise.normals
        out = layer(x)
    torch.testing.assert_close(out, x @ (ref.merged(layer) + eps).T + layer.base.bias)


@torch.no_grad()
def test_weight_is_w_prime_plus_eps():
    layer = ref.adapted_model()[0]
    with perturbed(layer, sigma=0.3, seed=0):
        eps = layer.noise.signed_std * layer.noise.normals
        weight = layer.weight
    torch.testing.assert_close(weight, ref.merged(layer) + eps)


def test_gradients_are_taken_at_w_prime_plus_eps():  # eq. 6
    model, data = ref.adapted_model(), ref.batch()
    with perturbed(model, sigma=0.3, seed=0):
        ref.loss_fn(model, data).backward()
        expected = ref.dense_gradients(model, data)
    torch.testing.assert_close(ref.gradients(model), expected)


def test_a_later_backward_is_right_too():
    model, data = ref.adapted_model(), ref.batch()
    with perturbed(model, sigma=0.3, seed=0):
        loss = ref.loss_fn(model, data)
        expected = ref.dense_gradients(model, data)
    loss.backward()  # after the noise
    torch.testing.assert_close(ref.gradients(model), expected)


def test_the_gradient_of_weight_is_that_of_w_prime():
    layer = ref.adapted_model()[0]
    factors = [layer.lora_A, layer.lora_B]
    with perturbed(layer, sigma=0.3, seed=0):
        given = torch.autograd.grad(layer.weight.square().sum(), factors)
        dense = ref.merged(layer) + ref.eps_of(layer)
    torch.testing.assert_close(given, torch.autograd.grad(dense.square().sum(), factors))


def test_a_gradient_penalty_is_that_of_the_dense_formula():  # the gradient of a gradient
    model, (x, y) = ref.adapted_model(), ref.batch()
    x.requires_grad_()

    def penalty(loss):
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), lora_parameters(model))

    with perturbed(model, sigma=0.3, seed=0):
        given = penalty(ref.loss_fn(model, (x, y)))
        expected = penalty(ref.dense_loss(model, (x, y)))
    torch.testing.assert_close(given, expected)


def test_a_copy_is_clean():
    model = ref.adapted_model()
    x, _ = ref.batch()
    clean = model(x)
    with perturbed(model, sigma=0.3, seed=0):
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), clean)


def test_the_noise_ends_with_the_context():
    model = ref.adapted_model()
    x, _ = ref.batch()
    clean = model(x)
    with perturbed(model, sigma=0.3, seed=0):
        assert not torch.allclose(model(x), clean)
    assert torch.equal(model(x), clean)


# ---- Its seed ----


def test_the_same_seed_gives_the_same_noise():
    first = ref.noise_of(ref.adapted_model(), seed=(0, 5))
    torch.manual_seed(99)
    second = ref.noise_of(ref.adapted_model(), seed=(0, 5))
    assert torch.equal(first["0"], second["0"])
    assert torch.equal(first["2"], second["2"])


SEEDS = [0, 7, -7, 2**32, 0.5, "a", "b"]
SEEDS += [(7, 0), (0, 7), (1, 2), 12, (1, 2, 0), ((1, 2), 0)]


def test_different_seeds_give_different_noise():
    model = ref.adapted_model()
    seen = set()
    for seed in SEEDS:
        eps = ref.noise_of(model, seed=seed)["0"]
        seen.add(ref.bytes_of(eps.abs()))
    assert len(seen) == len(SEEDS)


@pytest.mark.parametrize("seed", [[0, 1], (0.0, True), np.array([0, 1]), torch.tensor([0, 1])])
def test_equal_numbers_are_equal_seeds(seed):
    model = ref.adapted_model()
    given = ref.noise_of(model, seed=seed)
    expected = ref.noise_of(model, seed=(0, 1))
    assert torch.equal(given["0"], expected["0"])


def test_another_target_changes_no_other_noise():
    one = inject_lora(ref.plain_model(), targets=["2"])
    both = inject_lora(ref.plain_model(), targets=["0", "2"])
    assert torch.equal(ref.noise_of(one)["2"], ref.noise_of(both)["2"])


def test_another_width_changes_no_other_noise():
    last = nn.Linear(8, 4)
    narrow = inject_lora(nn.Sequential(nn.Linear(12, 8), copy.deepcopy(last)))
    wide = inject_lora(nn.Sequential(nn.Linear(500, 8), copy.deepcopy(last)))
    assert torch.equal(ref.noise_of(narrow)["1"], ref.noise_of(wide)["1"])


# ---- What it never touches ----


def test_a_hundred_steps_write_no_bit_of_the_base():
    model = ref.adapted_model(torch.bfloat16)  # in which to add and subtract noise would round
    optimizer = ref.sgd(model)
    batches = [ref.batch(dtype=torch.bfloat16)]
    before = ref.base_bytes(model)

    for step in range(100):
        flat_lora_step(model, ref.loss_fn, batches, optimizer, sigma=0.3, seed=step)

    assert ref.base_bytes(model) == before


def test_a_step_uses_no_global_generator():
    model = ref.adapted_model()
    of_torch = torch.get_rng_state()
    of_python = random.getstate()
    of_numpy = str(np.random.get_state())

    ref.flat_step(model, ref.loss_fn, [ref.batch()], ref.sgd(model))

    assert torch.equal(torch.get_rng_state(), of_torch)
    assert random.getstate() == of_python
    assert str(np.random.get_state()) == of_numpy


def test_ctrl_c_leaves_nothing_behind():
    model = ref.adapted_model()
    x, y = ref.batch()
    clean = model(x)

    def interrupted(model, batch):
        model(x)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ref.flat_step(model, interrupted, [(x, y)], ref.sgd(model))

    assert torch.equal(model(x), clean)


def test_a_layer_holds_one_number_per_row():  # and a place in the table, which all layers share
    model = ref.adapted_model()
    with perturbed(model, sigma=0.3, seed=0):
        signed_std, normals = model[0].noise  # which is all that it holds
        _, normals_of_another = model[2].noise
    assert signed_std.shape == (16, 1)
    assert ref.memory_of(normals) == ref.memory_of(normals_of_another)


def test_nothing_of_the_size_of_w_is_kept_for_the_backward():
    layer = ref.adapted_model()[0]
    x, _ = ref.batch(size=5)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with perturbed(layer, sigma=0.3, seed=0), torch.autograd.graph.saved_tensors_hooks(keep, keep):
        layer(x.requires_grad_())
        own = {ref.memory_of(layer.base.weight), ref.memory_of(layer.noise.normals)}

    large = {ref.memory_of(tensor) for tensor in kept if tensor.numel() >= 16 * 12}
    assert large == own  # W and the table, which were there before


# ---- Its statistics; more in guards/test_statistics.py ----


@torch.no_grad()
def many_draws(m, n, count):
    """eps / std, which is N(0, 1), of a layer under `count` seeds: (count, m, n)."""
    layer = ref.adapted_layer(m, n)
    draws = []
    for seed in range(count):
        with perturbed(layer, sigma=0.3, seed=seed):
            std = layer.noise.signed_std.abs()
            draws.append(ref.eps_of(layer) / std)
    return torch.stack(draws)


def test_mean_and_variance():
    z = many_draws(m=50, n=50, count=400)  # a million numbers
    assert z.mean().item() == pytest.approx(0, abs=5 / 1000)
    assert z.var().item() == pytest.approx(1, abs=5 * math.sqrt(2) / 1000)


def assert_uncorrelated(lines):
    """The lines (k, count): each pair within six standard errors of zero."""
    k, count = lines.shape
    correlation = torch.corrcoef(lines)  # (k, k)
    torch.testing.assert_close(correlation, torch.eye(k), rtol=0, atol=6 / math.sqrt(count))


def test_rows_are_uncorrelated():
    z = many_draws(m=20, n=50, count=400)
    assert_uncorrelated(z.transpose(0, 1).reshape(20, -1))


def test_numbers_of_a_row_are_uncorrelated():
    z = many_draws(m=50, n=20, count=400)
    assert_uncorrelated(z.reshape(-1, 20).T)


def test_steps_are_uncorrelated():
    z = many_draws(m=100, n=100, count=5)
    assert_uncorrelated(z.flatten(1))


def test_layers_are_uncorrelated():
    layers = [nn.Linear(100, 100) for _ in range(5)]
    eps = ref.noise_of(inject_lora(nn.Sequential(*layers)))
    lines = [noise.flatten() for noise in eps.values()]
    assert_uncorrelated(torch.stack(lines))


@pytest.mark.parametrize("n", [20, 200])
@torch.no_grad()
def test_the_variance_of_an_output_grows_by_1_plus_sigma_squared(n):  # proposition 3.2, for inputs of mean zero
    layer = ref.adapted_layer(m=30, n=n)
    outputs = []
    for seed in range(300):
        with perturbed(layer, sigma=0.5, seed=seed):
            outputs.append(layer(torch.randn(30, n)))  # (30, m)

    clean = ref.merged(layer).norm(dim=1) ** 2  # (m,), of inputs of variance 1
    growth = torch.cat(outputs).var(dim=0) / clean  # (m,)
    assert growth.mean().item() == pytest.approx(1 + 0.5**2, rel=0.02)
