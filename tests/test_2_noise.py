"""The noise: its law, its seed, that it is never written and never stored, and the gradient that it gives."""

import copy
import gc
import itertools
import math
import pickle
import random
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import reference as ref
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import flatlora
from flatlora import LoRALinear, filter_std, flat_lora_step, inject_lora, lora_parameters, perturbed, sigma_at


def test_each_row_of_w_prime_moves_by_a_fraction_sigma_of_itself_whatever_n():  # eq. 7, and W' is not W
    model = ref.adapted_model()
    draws = [ref.draw(model, 0.3, seed) for seed in range(300)]
    for name, layer in ref.layers(model).items():
        square = torch.stack([eps[name].square().sum(dim=1) for eps in draws]).mean(dim=0)  # (m,)
        merged, base, n = ref.dense_weight(layer).norm(dim=1), layer.base.weight.norm(dim=1), layer.in_features
        error = 5 * math.sqrt(2 / (300 * n))  # five standard errors, here and below
        torch.testing.assert_close(square, (0.3 * merged.detach()).square(), rtol=error, atol=0)
        assert not torch.allclose(square, (0.3 * base).square(), rtol=error)  # so the comparison could tell


@pytest.mark.parametrize("n", [16, 192])
def test_the_variance_of_the_outputs_grows_alike_whatever_n(n):  # proposition 3.2
    layer, sigma, mean, outputs = ref.in_training(LoRALinear(nn.Linear(n, 32, bias=False), r=2)), 0.5, 1.5, []
    for seed in range(500):
        with torch.no_grad(), perturbed(layer, sigma, seed):
            outputs.append(layer(torch.randn(32, n) + mean))  # (32, m), from inputs of variance 1
    expected = ((1 + sigma**2) + sigma**2 * mean**2) * ref.dense_weight(layer).norm(dim=1) ** 2
    assert (torch.cat(outputs).var(dim=0) / expected).mean().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("law", ["windows of a table", "fresh normals"])
def test_windows_and_fresh_normals_pass_the_same_statistics(law):
    layer, D, m, n, generator = ref.adapted_model()[0], 200, 256, 192, torch.Generator().manual_seed(0)
    fresh, std = law == "fresh normals", filter_std(ref.dense_weight(layer).detach(), 1.0)
    eps = [ref.fresh_eps(layer, 1.0, generator) if fresh else ref.draw(layer, 1.0, seed)[""] for seed in range(D)]
    z = torch.stack([(e / std).float() for e in eps])  # (D, m, n), all of mean 0 and variance 1 by eq. 7
    # The table has 4.2 million normals, and its own deviation counts beside that of the 9.8 million draws.
    error = 5 * math.sqrt(1 / z.numel() + 1 / 2**22)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.double().pow(power).mean().item() - mean) < error * math.sqrt(variance)
    for k in (2.0, 3.0, 4.0):
        expected = math.erfc(k / 2**0.5) / 2
        for tail in (z > k, z < -k):
            assert abs(tail.double().mean().item() - expected) < error * math.sqrt(expected)
    for lines in (z.reshape(D * m, n), z.transpose(1, 2).reshape(D * n, m)):  # two entries of a row, then two rows
        covariance = lines.T @ lines / len(lines)
        assert (covariance - torch.eye(lines.shape[1])).abs().max() < 6 * math.sqrt(2 / len(lines))
    position = torch.arange(n)
    for direction in (torch.ones(n), (-1.0) ** position, torch.cos(position / 30), (position == 7).float()):
        along = z @ (direction / direction.norm())  # (D, m), of second moment 1
        assert along.square().mean().item() == pytest.approx(1, abs=0.05)
        assert (along.sum(dim=1).square().mean() / m).item() == pytest.approx(1, abs=0.5)  # all rows together


def test_each_row_is_a_window_of_the_table_with_a_start_and_a_sign_of_its_own():
    layer, near, equal, starts, signs = ref.adapted_model()[0], 0, 0, [], []
    table, m, n = flatlora._table(torch.float64, torch.device("cpu"))[: 2**22], 256, 192
    expected = 0.3 * ref.dense_weight(layer).detach().norm(dim=1, keepdim=True) / math.sqrt(n)  # (m, 1), eq. 7
    for seed in range(200):
        with perturbed(layer, 0.3, seed):
            (std, start), eps = layer._added["W"], ref.read_eps(layer)[""]
        windows = table[(start[:, None] + torch.arange(n)) % 2**22]  # (m, n); the end continues with the beginning
        torch.testing.assert_close(eps, std.sign() * expected * windows)
        gaps = (start[:, None] - start)[torch.ones(m, m).triu(1) > 0].abs()  # of each pair of rows
        near, equal = near + (gaps < n).sum().item(), equal + (gaps == 0).sum().item()
        starts, signs = [*starts, start / 2**22], [*signs, std.sign()[:, 0]]
    start, sign, pairs = torch.cat(starts), torch.cat(signs), 200 * m * (m - 1) / 2
    assert start.max() > 1 - n / 2**22  # so a window past the end was among them
    assert abs(near - pairs * 2 * n / 2**22) < 5 * math.sqrt(pairs * 2 * n / 2**22) and equal <= 8  # 1.6 are expected
    uniform, odd = (start - 0.5) * 12**0.5, start * 2**22 % 2 * 2 - 1
    for each in (sign, uniform, odd, sign * uniform, sign * odd):  # of mean 0 and variance 1
        assert abs(each.mean()) < 5 / math.sqrt(len(start)) and abs(each.std() - 1) < 5 / math.sqrt(len(start))


def test_layers_and_steps_draw_independently():
    model = inject_lora(nn.ModuleList(nn.Linear(192, 256, dtype=torch.float64) for _ in range(3)), r=3)
    draws = [eps.flatten() for seed in ((0, 0), (0, 1), (1, 0), (1, 1)) for eps in ref.draw(model, seed=seed).values()]
    assert (torch.corrcoef(torch.stack(draws)) - torch.eye(12)).abs().max() < 5 / math.sqrt(256 * 192)


def test_schedules_at_the_first_the_middle_and_the_last_step():
    steps = (0, 50, 99)
    assert [sigma_at(t, 100, 0.2) for t in steps] == pytest.approx([0, 0.1, 0.2 * (1 + math.cos(math.pi / 100)) / 2])
    assert [sigma_at(t, 100, 0.2, "linear") for t in steps] == pytest.approx([0, 0.1, 0.198])
    assert [sigma_at(t, 100, 0.2, "constant") for t in steps] == [0.2] * 3


@pytest.mark.parametrize("device", ref.DEVICES)
def test_the_same_seed_gives_the_same_noise_on_every_device_in_every_thread(device, monkeypatch):
    elsewhere, threads, first = ref.adapted_model(device=device), torch.get_num_threads(), ref.draw(ref.adapted_model())
    monkeypatch.setattr(flatlora, "_tables", {})  # as in another process
    torch.manual_seed(99)
    torch.set_num_threads(3 - min(threads, 2))
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(ref.draw, elsewhere).result()
    torch.set_num_threads(threads)
    torch.testing.assert_close({name: eps.cpu() for name, eps in second.items()}, first)


def test_different_seeds_never_coincide():
    model, seen = ref.adapted_model(), []
    seeds = [0, 7, (7,), (7, 0), (0, 7), 12, (1, 2), (2, 1), (1, 2, 0), (0, 1, 2), ((1, 2), 0), 2**32, (0, 1), -7]
    draws = [ref.draw(model, seed=seed)["0"] for seed in seeds]
    flatlora.sharpness(model, lambda m, _: seen.append(ref.read_eps(m)["0"]) or torch.ones(()), [0], 0.3, 2, seed=0)
    draws += seen[1:]  # the first is of the pass without noise
    for i, eps in enumerate(draws):
        assert not any(torch.equal(row, other) for e in draws[:i] for row, other in zip(eps.abs(), e.abs()))
    assert torch.equal(ref.draw(model, seed=[1, np.int64(2)])["0"], draws[6])


@pytest.mark.parametrize("device", ref.DEVICES)
@pytest.mark.parametrize("dtype", ref.DTYPES)
def test_a_thousand_steps_write_no_bit_of_the_base_and_use_no_global_generator(dtype, device, monkeypatch):
    def generators():
        cuda = [state.tolist() for state in torch.cuda.get_rng_state_all()] if device == "cuda" else []
        return torch.get_rng_state().tolist(), cuda, random.getstate(), str(np.random.get_state())

    model, data = ref.adapted_model(dtype, device), ref.batch(4, dtype, device)
    monkeypatch.setattr(flatlora, "_tables", {})  # so that the table is made here
    optimizer, before, start = ref.sgd(model, lr=1e-3), (ref.frozen_bytes(model), generators()), ref.adapters(model)
    for step in range(1000):
        flat_lora_step(model, ref.loss_fn, [data], optimizer, 0.3, seed=step)
    for call in (ref.STEPS | ref.SHARPNESS).values():
        call(model, ref.loss_fn, [data], optimizer)
    assert (ref.frozen_bytes(model), generators()) == before
    assert not any(torch.equal(p, old) for p, old in zip(ref.adapters(model), start))  # it did train


def test_an_exception_or_ctrl_c_in_the_loss_leaves_nothing_behind():
    model, data, calls = ref.adapted_model(torch.bfloat16), ref.batch(4, torch.bfloat16), itertools.count()
    before, start, clean = ref.frozen_bytes(model), ref.adapters(model), model(data[0])

    def failing_loss_fn(model, batch):
        if next(calls) % 2:  # the second micro-batch, or the second pass of SAM and sharpness
            raise KeyboardInterrupt
        return ref.loss_fn(model, batch)

    for name, call in (ref.STEPS | ref.SHARPNESS).items():
        with pytest.raises(KeyboardInterrupt):
            call(model, failing_loss_fn, [data] * (2 if name in ("lora", "flat") else 1), ref.sgd(model))
        assert ref.frozen_bytes(model) == before and torch.equal(model(data[0]), clean)
        assert all(torch.equal(p, old) for p, old in zip(ref.adapters(model), start))


def tensors_behind(*roots):
    """Every tensor that a graph or a model holds: what the nodes saved, and whatever hangs on them in Python."""
    queue, seen = list(roots), {}
    while queue:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, (type, types.ModuleType)):
            continue
        seen[id(thing)] = thing  # kept, so that no other object gets its id
        if isinstance(thing, types.FunctionType):  # not its globals, which are the whole program
            queue += [thing.__closure__, thing.__defaults__, thing.__dict__]
        elif not isinstance(thing, torch.Tensor):
            queue += gc.get_referents(thing)
        if hasattr(thing, "next_functions"):  # a node of the graph
            queue += [thing.next_functions, getattr(thing, "saved_tensors", None)]
            queue += [getattr(thing, name) for name in dir(thing) if name.startswith("_saved_")]
    return [thing for thing in seen.values() if isinstance(thing, torch.Tensor)]


def test_between_forward_and_backward_a_layer_keeps_two_numbers_per_row():
    model, (x, y) = ref.adapted_model(), ref.batch(5)
    with perturbed(model, 0.3, seed=0):
        loss = ref.loss_fn(model, (x, y))
        held = tensors_behind(loss.grad_fn, model)
        std, start = model[0]._added["W"]
    own = {p.data_ptr() for p in model.parameters()}
    assert own <= {t.data_ptr() for t in held}  # the walk sees what is there
    assert {std.data_ptr(), start.data_ptr()} <= {t.data_ptr() for t in held} and std.numel() == start.numel() == 256
    assert max(t.numel() for t in held if t.data_ptr() not in own) == 5 * 256  # an activation, not the 256 x 192


@pytest.mark.parametrize("make", [ref.adapted_model, ref.plain_model])  # plain: full fine-tuning
def test_sigma_zero_is_the_ordinary_loop_bit_for_bit(make):
    models = [make(torch.float32), make(torch.float32)]
    trained = [[p for p in model.parameters() if p.requires_grad] for model in models]
    optimizers = [torch.optim.AdamW(parameters, lr=0.01) for parameters in trained]
    for step in range(20):
        data = ref.batch(dtype=torch.float32, seed=step)
        flat_lora_step(models[0], ref.loss_fn, [data], optimizers[0], sigma=0, seed=step)
        optimizers[1].zero_grad()
        ref.loss_fn(models[1], data).backward()
        optimizers[1].step()
    assert all(torch.equal(a, b) for a, b in zip(*trained))


@pytest.mark.parametrize("device", ref.DEVICES)
@pytest.mark.parametrize("how", ["plain", "unfrozen", "checkpointed"])
def test_loss_gradients_and_gradient_penalty_are_those_of_the_dense_weight(how, device):  # eq. 6
    model, (x, y) = ref.adapted_model(device=device), ref.batch(device=device)
    if how == "unfrozen":  # whoever trains W and the bias too gets their gradients, with eps as a constant
        model.requires_grad_(True)
    wrt = [x.requires_grad_(), *(p for p in model.parameters() if p.requires_grad)]
    forward = (lambda x: checkpoint(model, x, use_reentrant=False)) if how == "checkpointed" else model

    def gradients(loss):
        first = torch.autograd.grad(loss, wrt, create_graph=True)
        return loss, *first, *torch.autograd.grad(first[0].square().sum(), wrt)

    with perturbed(model, 0.3, seed=2):
        eps, given = ref.read_eps(model), gradients(ref.loss_fn(forward, (x, y)))
    torch.testing.assert_close(given, gradients(ref.dense_loss(model, (x, y), eps)))
    assert len(wrt) == (12 if how == "unfrozen" else 7)
    assert not torch.allclose(given[0], ref.loss_fn(model, (x, y)), rtol=0.01)  # so the comparison could tell


@pytest.mark.parametrize("computed_in", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_and_autocast_stay_within_their_rounding_of_the_dense_gradient(computed_in, autocast):
    layer = ref.in_training(LoRALinear(nn.Linear(192, 256).to(torch.float32 if autocast else computed_in), r=3))
    x, eps = torch.randn(32, 192).to(layer.base.weight).requires_grad_(), ref.draw(layer, 0.3, seed=0)[""].double()
    with perturbed(layer, 0.3, seed=0), torch.autocast("cpu", computed_in, enabled=autocast):
        out = layer(x)
    given = torch.autograd.grad(out.float().square().sum(), [x, layer.lora_A])  # after the context, which is allowed
    exact, exact_x = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    dense = ref.dense_call(nn.Linear(192, 256).double(), exact, {"": eps}, exact_x)
    expected = torch.autograd.grad(dense.square().sum(), [exact_x, exact.lora_A])
    assert out.dtype == computed_in
    assert (filter_std(layer.weight, 1) / filter_std(layer.weight.double(), 1) - 1).abs().max() < 1e-5
    for a, b in zip([out, *given], [dense, *expected]):
        assert (a - b).norm() / b.norm() < 8 * torch.finfo(computed_in).eps


def test_four_threads_may_run_one_perturbed_model():
    model = inject_lora(nn.Sequential(*(nn.Linear(n, 448 - n) for n in (192, 256) * 3)), r=3)
    inputs = [ref.batch(8, torch.float32, seed=seed)[0].requires_grad_() for seed in range(40)]

    def run(x):
        return torch.autograd.grad(model(x).square().sum(), [x, *lora_parameters(model)])

    with perturbed(model, 0.3, seed=0), ThreadPoolExecutor(4) as pool:
        torch.testing.assert_close(list(pool.map(run, inputs)), [run(x) for x in inputs])


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), AveragedModel])
def test_a_copy_taken_inside_a_perturbation_is_clean(make):
    model, (x, _) = ref.adapted_model(), ref.batch()
    clean = model(x)
    with perturbed(model, 0.3, seed=0):
        twin = make(model)
        assert torch.equal(twin(x), clean) and not torch.allclose(model(x), clean)
    assert torch.equal(model(x), clean)  # the noise ends with the context
