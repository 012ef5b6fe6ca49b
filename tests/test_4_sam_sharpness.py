"""To compare with: sharpness-aware minimisation of A and B, and how much noise raises the loss."""

import pytest
import reference as ref
import torch
from torch import nn

from flatlora import LoRALinear, lora_parameters, sam_step, sharpness

# ---- SAM ----


def test_sam_takes_the_gradient_at_the_moved_factors():
    model = ref.adapted_model()
    data = ref.batch()
    first = ref.dense_gradients(model, data)
    norm = ref.norm_of(first)  # over all layers

    moved = ref.adapted_model()
    with torch.no_grad():
        for p, gradient in zip(lora_parameters(moved), first):
            p += 0.3 * gradient / norm
    second = ref.dense_gradients(moved, data)

    sam_step(model, ref.loss_fn, [data], ref.sgd(model, lr=0), rho=0.3)
    torch.testing.assert_close(ref.gradients(model), second)


def test_sam_puts_the_factors_back():
    model = ref.adapted_model()
    optimizer = ref.sgd(model, lr=0)
    start = ref.adapters(model)
    sam_step(model, ref.loss_fn, [ref.batch()], optimizer, rho=0.3)
    ref.assert_same_bits(ref.adapters(model), start)


def test_sam_updates_the_factors_that_it_put_back():
    model = ref.adapted_model()
    optimizer = ref.sgd(model, lr=0.1)
    start = ref.adapters(model)

    sam_step(model, ref.loss_fn, [ref.batch()], optimizer, rho=0.3)

    expected = [p - 0.1 * gradient for p, gradient in zip(start, ref.gradients(model))]
    torch.testing.assert_close(ref.adapters(model), expected)


def test_sam_returns_the_loss_of_the_first_pass():
    model = ref.adapted_model()
    data = ref.batch()
    expected = ref.dense_loss(model, data).item()
    given = sam_step(model, ref.loss_fn, [data], ref.sgd(model), rho=0.3)
    assert given == pytest.approx(expected)


def test_sam_with_rho_zero_is_lora():
    model = ref.adapted_model()
    twin = ref.adapted_model()
    data = ref.batch()

    ref.lora_step(model, ref.loss_fn, [data], ref.sgd(model))
    sam_step(twin, ref.loss_fn, [data], ref.sgd(twin), rho=0)

    torch.testing.assert_close(ref.adapters(twin), ref.adapters(model))


def layer_and_gradient(b_std):
    """A layer with s = 1, and G (m, n), the gradient of the loss by its W'."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(12, 4, bias=False).double(), r=2, alpha=2)
    nn.init.normal_(layer.lora_B, std=b_std)

    x, y = ref.batch()
    weight = ref.merged(layer).detach().requires_grad_()
    loss = nn.functional.cross_entropy(x @ weight.T, y)
    return layer, torch.autograd.grad(loss, weight)[0]


def move_of_w_prime(layer):
    """How far W' lies in the second pass of SAM from where it is in the first."""
    seen = []

    def recording_loss_fn(model, batch):
        seen.append(ref.merged(model).detach())
        return ref.loss_fn(model, batch)

    sam_step(layer, recording_loss_fn, [ref.batch()], ref.sgd(layer, lr=0), rho=0.3)
    return seen[1] - seen[0]


def test_sam_moves_w_prime_by_equation_3():
    layer, G = layer_and_gradient(b_std=0.5)
    A, B = layer.lora_A, layer.lora_B

    c = 0.3 / ref.norm_of([B.T @ G, G @ A.T])
    linear = B @ B.T @ G + G @ A.T @ A
    quadratic = G @ A.T @ B.T @ G
    expected = c * linear + c**2 * quadratic

    torch.testing.assert_close(move_of_w_prime(layer), expected)


def test_sam_moves_w_prime_in_the_rows_of_a_while_b_is_zero():  # eq. 4
    layer, G = layer_and_gradient(b_std=0.0)
    A = layer.lora_A
    c = 0.3 / ref.norm_of([G @ A.T])
    torch.testing.assert_close(move_of_w_prime(layer), c * G @ A.T @ A)


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


def test_sam_stands_still_where_the_gradient_is_zero():
    model = ref.adapted_model()
    start = ref.adapters(model)

    def level_loss_fn(model, batch):
        return 0 * ref.loss_fn(model, batch)

    ref.sam_step(model, level_loss_fn, [ref.batch()], ref.sgd(model))
    ref.assert_same_bits(ref.adapters(model), start)


def test_sam_leaves_an_unused_layer_alone():
    model = ref.adapted_model()
    unused = ref.adapters(model[2])

    def loss_of_the_first_layer(model, batch):
        x, _ = batch
        return model[0](x).square().mean()

    ref.sam_step(model, loss_of_the_first_layer, [ref.batch()], ref.sgd(model))
    ref.assert_same_bits(ref.adapters(model[2]), unused)


def test_sam_on_micro_batches_takes_the_step_of_the_whole_batch():
    model = ref.adapted_model()
    twin = ref.adapted_model()
    data = ref.batch(size=16)

    whole_loss = ref.sam_step(model, ref.loss_fn, [data], ref.sgd(model))
    parts_loss = ref.sam_step(twin, ref.loss_fn, ref.quarters(data), ref.sgd(twin))

    assert parts_loss == pytest.approx(whole_loss)
    torch.testing.assert_close(ref.adapters(twin), ref.adapters(model))


def test_sam_clips():
    model = ref.adapted_model()
    optimizer = ref.sgd(model)
    sam_step(model, ref.loss_fn, [ref.batch()], optimizer, rho=0.3, max_grad_norm=0.01)
    assert ref.norm_of(ref.gradients(model)) == pytest.approx(0.01, rel=1e-3)


# ---- Sharpness ----


def test_sharpness_of_a_quadratic():
    """Noise raises the mean of |W'|^2 by the variances of all entries: the sum of sigma^2 |W'_i|^2 / n."""
    layer = ref.adapted_layer(n=10_000)

    def squared_norm(model, batch):
        return model.weight.square().sum()

    expected = 0.3**2 * ref.merged(layer).square().sum().item()
    given = sharpness(layer, squared_norm, [0], sigma=0.3, samples=20, seed=0)
    assert given == pytest.approx(expected, rel=0.02)


def recorded_sharpness(model, sigma, samples):
    """The sharpness, and in each pass the loss and eps / sigma of the first layer."""
    losses, directions = [], []

    def recording_loss_fn(model, batch):
        losses.append(ref.loss_fn(model, batch))
        directions.append(ref.eps_of(model[0]) / sigma)
        return losses[-1]

    given = sharpness(model, recording_loss_fn, [ref.batch()], sigma, samples, seed=7)
    return given, losses, directions


def test_sharpness_is_the_mean_rise_over_samples():
    given, losses, _ = recorded_sharpness(ref.adapted_model(), sigma=0.3, samples=3)
    clean, one, two, three = [loss.item() for loss in losses]
    assert given == pytest.approx((one + two + three) / 3 - clean)


def test_sharpness_is_the_mean_over_batches():
    model = ref.adapted_model()
    first, second = ref.batch(seed=1), ref.batch(seed=2)
    same = {"sigma": 0.3, "samples": 2, "seed": 7}

    one = sharpness(model, ref.loss_fn, [first], **same)
    two = sharpness(model, ref.loss_fn, [second], **same)
    both = sharpness(model, ref.loss_fn, [first, second], **same)

    assert both == pytest.approx((one + two) / 2)


def test_sharpness_looks_along_the_same_directions_at_each_sigma():
    model = ref.adapted_model()
    _, _, weak = recorded_sharpness(model, sigma=0.1, samples=2)
    _, _, strong = recorded_sharpness(model, sigma=0.3, samples=2)
    torch.testing.assert_close(weak, strong)


def test_sharpness_looks_along_another_direction_in_each_sample():
    _, _, directions = recorded_sharpness(ref.adapted_model(), sigma=0.3, samples=2)
    clean, one, two = directions
    assert not clean.any()
    assert not torch.allclose(one.abs(), two.abs())


def test_sharpness_looks_along_no_direction_of_training():
    model = ref.adapted_model()
    _, _, directions = recorded_sharpness(model, sigma=1.0, samples=1)
    for seed in (7, (7, 0), (0, 7)):
        of_a_step = ref.noise_of(model, sigma=1.0, seed=seed)["0"]
        assert not torch.equal(directions[1], of_a_step)


def test_sharpness_with_sigma_zero_is_zero():
    model = ref.adapted_model()
    given = sharpness(model, ref.loss_fn, [ref.batch()], sigma=0, samples=2, seed=7)
    assert given == 0


def test_sharpness_builds_no_graph():
    _, losses, _ = recorded_sharpness(ref.adapted_model(), sigma=0.3, samples=1)
    clean, noisy = losses
    assert not clean.requires_grad
    assert not noisy.requires_grad
