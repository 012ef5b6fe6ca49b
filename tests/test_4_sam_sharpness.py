"""For comparison: sharpness-aware minimisation of A and B, and how much noise raises the loss."""

import math

import pytest
import reference as ref
import torch
from torch import nn

from flatlora import add_lora, lora_parameters, sam_step, sharpness

# ---- SAM ----


def test_sam_takes_the_gradient_at_the_moved_factors():
    model, data = ref.adapted_model(), ref.batch()
    start = ref.adapters(model)
    first_loss = ref.dense_loss(model, data).item()
    first = ref.dense_gradients(model, data)
    norm = ref.norm_of(first)  # over all layers

    moved = ref.adapted_model()
    for p, gradient in zip(lora_parameters(moved), first):
        p.data += 0.3 * gradient / norm
    second = ref.dense_gradients(moved, data)

    ref.loss_fn(model, ref.batch(seed=2)).backward()  # leftover gradients are ignored
    given = sam_step(model, ref.loss_fn, [data], ref.sgd(model, lr=0.1), rho=0.3)

    assert given == pytest.approx(first_loss)
    expected = [p - 0.1 * gradient for p, gradient in zip(start, second)]  # applied to the original A and B
    torch.testing.assert_close(ref.adapters(model), expected)


@pytest.mark.parametrize("b_std", [0.5, 0.0])
def test_sam_moves_w_prime_by_equation_3(b_std):  # while B is zero, by G A^T A only (eq. 4), in the span of A's rows
    torch.manual_seed(0)
    layer = add_lora(nn.Linear(12, 4, bias=False).double(), r=2, alpha=2)  # s = 1
    nn.init.normal_(layer.lora_B, std=b_std)
    A, B = layer.lora_A, layer.lora_B
    seen = []

    def recording_loss_fn(model, batch):
        weight = ref.merged(model)
        weight.retain_grad()
        seen.append(weight)
        x, y = batch
        return nn.functional.cross_entropy(x @ weight.T, y)

    sam_step(layer, recording_loss_fn, [ref.batch()], ref.sgd(layer, lr=0), rho=0.3)

    first, second = seen
    G = first.grad  # (m, n), the gradient of the loss with respect to W'
    c = 0.3 / ref.norm_of([B.T @ G, G @ A.T])
    linear = B @ B.T @ G + G @ A.T @ A
    quadratic = G @ A.T @ B.T @ G
    torch.testing.assert_close(second - first, c * linear + c**2 * quadratic)


def test_sam_puts_the_factors_back_after_ctrl_c():
    model = ref.adapted_model()
    start = ref.adapters(model)
    passes = []

    def interrupted_in_the_second_pass(model, batch):
        passes.append("forward")
        if len(passes) == 2:
            raise KeyboardInterrupt
        return ref.loss_fn(model, batch)

    with pytest.raises(KeyboardInterrupt):
        ref.sam_step(model, interrupted_in_the_second_pass, [ref.batch()], ref.sgd(model))
    ref.assert_same_bits(ref.adapters(model), start)


def test_sam_does_not_move_if_the_gradient_is_zero():
    model = ref.adapted_model()
    start = ref.adapters(model)

    def constant_loss_fn(model, batch):
        x, _ = batch
        return 0 * model[0](x).sum()  # the gradient of the first layer is zero; the second has none

    ref.sam_step(model, constant_loss_fn, [ref.batch()], ref.sgd(model))
    ref.assert_same_bits(ref.adapters(model), start)


def test_sam_clips():
    model = ref.adapted_model()
    sam_step(model, ref.loss_fn, [ref.batch()], ref.sgd(model), rho=0.3, max_grad_norm=0.01)
    assert ref.norm_of(ref.gradients(model)) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("rho", [-0.1, math.inf, math.nan])
def test_rho_must_be_a_finite_number(rho):  # a negative one would lead to the best point nearby
    model = ref.adapted_model()
    with pytest.raises(ValueError, match="rho must be a finite number >= 0"):
        sam_step(model, ref.loss_fn, [ref.batch()], ref.sgd(model), rho)


# ---- Sharpness ----


def test_sharpness_of_a_quadratic():
    """Noise raises the mean of |W'|^2 by the variances of all entries: the sum of sigma^2 |W'_i|^2 / n."""
    layer = ref.adapted_layer(n=10_000)

    def squared_norm(model, batch):
        return model.weight.square().sum()

    expected = 0.3**2 * ref.merged(layer).square().sum().item()
    given = sharpness(layer, squared_norm, [0], sigma=0.3, samples=20, seed=0)
    assert given == pytest.approx(expected, rel=0.02)


def recorded_sharpness(sigma, seed=7):
    """The sharpness over two batches and two samples, and in each pass the loss and the eps of the first layer."""
    losses, noises = [], []

    def recording_loss_fn(model, batch):
        losses.append(ref.loss_fn(model, batch))
        noises.append(ref.eps_of(model[0]))
        return losses[-1]

    batches = [ref.batch(seed=1), ref.batch(seed=2)]
    given = sharpness(ref.adapted_model(), recording_loss_fn, batches, sigma, samples=2, seed=seed)
    return given, torch.stack(losses), noises


def test_sharpness_is_the_mean_rise_over_batches_and_samples():
    given, losses, noises = recorded_sharpness(sigma=0.3)
    clean, noisy = losses[:2], losses[2:]
    assert given == pytest.approx((noisy.mean() - clean.mean()).item())
    assert not noises[0].any()


def test_sharpness_uses_the_same_directions_at_each_sigma():
    _, _, weak = recorded_sharpness(sigma=0.1)
    _, _, strong = recorded_sharpness(sigma=0.3)
    torch.testing.assert_close([3 * eps for eps in weak], strong)


def test_sharpness_uses_new_directions_for_each_sample_and_none_of_those_in_training():
    directions = [ref.noise_of(ref.adapted_model(), seed=seed)["0"] for seed in (7, (7, 0), (0, 7))]
    for seed in (7, 8):
        _, _, noises = recorded_sharpness(sigma=0.3, seed=seed)
        directions += noises[2:]  # of two batches for each of two samples
    different = {ref.bytes_of(eps.abs()) for eps in directions}
    assert len(different) == 3 + 2 + 2


def test_sharpness_builds_no_graph():
    _, losses, _ = recorded_sharpness(sigma=0.3)
    assert not losses.requires_grad


def test_sharpness_of_a_loss_that_is_not_finite_is_an_error():
    def nan_loss_fn(model, batch):
        return ref.loss_fn(model, batch) * math.nan

    with pytest.raises(FloatingPointError, match="the loss is not finite"):
        sharpness(ref.adapted_model(), nan_loss_fn, [ref.batch()], sigma=0.3, samples=1, seed=0)
