"""One Flat-LoRA step is one noisy forward and backward; one SAM step is two passes, and equals its formula by hand."""

import math

import pytest
import torch
from reference import adapted_mlp, batch, dense_loss, dense_weight, layers, loss_fn, read_eps, small_mlp
from torch import nn

from flatlora import LoRALinear, flat_lora_step, inject_lora, lora_parameters, perturbed, sam_step


def sgd(model, lr=0.1):
    return torch.optim.SGD(lora_parameters(model), lr=lr)


def clones(tensors):
    return [t.detach().clone() for t in tensors]


# ---- Flat-LoRA (E6) ------------------------------------------------------------------------------------------


def test_the_gradient_at_the_noisy_point_updates_the_clean_factors():  # E6
    model, data = adapted_mlp(), batch()
    with perturbed(model, 0.3, seed=(0, 5)):
        eps = read_eps(model)
    noisy_loss = dense_loss(model, data, eps)
    grads = torch.autograd.grad(noisy_loss, lora_parameters(model))
    expected = [p.detach() - 0.1 * g for p, g in zip(lora_parameters(model), grads)]
    loss = flat_lora_step(model, loss_fn, [data], sgd(model), 0.3, seed=(0, 5))
    assert loss == pytest.approx(noisy_loss.item())
    torch.testing.assert_close(clones(lora_parameters(model)), expected)


def test_micro_batches_equal_one_batch_under_the_same_noise():
    whole, parts = adapted_mlp(), adapted_mlp()
    x, y = batch(16)
    loss = flat_lora_step(whole, loss_fn, [(x, y)], sgd(whole), 0.3, seed=1)
    micro = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 16, 4)]
    assert flat_lora_step(parts, loss_fn, micro, sgd(parts), 0.3, seed=1) == pytest.approx(loss)
    torch.testing.assert_close(clones(lora_parameters(parts)), clones(lora_parameters(whole)))


def test_gradients_do_not_carry_over_from_the_step_before():
    model, data = adapted_mlp(), batch()
    results = []
    for _ in range(2):
        loss = flat_lora_step(model, loss_fn, [data], sgd(model, lr=0), 0.3, seed=1)
        results.append([torch.tensor(loss), *(p.grad.clone() for p in lora_parameters(model))])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_clipping_scales_the_gradient_to_the_given_norm():
    model, data = adapted_mlp(), batch()
    flat_lora_step(model, loss_fn, [data], sgd(model, lr=0), 0.3, seed=1)
    free = torch.cat([p.grad.flatten() for p in lora_parameters(model)])
    flat_lora_step(model, loss_fn, [data], sgd(model, lr=0), 0.3, seed=1, max_grad_norm=0.01)
    clipped = torch.cat([p.grad.flatten() for p in lora_parameters(model)])
    assert free.norm() > 0.02
    torch.testing.assert_close(clipped, free * (0.01 / free.norm()), rtol=1e-3, atol=0)


def test_lora_and_flat_lora_pass_once_and_sam_twice():
    def passes(step):
        forward, backward = [], []

        def counting_loss_fn(model, batch):
            forward.append(1)
            loss = loss_fn(model, batch)
            loss.register_hook(lambda grad: backward.append(1))
            return loss

        model = adapted_mlp()
        step(model, counting_loss_fn, [batch()], sgd(model))
        return len(forward), len(backward)

    assert passes(lambda *a: flat_lora_step(*a, sigma=0, seed=0)) == (1, 1)
    assert passes(lambda *a: flat_lora_step(*a, sigma=0.3, seed=0)) == (1, 1)
    assert passes(lambda *a: sam_step(*a, rho=0.05)) == (2, 2)
    assert passes(lambda *a: sam_step(*a, rho=0.05, space="full")) == (2, 2)


def test_full_fine_tuning_takes_the_same_step_without_noise():
    model, data = small_mlp(), batch()
    grads = torch.autograd.grad(loss_fn(model, data), list(model.parameters()))
    expected = [p.detach() - 0.1 * g for p, g in zip(model.parameters(), grads)]
    flat_lora_step(model, loss_fn, [data], torch.optim.SGD(model.parameters(), lr=0.1), 0, seed=0)
    torch.testing.assert_close(clones(model.parameters()), expected)


# ---- SAM -----------------------------------------------------------------------------------------------------


def test_sam_on_the_factors_is_the_two_pass_formula():
    model, data, rho = adapted_mlp(), batch(), 0.3
    start = clones(lora_parameters(model))
    grads = torch.autograd.grad(loss_fn(model, data), lora_parameters(model))
    norm = math.sqrt(sum(float((g * g).sum()) for g in grads))
    moved = adapted_mlp()
    with torch.no_grad():
        for p, g in zip(lora_parameters(moved), grads):
            p += rho * g / norm
    at_moved = torch.autograd.grad(loss_fn(moved, data), lora_parameters(moved))
    clean_loss = loss_fn(model, data).item()
    assert sam_step(model, loss_fn, [data], sgd(model), rho) == pytest.approx(clean_loss)
    torch.testing.assert_close(clones(lora_parameters(model)), [p - 0.1 * g for p, g in zip(start, at_moved)])
    assert any(not torch.allclose(a, b, rtol=0.01) for a, b in zip(grads, at_moved))  # rho does something


def test_sam_on_the_merged_weight_is_the_two_pass_formula():  # E5
    model, data, rho = adapted_mlp(), batch(), 0.5
    start = clones(lora_parameters(model))
    zero = {name: torch.zeros_like(layer.weight, requires_grad=True) for name, layer in layers(model).items()}
    grads = torch.autograd.grad(dense_loss(model, data, zero), list(zero.values()))  # by W', (m, n) a layer
    norm = math.sqrt(sum(float((g * g).sum()) for g in grads))
    eps = {name: rho * g / norm for name, g in zip(zero, grads)}
    at_moved = torch.autograd.grad(dense_loss(model, data, eps), lora_parameters(model))
    sam_step(model, loss_fn, [data], sgd(model), rho, space="full")
    torch.testing.assert_close(clones(lora_parameters(model)), [p - 0.1 * g for p, g in zip(start, at_moved)])


@pytest.mark.parametrize("space", ["lora", "full"])
def test_sam_restores_the_factors_exactly_and_with_rho_zero_is_lora(space):
    model, data = adapted_mlp(torch.float32), batch(dtype=torch.float32)
    before = clones(lora_parameters(model))
    sam_step(model, loss_fn, [data], sgd(model, lr=0), 0.3, space)
    assert all(torch.equal(p, q) for p, q in zip(lora_parameters(model), before))
    plain = adapted_mlp(torch.float32)
    sam_step(model, loss_fn, [data], sgd(model), 0.0, space)
    flat_lora_step(plain, loss_fn, [data], sgd(plain), 0, seed=0)
    torch.testing.assert_close(clones(lora_parameters(model)), clones(lora_parameters(plain)))


@pytest.mark.parametrize("space", ["lora", "full"])
def test_sam_over_micro_batches_equals_one_batch(space):
    whole, parts = adapted_mlp(), adapted_mlp()
    x, y = batch(16)
    sam_step(whole, loss_fn, [(x, y)], sgd(whole), 0.3, space)
    sam_step(parts, loss_fn, [(x[:8], y[:8]), (x[8:], y[8:])], sgd(parts), 0.3, space)
    torch.testing.assert_close(clones(lora_parameters(parts)), clones(lora_parameters(whole)))


def ascent_of_one_layer(b_std):
    """What sam_step on (A, B) does to the merged weight of one layer, beside G, A and B at the start (s = 1)."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(10, 6, bias=False).double(), r=2, alpha=2)
    nn.init.normal_(layer.lora_B, std=b_std)
    x, y = torch.randn(32, 10, dtype=torch.float64), torch.randint(6, (32,))
    weight = dense_weight(layer).detach().requires_grad_()
    G = torch.autograd.grad(nn.functional.cross_entropy(x @ weight.T, y), weight)[0]  # (m, n)
    A, B = clones([layer.lora_A, layer.lora_B])
    seen = []

    def recording_loss_fn(model, batch):
        seen.append(dense_weight(model).detach())
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    sam_step(layer, recording_loss_fn, [(x, y)], sgd(layer), rho=0.05)
    return seen[1] - seen[0], G, A, B


def test_sam_on_the_factors_moves_the_full_weight_as_equation_3_says():  # E3
    delta, G, A, B = ascent_of_one_layer(b_std=0.5)
    c = 0.05 / math.sqrt((B.T @ G).norm() ** 2 + (G @ A.T).norm() ** 2)
    torch.testing.assert_close(delta, c * (B @ B.T @ G + G @ A.T @ A) + c**2 * G @ A.T @ B.T @ G)


def test_while_b_is_small_sam_on_the_factors_explores_the_rows_of_a_only():  # E4
    delta, G, A, _ = ascent_of_one_layer(b_std=0.0)
    c = 0.05 / (G @ A.T).norm()
    torch.testing.assert_close(delta, c * G @ A.T @ A)
    basis = torch.linalg.qr(A.T)[0]  # (n, r): what lies outside of the rows of A is never visited
    torch.testing.assert_close(delta @ basis @ basis.T, delta)
    assert torch.linalg.matrix_rank(delta) <= 2 < torch.linalg.matrix_rank(G)


# ---- Bad input -----------------------------------------------------------------------------------------------

STEPS = {
    "flat": lambda *a, **k: flat_lora_step(*a, sigma=0.1, seed=0, **k),
    "sam": lambda *a, **k: sam_step(*a, rho=0.05, **k),
    "sam-full": lambda *a, **k: sam_step(*a, rho=0.05, space="full", **k),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_raises_before_the_update(step, value):
    model = adapted_mlp()
    before = clones(lora_parameters(model))
    with pytest.raises(FloatingPointError, match="the loss is not finite"):
        step(model, lambda m, b: loss_fn(m, b) + value, [batch()], sgd(model))
    assert all(torch.equal(p, q) for p, q in zip(lora_parameters(model), before))


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_gradient_that_is_not_finite_raises_before_the_update(step):
    model = adapted_mlp()
    before = clones(lora_parameters(model))

    def bad_loss_fn(model, batch):
        loss = loss_fn(model, batch)
        loss.register_hook(lambda grad: grad * float("inf"))
        return loss

    with pytest.raises(FloatingPointError, match="not finite"):
        step(model, bad_loss_fn, [batch()], sgd(model))
    assert all(torch.equal(p, q) for p, q in zip(lora_parameters(model), before))


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_no_batch_is_an_error(step):
    model = adapted_mlp()
    with pytest.raises(ValueError, match="batches must hold at least one"):
        step(model, loss_fn, [], sgd(model))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rho": -1}, "rho must be a finite number >= 0"),
        ({"rho": float("nan")}, "rho must be"),
        ({"rho": 0.1, "space": "merged"}, "space must be one of lora, full, got 'merged'"),
    ],
)
def test_bad_sam_arguments(arguments, words):
    model = adapted_mlp()
    with pytest.raises(ValueError, match=words):
        sam_step(model, loss_fn, [batch()], sgd(model), **arguments)
    with pytest.raises(ValueError, match="inject_lora first"):
        sam_step(small_mlp(), loss_fn, [batch()], sgd(model), rho=0.1)


def test_a_layer_that_the_loss_does_not_use_is_left_alone():
    model = inject_lora(nn.ModuleDict({"used": nn.Linear(8, 4), "unused": nn.Linear(8, 4)}), r=2)
    data = batch(dtype=torch.float32)
    optimizer = sgd(model)
    unused = clones([model["unused"].lora_A, model["unused"].lora_B])
    used = model["used"].lora_B.detach().clone()
    for space in ("lora", "full"):
        sam_step(model, lambda m, b: nn.functional.cross_entropy(m["used"](b[0]), b[1]), [data], optimizer, 0.1, space)
    assert torch.equal(model["unused"].lora_A, unused[0]) and torch.equal(model["unused"].lora_B, unused[1])
    assert not torch.equal(model["used"].lora_B, used)
