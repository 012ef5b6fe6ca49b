"""The baseline, SAM, is its two-pass formula; sharpness is the mean rise of the loss under the noise of eq. 7."""

import math

import pytest
import reference as ref
import torch
from torch import nn

from flatlora import LoRALinear, lora_parameters, sam_step, sharpness


@pytest.mark.parametrize("rho", [0.3, 0.0])  # with 0 it is plain LoRA
@pytest.mark.parametrize("space", ["lora", "full"])
def test_sam_is_the_two_pass_formula_and_restores_every_bit(space, rho):  # "full" is eq. 5, to first order
    model, data = ref.adapted_model(), ref.batch()
    zeros = {name: torch.zeros_like(layer.base.weight).requires_grad_() for name, layer in ref.layers(model).items()}
    clean, before = ref.dense_loss(model, data, zeros), ref.adapters(model)
    gradients = torch.autograd.grad(clean, lora_parameters(model) if space == "lora" else list(zeros.values()))
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))  # over all layers
    moved = ref.adapted_model()
    with torch.no_grad():
        for p, g in zip(lora_parameters(moved) if space == "lora" else zeros.values(), gradients):
            p += rho * g / norm
    at_moved = torch.autograd.grad(ref.dense_loss(moved, data, zeros), lora_parameters(moved))
    assert sam_step(model, ref.loss_fn, [data], ref.sgd(model, lr=0), rho, space) == pytest.approx(clean.item())
    assert all(torch.equal(p, q) for p, q in zip(ref.adapters(model), before))
    torch.testing.assert_close([p.grad for p in lora_parameters(model)], list(at_moved))


@pytest.mark.parametrize("b_std", [0.5, 0.0])
def test_sam_on_the_factors_moves_w_prime_as_equation_3_says_and_while_b_is_small_as_equation_4(b_std):
    torch.manual_seed(0)
    layer, seen = LoRALinear(nn.Linear(192, 4, bias=False).double(), r=2, alpha=2), []  # s = 1
    nn.init.normal_(layer.lora_B, std=b_std)
    A, B, (x, y) = layer.lora_A.detach(), layer.lora_B.detach(), ref.batch()
    weight = ref.dense_weight(layer).detach().requires_grad_()
    G = torch.autograd.grad(nn.functional.cross_entropy(x @ weight.T, y), weight)[0]  # (m, n)
    c = 0.3 / math.sqrt((B.T @ G).norm() ** 2 + (G @ A.T).norm() ** 2)
    expected = c * (B @ B.T @ G + G @ A.T @ A) + c**2 * G @ A.T @ B.T @ G if b_std else c * G @ A.T @ A
    sam_step(layer, lambda m, b: seen.append(m.weight.detach()) or ref.loss_fn(m, b), [(x, y)], ref.sgd(layer), 0.3)
    torch.testing.assert_close(seen[1] - seen[0], expected)
    if not b_std:  # eq. 4: what lies outside of the rows of A is never visited
        assert torch.linalg.matrix_rank(expected) == 2 < torch.linalg.matrix_rank(G)


def test_sharpness_of_a_quadratic_in_both_spaces():
    """For the loss |W'|^2 the rise under independent noise is the sum of the variances of the entries of W'."""
    layer, sigma, s = ref.adapted_model()[0], 0.3, 2.0
    A, B, n, r = layer.lora_A.detach(), layer.lora_B.detach(), 192, 3

    def loss(model, batch):
        return model.weight.square().sum()

    full = sigma**2 * loss(layer, None).item()  # the sum over i and j of sigma^2 |W'_i|^2 / n
    assert sharpness(layer, loss, [0], sigma, 200, seed=0) == pytest.approx(full, rel=0.03)
    # (B + b) (A + a) - B A = b A + B a + b a, three terms that are uncorrelated.
    var_a = sigma**2 * A.norm(dim=1) ** 2 / n  # (r,), of each entry of a row of a
    var_b = sigma**2 * B.norm(dim=1) ** 2 / r  # (m,)
    terms = var_b.sum() * A.norm() ** 2 + n * (B.norm(dim=0) ** 2 * var_a).sum() + n * var_b.sum() * var_a.sum()
    assert sharpness(layer, loss, [0], sigma, 400, seed=0, space="lora") == pytest.approx(s**2 * terms.item(), rel=0.03)


def test_sharpness_is_the_mean_over_samples_and_batches_along_the_same_directions_at_every_sigma():
    model, losses, eps, batches = ref.adapted_model(), [], [], [ref.batch(seed=1), ref.batch(seed=2)]
    before = ref.adapters(model)

    def recording_loss_fn(model, batch):
        eps.append(ref.read_eps(model)["0"])
        losses.append(ref.loss_fn(model, batch))
        return losses[-1]

    given = sharpness(model, recording_loss_fn, batches, 0.3, samples=3, seed=7)
    clean, *noisy = torch.stack(losses).view(4, 2).mean(dim=1).tolist()
    assert len(set(noisy)) == 3 and given == pytest.approx(sum(noisy) / 3 - clean)
    sharpness(model, recording_loss_fn, batches, 0.1, samples=3, seed=7)
    torch.testing.assert_close([3 * e for e in eps[8:]], eps[:8])  # so a list of sigmas is a landscape
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(lora_parameters(model), before))
    assert sharpness(model, ref.loss_fn, batches, 0.0, samples=2, seed=7) == 0
