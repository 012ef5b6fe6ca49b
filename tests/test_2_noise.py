"""The noise: its size, its schedule, what it does to a model, its seed, what it never touches, its statistics."""

import copy
import math
import random

import numpy as np
import pytest
import reference as ref
import torch
from torch import nn

from flatlora import flat_lora_step, inject_lora, lora_parameters, normal_table, perturbed, sigma_at

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


@pytest.mark.parametrize("sigma", [0.05, 2.0])
def test_the_std_of_a_row_is_that_of_eq_7(sigma):
    layer = ref.adapted_model()[0]
    nn.init.constant_(layer.lora_B, 10 * sigma)  # the std follows W', not W
    with perturbed(layer, sigma, seed=0):
        given = layer.noise.scale.abs()  # its sign is random
    torch.testing.assert_close(given, ref.row_std(ref.merged(layer), sigma))


def test_the_schedule_is_a_cosine():
    assert sigma_at(0, 100, sigma=0.2) == 0
    assert sigma_at(25, 100, sigma=0.2) == pytest.approx(0.2 * (1 - math.sqrt(0.5)) / 2)
    assert sigma_at(50, 100, sigma=0.2) == pytest.approx(0.1)
    assert sigma_at(100, 100, sigma=0.2) == pytest.approx(0.2)


# ---- What it does to a model ----


def test_gradients_are_taken_at_w_prime_plus_eps():  # eq. 6
    model, data = ref.adapted_model(), ref.batch()
    model[0].bias.requires_grad_()  # a bias may train, too

    with perturbed(model, sigma=0.3, seed=0):
        loss = ref.loss_fn(model, data)
        torch.testing.assert_close(loss, ref.dense_loss(model, data))
        expected = ref.dense_gradients(model, data)
    loss.backward()  # inside or after the noise

    torch.testing.assert_close(ref.gradients(model), expected)


def test_the_gradient_of_weight_is_that_of_w_prime():
    layer = ref.adapted_model()[0]
    factors = [layer.lora_A, layer.lora_B]
    with perturbed(layer, sigma=0.3, seed=0):
        weight = layer.weight
        dense = ref.merged(layer) + ref.eps_of(layer)

    torch.testing.assert_close(weight, dense)
    given = torch.autograd.grad(weight.square().sum(), factors)
    expected = torch.autograd.grad(dense.square().sum(), factors)
    torch.testing.assert_close(given, expected)


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


def test_the_noise_ends_with_the_context_and_a_copy_is_clean():
    model = ref.adapted_model()
    x, _ = ref.batch()
    clean = model(x)

    with perturbed(model, sigma=0.3, seed=0):
        assert not torch.allclose(model(x), clean)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), clean)

    assert torch.equal(model(x), clean)


# ---- Its seed ----


def test_the_same_seed_gives_the_same_noise():
    first = ref.noise_of(ref.adapted_model(), seed=(0, 5))
    torch.manual_seed(99)
    second = ref.noise_of(ref.adapted_model(), seed=(0, 5))
    ref.assert_same_bits(first, second)


SEEDS = [0, 7, -7, 2**32, 0.5, "a", "b"]
SEEDS += [(1, 2), (2, 1), 12, (1, 2, 0), ((1, 2), 0)]


def test_different_seeds_give_different_noise():
    model = ref.adapted_model()
    seen = set()
    for seed in SEEDS:
        eps = ref.noise_of(model, seed=seed)["0"]
        seen.add(ref.bytes_of(eps.abs()))
    assert len(seen) == len(SEEDS)


@pytest.mark.parametrize("seed", [(np.int64(0), 1), np.array([0, 1]), torch.tensor([0, 1])])
def test_numbers_of_numpy_and_torch_are_seeds(seed):
    model = ref.adapted_model()
    expected = ref.noise_of(model, seed=(0, 1))
    ref.assert_same_bits(ref.noise_of(model, seed=seed), expected)


@pytest.mark.parametrize("seed", [None, math.nan, (0, math.inf), torch.tensor(math.nan)])
def test_none_and_nan_are_not_seeds(seed):
    with pytest.raises(ValueError, match=r"seed|JSON"):
        ref.noise_of(ref.adapted_model(), seed=seed)


def test_adding_a_target_keeps_the_noise_of_other_layers():
    one = inject_lora(ref.plain_model(), targets=["2"])
    both = inject_lora(ref.plain_model(), targets=["0", "2"])
    assert torch.equal(ref.noise_of(one)["2"], ref.noise_of(both)["2"])


# ---- What it never touches ----


def test_a_hundred_steps_leave_the_base_bit_identical():
    model = ref.adapted_model(torch.bfloat16)  # in which adding and subtracting noise would round
    optimizer = ref.sgd(model)
    batches = [ref.batch(dtype=torch.bfloat16)]
    before = ref.base_bytes(model)

    for step in range(100):
        flat_lora_step(model, ref.loss_fn, batches, optimizer, sigma=0.3, seed=step)

    assert ref.base_bytes(model) == before


def test_a_step_uses_no_global_generator():
    normal_table.cache_clear()  # so that this step draws the table
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


def test_a_layer_holds_one_number_per_row():  # and a position in the table, which all layers share
    model = ref.adapted_model()
    with perturbed(model, sigma=0.3, seed=0):
        scale, normals = model[0].noise  # which is all that it holds
        _, normals_of_another = model[2].noise
    assert scale.shape == (16, 1)
    assert ref.storage_address(normals) == ref.storage_address(normals_of_another)


def test_nothing_of_the_size_of_w_is_kept_for_the_backward():
    layer = ref.adapted_layer()
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with perturbed(layer, sigma=0.3, seed=0), torch.autograd.graph.saved_tensors_hooks(keep, keep):
        layer(torch.randn(5, 12, requires_grad=True))

    large = {ref.storage_address(tensor) for tensor in kept if tensor.numel() >= 16 * 12}
    assert large == {ref.storage_address(layer.frozen_weight)}  # W itself, which was there before


# ---- Its statistics; more in guards/test_statistics.py ----


def draws(layer, count):
    """eps under `count` seeds: (count, m, n)."""
    eps = [ref.noise_of(layer, seed=seed)[""] for seed in range(count)]
    return torch.stack(eps)


def test_eps_is_distributed_as_freshly_drawn_noise():
    layer = ref.adapted_layer(m=4, n=500)
    merged = ref.merged(layer)
    std = ref.row_std(merged, sigma=0.3)
    eps = draws(layer, count=500)
    fresh = torch.stack([ref.plain_noise(merged, sigma=0.3) for _ in range(500)])

    error = 5 * math.sqrt(2 * 0.25 / 250_000)  # five standard errors of the difference of two fractions
    for k in (-3, -2, -1, -0.5, 0, 0.5, 1, 2, 3):
        given = (eps < k * std).double().mean(dim=(0, 2))  # (m,), the fraction below k standard deviations
        expected = (fresh < k * std).double().mean(dim=(0, 2))
        torch.testing.assert_close(given, expected, rtol=0, atol=error)


def assert_uncorrelated(samples):
    """Each pair of rows of samples (k, count): a correlation within six standard errors of zero."""
    k, count = samples.shape
    correlation = torch.corrcoef(samples)  # (k, k)
    error = 6 / math.sqrt(count)
    torch.testing.assert_close(correlation, torch.eye(k), rtol=0, atol=error)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["steps", "rows", "columns"])
def test_eps_is_uncorrelated_between(axis):
    layer = ref.adapted_layer(m=100, n=100)
    std = ref.row_std(ref.merged(layer), sigma=0.3)
    samples = (draws(layer, count=100) / std).movedim(axis, 0)
    assert_uncorrelated(samples.flatten(1))


def test_eps_is_uncorrelated_between_layers():
    layers = [nn.Linear(100, 100) for _ in range(5)]
    eps = ref.noise_of(inject_lora(nn.Sequential(*layers), targets=".*"))
    samples = [noise.flatten() for noise in eps.values()]
    assert_uncorrelated(torch.stack(samples))


@pytest.mark.parametrize("n", [20, 200])
@pytest.mark.parametrize("mu", [0.0, 2.0])
@torch.no_grad()
def test_the_variance_of_an_output_grows_by_1_plus_sigma_squared(n, mu):  # proposition 3.2
    layer = ref.adapted_layer(m=30, n=n)
    outputs = []
    for seed in range(300):
        with perturbed(layer, sigma=0.5, seed=seed):
            outputs.append(layer(mu + torch.randn(30, n)))  # (30, m)

    clean = ref.merged(layer).norm(dim=1) ** 2  # (m,), for inputs of variance 1
    growth = torch.cat(outputs).var(dim=0) / clean  # (m,)
    expected = 1 + 0.5**2 + 0.5**2 * mu**2  # the last term comes from the mean of the inputs
    assert growth.mean().item() == pytest.approx(expected, rel=0.02)
