"""Sharpness is the mean rise of the loss under filter-scaled noise; on a quadratic it is a number we can work out."""

import pytest
import torch
from reference import adapted_mlp, batch, dense_weight, loss_fn, read_eps
from torch import nn

from flatlora import LoRALinear, lora_parameters, perturbed, sharpness


def quadratic():
    """loss = |W'|_F^2, read off the layer: its rise under independent noise has a closed form."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(10, 6, bias=False).double(), r=2, alpha=4)
    nn.init.normal_(layer.lora_B)
    return layer, lambda model, batch: model(torch.eye(10, dtype=torch.float64)).square().sum()


def test_full_space_sharpness_of_a_quadratic():
    layer, loss = quadratic()
    # E|W' + eps|^2 - |W'|^2 = sum of the variances = sum over i, j of sigma^2 |W'_i|^2 / n = sigma^2 |W'|^2.
    expected = 0.3**2 * dense_weight(layer).norm().item() ** 2
    assert sharpness(layer, loss, [None], 0.3, 4000, seed=0) == pytest.approx(expected, rel=0.05)


def test_lora_space_sharpness_of_a_quadratic():
    layer, loss = quadratic()
    W, A, B = (p.detach() for p in (layer.weight, layer.lora_A, layer.lora_B))
    sigma, s = 0.3, 2.0
    # B' = B + b, A' = A + a, independent: W + s B'A' = W' + s (bA + Ba + ba); the three terms are uncorrelated.
    var_a = sigma**2 * A.norm(dim=1) ** 2 / 10  # of each entry of a row of a
    var_b = sigma**2 * B.norm(dim=1) ** 2 / 2  # of each entry of a row of b
    expected = var_b.sum() * A.norm() ** 2 + 10 * (B.norm(dim=0) ** 2 * var_a).sum() + var_b.sum() * 10 * var_a.sum()
    measured = sharpness(layer, loss, [None], sigma, 4000, seed=0, space="lora")
    assert measured == pytest.approx(s**2 * expected.item(), rel=0.05)
    assert torch.equal(layer.weight, W) and torch.equal(layer.lora_A, A)


def test_it_is_the_mean_over_samples_and_batches():
    model, batches = adapted_mlp(), [batch(seed=1), batch(seed=2)]
    by_hand = []
    for sample in range(3):
        for data in batches:
            clean = loss_fn(model, data).item()
            with perturbed(model, 0.2, seed=(7, sample)):
                by_hand.append(loss_fn(model, data).item() - clean)
    assert sharpness(model, loss_fn, batches, 0.2, 3, seed=7) == pytest.approx(sum(by_hand) / 6)


def test_one_seed_gives_the_same_directions_at_every_sigma():  # so a list of sigmas is a landscape
    model = adapted_mlp()
    with perturbed(model, 0.1, seed=3):
        small = read_eps(model)["2"]
    with perturbed(model, 0.3, seed=3):
        torch.testing.assert_close(read_eps(model)["2"], 3 * small)


@pytest.mark.parametrize("space", ["full", "lora"])
def test_it_changes_nothing_and_is_zero_without_noise(space):
    model, data = adapted_mlp(), batch()
    before = [p.detach().clone() for p in lora_parameters(model)]
    first = sharpness(model, loss_fn, [data], 0.2, 3, 0, space)
    assert first == sharpness(model, loss_fn, [data], 0.2, 3, 0, space) != 0
    assert sharpness(model, loss_fn, [data], 0.0, 3, 0, space) == 0
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(lora_parameters(model), before))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sigma": -1}, "sigma must be"),
        ({"samples": 0}, "samples must be an integer >= 1"),
        ({"space": "A"}, "space must be one of full, lora"),
        ({"seed": -1}, "seed must be"),
        ({"batches": []}, "batches must hold"),
    ],
)
def test_bad_arguments(arguments, words):
    good = {"batches": [batch()], "sigma": 0.1, "samples": 1, "seed": 0}
    with pytest.raises(ValueError, match=words):
        sharpness(adapted_mlp(), loss_fn, **{**good, **arguments})
