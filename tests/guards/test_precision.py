"""Half precision, autocast, devices, odd and large shapes."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from torch import nn

import flatlora
from flatlora import add_lora, draw_noise, inject_lora, lora_parameters, perturbed

HALVES = [torch.bfloat16, torch.float16]
STEPS = [ref.lora_step, ref.flat_step, ref.sam_step]


def gradients(out, wrt):
    return torch.autograd.grad(out.square().sum(), wrt)


# ---- Half precision ------------------------------------------------------------------------------------------


def half_layer(dtype):
    """48 inputs, 64 outputs. W is in half precision, A and B are float32."""
    layer = add_lora(nn.Linear(48, 64, dtype=dtype), r=2)
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def assert_rounded_once(given, exact):
    """One rounding changes a number by at most half the spacing; 1e-6 allows for the float32 sum before it."""
    spacing = torch.finfo(given.dtype).eps * 2 ** exact.abs().log2().floor()
    error = (given.double() - exact).abs()
    assert (error <= 0.501 * spacing + 1e-6).all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_weight_and_the_merged_weight_are_rounded_once(dtype, autocast):
    layer = half_layer(dtype)
    exact = ref.merged(copy.deepcopy(layer).double())
    with torch.autocast("cpu", dtype, enabled=autocast):
        with perturbed(layer, 0.3, seed=0):
            noisy = layer.weight
            eps = layer.noise.scale.double() * layer.noise.normals.double()
        merged = flatlora.merge_lora(layer).weight
    assert noisy.dtype == merged.dtype == dtype
    assert_rounded_once(noisy, exact + eps)
    assert_rounded_once(merged, exact)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_output_of_the_adapter_is_rounded_once(dtype):
    layer = half_layer(dtype)
    nn.init.zeros_(layer.frozen_weight)
    nn.init.zeros_(layer.bias)
    x = torch.randn(5, 48, dtype=dtype)
    exact = x.double() @ ref.merged(copy.deepcopy(layer).double()).T
    assert_rounded_once(layer(x), exact)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_noise_is_in_the_dtype_of_w_and_its_norms_are_taken_in_float32(dtype):
    layer = half_layer(dtype)
    with perturbed(layer, 0.3, seed=0):
        assert layer.noise.scale.dtype == layer.noise.normals.dtype == dtype

    W = torch.randn(64, 1000).to(dtype)
    expected = ref.row_std(W.double(), 1.0)
    assert torch.equal(flatlora.row_std(W, 1.0), expected.to(dtype))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_are_within_the_rounding_of_the_dense_ones(dtype, autocast):
    layer = half_layer(torch.float32 if autocast else dtype)
    exact = copy.deepcopy(layer).double()
    exact_x = torch.randn(32, 48, dtype=torch.float64, requires_grad=True)
    x = exact_x.to(layer.frozen_weight.dtype)

    with perturbed(layer, 0.3, seed=0):
        eps = ref.eps_of(layer).double()
        with torch.autocast("cpu", dtype, enabled=autocast):
            out = layer(x)
    dense = F.linear(exact_x, ref.merged(exact) + eps, exact.bias)

    assert out.dtype == dtype
    given = [out, *gradients(out.float(), [exact_x, *lora_parameters(layer)])]
    expected = [dense, *gradients(dense, [exact_x, *lora_parameters(exact)])]
    tolerance = 8 * torch.finfo(dtype).eps
    for one, other in zip(given, expected):
        assert (one - other).norm() < tolerance * other.norm()


@pytest.mark.parametrize(("sigma", "fraction"), [(0.01, 0.82), (0.001, 0.22)])
def test_in_bfloat16_a_small_sigma_is_partly_rounded_away(sigma, fraction):
    torch.manual_seed(0)
    W = torch.randn(256, 1024).bfloat16()
    noisy = draw_noise(W, sigma, seed=0).added_to(W)
    moved = (noisy != W).double().mean()
    assert moved == pytest.approx(fraction, abs=0.02)


# ---- Autocast ------------------------------------------------------------------------------------------------


def losses_of_three_steps(step, around, device):
    """Each step's loss and the sharpness after it, with autocast around the loop or inside the loss."""

    def autocast_loss_fn(model, batch):
        with torch.autocast(device, torch.bfloat16):
            return ref.loss_fn(model, batch)

    model = ref.adapted_model(torch.float32, device)
    optimizer = ref.sgd(model, lr=0.5)
    batches = [ref.batch(dtype=torch.float32, device=device)]
    losses = []
    outer = torch.autocast(device, torch.bfloat16) if around else nullcontext()  # it keeps casts of A and B
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


# ---- Shapes --------------------------------------------------------------------------------------------------

SHAPES = [(3, 1), (300,), (0, 7), (2, 3, 4, 7)]  # of x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("m", [1, 5])
def test_odd_shapes(shape, m):
    layer = ref.adapted_layer(m, n=shape[-1]).double()
    layer.bias.requires_grad_()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with perturbed(layer, 0.3, seed=0):
        out = layer(x)
        dense = F.linear(x, ref.merged(layer) + ref.eps_of(layer), layer.bias)

    torch.testing.assert_close(out, dense)
    wrt = [x, *lora_parameters(layer)]
    torch.testing.assert_close(gradients(out, wrt), gradients(dense, wrt))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("device", ref.DEVICES)
def test_steps_leave_a_million_weights_bit_identical(dtype, device):
    layer = nn.Linear(1024, 1024, device=device, dtype=dtype)
    model = ref.with_nonzero_B(inject_lora(nn.Sequential(layer), r=2, targets=["0"]))
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


# ---- Devices and modes ---------------------------------------------------------------------------------------


def in_another_thread(model):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(ref.noise_of, model).result()


@torch.inference_mode()
def in_inference_mode(model):
    return ref.noise_of(model)


def with_another_default_dtype(model):
    torch.set_default_dtype(torch.bfloat16)
    try:
        return ref.noise_of(model)
    finally:
        torch.set_default_dtype(torch.float32)


def with_another_default_device(model):
    with torch.device("meta"):
        return ref.noise_of(model)


PLACES = [in_another_thread, in_inference_mode, with_another_default_dtype, with_another_default_device]


@pytest.mark.parametrize("device", ref.DEVICES)
@pytest.mark.parametrize("place", PLACES)
def test_the_noise_does_not_depend_on_where_it_is_first_drawn(place, device):
    model = ref.adapted_model()
    expected = ref.noise_of(model)

    flatlora.normal_table.cache_clear()  # as in another process
    of_torch = torch.get_rng_state()
    given = place(model.to(device))

    for name, eps in given.items():
        torch.testing.assert_close(eps.cpu(), expected[name])
    assert torch.equal(torch.get_rng_state(), of_torch)
    batches = [ref.batch(device=device)]
    ref.flat_step(model, ref.loss_fn, batches, ref.sgd(model))  # the table made there can be used in training


def test_ctrl_c_while_the_noise_is_drawn_leaves_nothing_behind(monkeypatch):
    model = ref.adapted_model()
    draw, drawn = flatlora.draw_noise, []

    def interrupted_draw(*arguments):
        if drawn:  # the second layer
            raise KeyboardInterrupt
        drawn.append(1)
        return draw(*arguments)

    monkeypatch.setattr(flatlora, "draw_noise", interrupted_draw)
    with pytest.raises(KeyboardInterrupt), perturbed(model, 0.3, seed=0):
        pass
    assert drawn
    assert model[0].noise is None
