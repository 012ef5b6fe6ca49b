"""The noise follows E7, comes from a seed of its own, is never stored, and never reaches the frozen weights."""

import copy
import math

import pytest
import torch
from reference import DEVICES, adapted_mlp, batch, dense_loss, dense_weight, frozen_bytes, loss_fn, read_eps
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from flatlora import (
    LoRALinear,
    filter_std,
    flat_lora_step,
    inject_lora,
    lora_parameters,
    perturbed,
    sam_step,
    sharpness,
    sigma_at,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def noise(model, sigma=0.3, seed=0):
    with perturbed(model, sigma, seed):
        return read_eps(model)


# ---- The law (E7, E9, schedule) ------------------------------------------------------------------------------


def test_filter_std_is_sigma_times_the_row_norm_over_root_n():  # E7
    weight = torch.randn(3, 50)
    for row, std in zip(weight.tolist(), filter_std(weight, 0.2)[:, 0].tolist()):
        assert std == pytest.approx(0.2 * math.sqrt(sum(w * w for w in row)) / math.sqrt(50))


def test_filter_std_of_half_precision_is_computed_in_float32():
    weight = torch.randn(4, 4096).bfloat16()
    expected = 0.1 * weight.double().norm(dim=1, keepdim=True) / 64
    assert filter_std(weight, 0.1).dtype == torch.float32
    torch.testing.assert_close(filter_std(weight, 0.1).double(), expected, rtol=1e-5, atol=0)


def test_each_row_of_the_noise_has_the_std_of_the_merged_row():  # E7, from W' and not from W
    model = adapted_mlp()
    samples = [noise(model, 0.3, seed)["0"] for seed in range(2000)]
    measured = torch.stack(samples).transpose(0, 1).flatten(1)  # (m, draws * n)
    merged = dense_weight(model[0]).detach()
    expected = 0.3 * merged.norm(dim=1) / 8**0.5
    # 16,000 draws a row: the relative standard error of a std is 1 / sqrt(2 * 16000) = 0.56 %.
    torch.testing.assert_close(measured.std(dim=1), expected, rtol=0.025, atol=0)
    assert (measured.mean(dim=1).abs() < 4 * expected / 16000**0.5).all()
    from_base = 0.3 * model[0].weight.norm(dim=1) / 8**0.5
    assert ((from_base / expected - 1).abs() > 0.1).all()  # so the comparison could tell W from W'


def test_another_law_gives_the_stds_and_its_negative_the_mirrored_noise():
    model = adapted_mlp()
    with perturbed(model, 0.3, 5):
        eps = read_eps(model)
    for sign in (2, -1):
        with perturbed(model, 0.3, 5, law=lambda layer, sigma: sign * filter_std(dense_weight(layer), sigma)):  # noqa: B023
            for name, other in read_eps(model).items():
                torch.testing.assert_close(other, sign * eps[name])


def test_the_expected_relative_change_of_a_row_is_sigma():  # what filter scaling is for
    model = adapted_mlp()
    ratio = torch.stack([noise(model, 0.3, s)["2"].norm(dim=1) ** 2 for s in range(1000)]).mean(0)
    torch.testing.assert_close(
        ratio.sqrt() / dense_weight(model[2]).detach().norm(dim=1), torch.full((8,), 0.3).double(), rtol=0.05, atol=0
    )


@pytest.mark.parametrize("n", [16, 256])
@pytest.mark.parametrize("mean", [0.0, 1.5])
def test_activation_variance_grows_by_one_plus_sigma_squared_whatever_n(n, mean):  # E9, proposition 3.2
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(n, 32, bias=False), r=2)
    nn.init.normal_(layer.lora_B, std=0.1)
    sigma, outputs = 0.5, []
    with torch.no_grad():
        for seed in range(500):
            with perturbed(layer, sigma, seed):
                outputs.append(layer(torch.randn(32, n) + mean))
        square = dense_weight(layer).norm(dim=1) ** 2
    expected = (1 + sigma**2) * square + sigma**2 * square * mean**2
    # Averaged over the 32 rows, each with 500 draws of its noise: standard error about 1 %.
    assert (torch.cat(outputs).var(dim=0) / expected).mean() == pytest.approx(1, abs=0.03)


def test_a_million_draws_are_normal():  # a layer of this size takes its normals from the table
    layer = LoRALinear(nn.Linear(1000, 1000, bias=False), r=1)
    z = (noise(layer, sigma=1.0)[""] / filter_std(layer.weight, 1.0)).double().flatten()
    assert z.mean().abs() < 4e-3 and (z.var() - 1).abs() < 4 * (2e-6) ** 0.5  # 4 standard errors, here and below
    assert (z**3).mean().abs() < 4 * (15e-6) ** 0.5 and ((z**4).mean() - 3).abs() < 4 * (96e-6) ** 0.5
    distribution = torch.special.ndtr(z.sort().values)
    steps = torch.arange(1, 10**6 + 1, dtype=torch.float64) / 10**6
    distance = torch.maximum((distribution - steps).abs(), (distribution - steps + 1e-6).abs()).max()
    assert distance < 1.95e-3  # Kolmogorov-Smirnov at p = 0.001
    for k in (2.0, 3.0, 4.0):  # both tails
        expected = 10**6 * math.erfc(k / 2**0.5) / 2
        for tail in (z > k, z < -k):
            assert abs(tail.sum() - expected) < 4 * expected**0.5
    square = z.view(1000, 1000)
    for lines in (square, square.T, square.abs(), square.T.abs()):  # any two rows, any two columns, and their sizes
        assert (torch.corrcoef(lines) - torch.eye(1000)).abs().max() < 6 / 1000**0.5


def test_schedules():  # S: from 0 at the first step towards sigma at the last
    assert [sigma_at(t, 4, 0.2) for t in range(5)] == pytest.approx([0, 0.2 * 0.1464466, 0.1, 0.2 * 0.8535534, 0.2])
    assert [sigma_at(t, 4, 0.2, "linear") for t in range(5)] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert [sigma_at(t, 4, 0.2, "constant") for t in range(5)] == pytest.approx([0.2] * 5)
    assert sigma_at(0, 1, 0.2) == 0


# ---- 1. The frozen weights are never written -----------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_base_is_bit_identical_after_a_thousand_steps(dtype, device):
    model = adapted_mlp(dtype, device, r=2)
    data, before = batch(4, dtype, device), frozen_bytes(model)
    start = [p.detach().clone() for p in lora_parameters(model)]
    optimizer = torch.optim.SGD(lora_parameters(model), lr=1e-3)
    for step in range(1000):
        flat_lora_step(model, loss_fn, [data], optimizer, 0.2, seed=step)
    for space in ("lora", "full"):
        sam_step(model, loss_fn, [data], optimizer, 0.05, space)
        sharpness(model, loss_fn, [data], 0.2, 1, 0, space)
    assert frozen_bytes(model) == before
    assert not any(torch.equal(p, old) for p, old in zip(lora_parameters(model), start))  # it did train


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exception_in_the_loss_leaves_nothing_behind(dtype, error):
    model = adapted_mlp(dtype)
    data, before, clean = batch(4, dtype), frozen_bytes(model), model(batch(4, dtype)[0])
    adapters = [p.detach().clone() for p in lora_parameters(model)]
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    calls = 0

    def failing_loss_fn(model, batch):
        nonlocal calls
        calls += 1
        if calls % 2 == 0:  # in SAM the second pass, at the moved point
            raise error
        return loss_fn(model, batch)

    steps = [
        lambda: flat_lora_step(model, failing_loss_fn, [data, data], optimizer, 0.2, 0),
        lambda: sam_step(model, failing_loss_fn, [data], optimizer, 0.05, "lora"),
        lambda: sam_step(model, failing_loss_fn, [data], optimizer, 0.05, "full"),
        lambda: sharpness(model, failing_loss_fn, [data], 0.2, 1, 0, "full"),
        lambda: sharpness(model, failing_loss_fn, [data], 0.2, 1, 0, "lora"),
    ]
    for step in steps:
        with pytest.raises(error):
            step()
        assert frozen_bytes(model) == before
        assert all(torch.equal(p, old) for p, old in zip(lora_parameters(model), adapters))
        assert torch.equal(model(data[0]), clean)


# ---- 2. Nothing of size (m, n) is stored ---------------------------------------------------------------------


def test_between_forward_and_backward_the_noise_costs_m_numbers_a_layer():
    def saved(sigma):
        model = inject_lora(nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)), r=2)
        own = {p.data_ptr() for p in model.parameters()}
        sizes = []

        def pack(tensor):
            if tensor.data_ptr() not in own:
                sizes.append(tensor.numel())
            return tensor

        x = torch.randn(5, 64, requires_grad=True)
        with saved_tensors_hooks(pack, lambda tensor: tensor), perturbed(model, sigma, 0):
            model(x)
        return sorted(sizes)

    plain, noisy = saved(0.0), saved(0.1)
    for m in (48, 32):
        assert noisy.count(m) == plain.count(m) + 1  # std, (m, 1)
        noisy.remove(m)
    assert noisy == plain and max(noisy) < 48 * 32


# ---- 3. Private randomness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_the_global_generators_do_not_notice_the_noise(device):
    def states():
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device == "cuda" else [])]

    after = {}
    for sigma in (0.0, 0.2):
        torch.manual_seed(5)
        model = adapted_mlp(device=device, dropout=0.3)  # dropout draws from the global generator, and must
        optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
        flat_lora_step(model, loss_fn, [batch(device=device)], optimizer, sigma, seed=0)
        sharpness(model.eval(), loss_fn, [batch(device=device)], sigma, 2, 0)
        after[sigma] = states()
    assert all(torch.equal(a, b) for a, b in zip(after[0.0], after[0.2]))


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_seed_gives_the_same_noise_whatever_else_was_drawn(device):
    model = adapted_mlp(device=device)
    first = noise(model, seed=(3, 7))
    torch.manual_seed(99)
    assert all(torch.equal(first[name], second) for name, second in noise(model, seed=(3, 7)).items())
    assert noise(model, seed=(3, 8))["0"].ne(first["0"]).all()


@pytest.mark.parametrize("n", [100, 200])  # below and above the size from which the table is used
def test_layers_and_steps_get_independent_noise(n):
    torch.manual_seed(0)
    model = inject_lora(nn.Sequential(nn.Linear(n, n), nn.Linear(n, n), nn.Linear(n, n)).double(), r=2)
    draws = [eps.flatten() for seed in ((0, 0), (0, 1), (1, 0), (1, 1)) for eps in noise(model, seed=seed).values()]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(12)
    assert correlation.abs().max() < 5 / n  # n * n numbers each: standard error 1 / n
    rows = torch.corrcoef(draws[0].view(n, n)) - torch.eye(n)
    assert rows.abs().max() < 5 / n**0.5  # rows of n numbers: standard error 1 / sqrt(n)


def test_the_noise_does_not_depend_on_the_number_of_threads():
    layer, threads, seen = LoRALinear(nn.Linear(768, 512), r=4), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        with torch.no_grad(), perturbed(layer, 0.3, seed=1):
            seen.append(layer(torch.eye(768)))
    torch.set_num_threads(threads)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("device", DEVICES)
def test_the_backward_sees_the_noise_of_the_forward(device):
    layer = LoRALinear(nn.Linear(8, 12).to(device, torch.float64), r=2)
    x = torch.randn(3, 8, dtype=torch.float64, device=device, requires_grad=True)
    with perturbed(layer, 0.5, seed=4):
        eps = read_eps(layer)[""]
        layer(x).sum().backward()
    torch.testing.assert_close(x.grad, (dense_weight(layer) + eps).sum(0).expand(3, 8))


# ---- 4. sigma = 0 is plain LoRA ------------------------------------------------------------------------------


def test_sigma_zero_is_plain_lora_bit_for_bit():
    flat, plain = adapted_mlp(torch.float32), adapted_mlp(torch.float32)
    flat_optimizer = torch.optim.AdamW(lora_parameters(flat), lr=0.01)
    plain_optimizer = torch.optim.AdamW(lora_parameters(plain), lr=0.01)
    for step in range(20):
        data = batch(dtype=torch.float32, seed=step)
        loss = flat_lora_step(flat, loss_fn, [data], flat_optimizer, sigma=0, seed=step)
        plain_optimizer.zero_grad()  # the ordinary loop
        plain_loss = loss_fn(plain, data)
        plain_loss.backward()
        plain_optimizer.step()
        assert loss == plain_loss.item()
    assert all(torch.equal(a, b) for a, b in zip(lora_parameters(flat), lora_parameters(plain)))


@pytest.mark.parametrize("width", [8, 256])  # small layers, and layers that use the table and the shared buffer
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kept_copy_of_the_noisy_weights_changes_no_bit(width, dtype):
    torch.manual_seed(0)
    flat = inject_lora(nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 192), nn.Tanh()).to(dtype), r=2)
    kept, data, before = copy.deepcopy(flat), [batch(dtype=dtype, seed=s) for s in (1, 2)], frozen_bytes(flat)
    optimizers = [torch.optim.SGD(lora_parameters(model), lr=0.1) for model in (flat, kept)]
    for step in range(5):
        losses = [
            flat_lora_step(model, lambda m, b: loss_fn(m, b).float(), data, optimizer, 0.3, step, keep=model is kept)
            for model, optimizer in zip((flat, kept), optimizers)
        ]
        assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(lora_parameters(flat), lora_parameters(kept)))
    assert frozen_bytes(kept) == before


def test_sigma_zero_makes_no_generator_and_no_noisy_layer(monkeypatch):
    model, (x, _) = adapted_mlp(), batch()
    monkeypatch.setattr(torch, "Generator", None)  # any use would fail
    with perturbed(model, 0.0, seed=0):
        model(x).sum().backward()
    with pytest.raises(TypeError), perturbed(model, 0.1, seed=0):
        model(x)


# ---- 5. The gradient is that of the dense loss at W + sBA + eps ----------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_loss_and_gradients_are_those_of_the_explicit_dense_weight(device):
    model = adapted_mlp(device=device)
    x, y = batch(device=device)
    x.requires_grad_()
    with perturbed(model, 0.3, seed=2):
        eps = read_eps(model)
        loss = loss_fn(model, (x, y))
        grads = torch.autograd.grad(loss, [x, *lora_parameters(model)])
    dense = dense_loss(model, (x, y), eps)
    expected = torch.autograd.grad(dense, [x, *lora_parameters(model)])
    torch.testing.assert_close(loss, dense)
    torch.testing.assert_close(grads, expected)
    clean = torch.autograd.grad(loss_fn(model, (x, y)), [x])
    assert not torch.allclose(clean[0], grads[0], rtol=0.01)  # so the comparison could tell


@pytest.mark.parametrize("n", [64, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_rounding_of_the_dense_gradient(dtype, n):
    layer = LoRALinear(nn.Linear(n, 48).to(dtype), r=4)
    nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(32, n).to(dtype).requires_grad_()
    with perturbed(layer, 0.3, seed=0):
        eps = read_eps(layer)[""].double()
        out = layer(x)
        grad_x, grad_a = torch.autograd.grad(out.float().square().sum(), [x, layer.lora_A])
    exact_x = x.detach().double().requires_grad_()
    dense = exact_x @ (dense_weight(layer).double() + eps).T + layer.bias.double()
    dense_x, dense_a = torch.autograd.grad(dense.square().sum(), [exact_x, layer.lora_A])
    bound = 8 * torch.finfo(dtype).eps
    assert ((out - dense).norm() / dense.norm()) < bound
    assert ((grad_x - dense_x).norm() / dense_x.norm()) < bound
    assert ((grad_a - dense_a).norm() / dense_a.norm()) < bound


# ---- 6. Autocast, checkpointing, modes -----------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_gives_the_gradients_of_float32_within_bfloat16(device):
    model, data = adapted_mlp(torch.float32, device), batch(64, torch.float32, device)
    grads = []
    for enabled in (False, True):
        with perturbed(model, 0.3, seed=0):
            with torch.autocast(device, torch.bfloat16, enabled=enabled):
                loss = loss_fn(model, data)
            grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, lora_parameters(model))]))
    assert grads[1].dtype == torch.float32
    assert 0 < (grads[1] - grads[0]).norm() / grads[0].norm() < 0.03


@pytest.mark.parametrize("device", DEVICES)
def test_activation_checkpointing_gives_the_same_gradients(device):
    model, data = adapted_mlp(device=device, dropout=0.3), batch(device=device)

    def checkpointed_loss_fn(model, batch):
        out = checkpoint(model[:3], batch[0], use_reentrant=False)
        return nn.functional.cross_entropy(model[3:](out), batch[1])

    grads = []
    for function in (loss_fn, checkpointed_loss_fn):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(lora_parameters(model), lr=0)
        flat_lora_step(model, function, [data], optimizer, 0.3, seed=0)
        grads.append([p.grad.clone() for p in lora_parameters(model)])
    torch.testing.assert_close(grads[0], grads[1])


def test_a_backward_after_the_context_still_sees_its_noise():
    model, data = adapted_mlp(), batch()
    grads = []
    for inside in (True, False):
        with perturbed(model, 0.3, seed=0):
            loss = loss_fn(model, data)
            if inside:
                grads.append(torch.autograd.grad(loss, lora_parameters(model)))
        if not inside:
            grads.append(torch.autograd.grad(loss, lora_parameters(model)))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_a_checkpointed_backward_outside_of_the_noise_fails_loudly():
    model = adapted_mlp()
    with perturbed(model, 0.3, seed=0):
        out = checkpoint(model, batch()[0], use_reentrant=False)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        out.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_the_noise_acts_in_both_modes_and_ends_with_the_context(training):
    model, (x, _) = adapted_mlp().train(training), batch()
    clean = model(x)
    with perturbed(model, 0.3, seed=0):
        assert not torch.allclose(model(x), clean)
    assert torch.equal(model(x), clean)


# ---- Bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [-0.1, float("nan"), float("inf"), "0.1", None])
def test_sigma_must_be_a_finite_number_from_zero_up(sigma):
    model = adapted_mlp()
    with pytest.raises(ValueError, match="sigma must be a finite number >= 0"):
        filter_std(model[0].weight, sigma)
    with pytest.raises(ValueError, match="sigma must be"):
        sigma_at(0, 1, sigma)
    with pytest.raises(ValueError, match="sigma must be"), perturbed(model, sigma, seed=0):
        pass


@pytest.mark.parametrize("seed", [-1, 0.5, None, "a", (1, None)])
def test_seed_must_be_a_natural_number_or_several(seed):
    with pytest.raises(ValueError, match="seed must be an integer >= 0"), perturbed(adapted_mlp(), 0.1, seed):
        pass


@pytest.mark.parametrize(("step", "total"), [(-1, 10), (11, 10), (0, 0), (float("nan"), 10)])
def test_step_must_lie_within_the_run(step, total):
    with pytest.raises(ValueError, match="step must be from 0 to total_steps"):
        sigma_at(step, total, 0.1)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="schedule must be one of cosine, linear, constant, got 'cubic'"):
        sigma_at(0, 10, 0.1, "cubic")


def test_noise_without_adapters_is_an_error_and_noise_does_not_nest():
    with pytest.raises(ValueError, match="inject_lora first"), perturbed(nn.Linear(2, 2), 0.1, seed=0):
        pass
    model, (x, _) = adapted_mlp(), batch()
    with perturbed(model, 0.3, seed=0):
        outer = model(x)
        with pytest.raises(RuntimeError, match="do not nest"), perturbed(model, 0.1, seed=1):
            pass
        assert torch.equal(model(x), outer)  # the outer noise is still there
