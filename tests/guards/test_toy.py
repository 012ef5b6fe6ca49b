"""train_toy.py: its equations hold, its comparison is paired, and it prints and draws the computed numbers."""

import copy
import json
import math
import sys
from argparse import Namespace

import numpy as np
import pytest
import reference as ref
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import get_total_norm

import flatlora
import train_toy

ARGS = Namespace(steps=20, lr=0.02, sigma=0.6, rho=0.1)


@pytest.fixture(scope="module")
def task():
    """An untrained student, and the data of a task."""
    torch.manual_seed(0)
    student = train_toy.mlp().requires_grad_(False)
    return student, train_toy.target_task(student, 0)


@pytest.fixture(scope="module")
def minima(task):
    """LoRA's and Flat-LoRA's model, and their training data."""
    student, splits = task
    train = splits["train"]
    lora, flat = [train_toy.finetune(student, train, method, 0, ARGS) for method in ("lora", "flat")]
    return lora, flat, train


def merged(model):
    """The weights W', inside `perturbed` W' + eps."""
    return [ref.merged(layer) + ref.eps_of(layer) for layer in model[::2]]


def dense_loss(model, weights, batch):
    """The loss of the network with these weights."""
    x, y = batch
    for layer, weight in zip(model[::2], weights):
        logits = x @ weight.T + layer.bias
        x = logits.relu()
    return cross_entropy(logits, y)


# ---- SAM on W' -----------------------------------------------------------------------------------------------


def test_sam_on_merged_is_the_two_pass_formula(minima):
    model, _, train = minima
    parameters = flatlora.lora_parameters(model)
    weights = merged(model)
    clean = dense_loss(model, weights, train)
    gradients = torch.autograd.grad(clean, weights)
    norm = get_total_norm(gradients)
    worst = [weight + 0.3 * g / norm for weight, g in zip(merged(model), gradients)]
    expected = torch.autograd.grad(dense_loss(model, worst, train), parameters)
    clipped = [0.01 * g / get_total_norm(expected) for g in expected]

    optimizer = torch.optim.SGD(parameters, lr=0)
    batches = ref.quarters(train)
    loss = train_toy.sam_on_merged_step(model, train_toy.loss_fn, batches, optimizer, 0.3, max_grad_norm=0.01)

    assert loss == pytest.approx(clean.item())
    torch.testing.assert_close([p.grad for p in parameters], clipped, rtol=1e-3, atol=1e-6)


def test_an_interrupted_sam_on_merged_leaves_nothing_behind(minima):
    model, _, train = minima
    parameters = flatlora.lora_parameters(model)

    def interrupted(model, batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_toy.sam_on_merged_step(model, interrupted, [train], torch.optim.SGD(parameters), 0.3)
    with pytest.raises(KeyboardInterrupt), train_toy.shifted(model, merged(model)):
        raise KeyboardInterrupt

    assert len(flatlora.lora_parameters(model)) == len(parameters)  # W is frozen
    assert all(layer.noise is None for layer in model[::2])


# ---- The comparison ------------------------------------------------------------------------------------------


SAM = {"sam": flatlora.sam_step, "sam-full": train_toy.sam_on_merged_step}


def slow_finetune(student, train, method):
    """What `finetune` does for seed 3, as plainly as possible."""
    torch.manual_seed(train_toy.ADAPTERS + 3)
    model = flatlora.inject_lora(copy.deepcopy(student), 4, 8, targets=["0", "2", "4"])
    optimizer = torch.optim.AdamW(flatlora.lora_parameters(model), weight_decay=0)
    generator = torch.Generator().manual_seed(train_toy.BATCHES + 3)
    for step, pick in enumerate(torch.randint(300, (20, 64), generator=generator)):
        batch = [part[pick] for part in train]
        cosine = math.cos(math.pi * step / 20)
        optimizer.param_groups[0]["lr"] = 0.02 * (1 + cosine) / 2
        if method in SAM:
            SAM[method](model, train_toy.loss_fn, [batch], optimizer, 0.1)
        else:
            sigma = 0.6 * (1 - cosine) / 2 if method == "flat" else 0
            flatlora.flat_lora_step(model, train_toy.loss_fn, [batch], optimizer, sigma, (3, step))
    return model


@pytest.mark.parametrize("method", train_toy.METHODS)
def test_a_run_is_that_of_the_slow_loop_with_the_same_adapters_and_batches(method, task):
    student, splits = task
    train = splits["train"]
    given = train_toy.finetune(student, train, method, 3, ARGS)
    expected = slow_finetune(student, train, method)
    torch.testing.assert_close(ref.adapters(given), ref.adapters(expected), rtol=1e-3, atol=1e-4)


# ---- Measures and table --------------------------------------------------------------------------------------


@torch.no_grad()
def test_noise_on_factors_is_drawn_by_equation_7(minima):
    model, _, train = minima
    rise, distance = train_toy.noise_on_factors(model, train, seed=0)

    start = merged(model)
    losses, distances = [], []
    for sample in range(10):
        moved = copy.deepcopy(model)
        for name, p in moved.named_parameters():
            if "lora_" in name:
                noise = flatlora.draw_noise(torch.ones_like(p), 1.0, ("factors", 0, sample), name)
                p += ref.row_std(p, 0.3) * noise.scale * noise.normals
        losses.append(dense_loss(model, merged(moved), train))
        change = [new - old for new, old in zip(merged(moved), start)]
        distances.append(get_total_norm(change) / get_total_norm(start))
    clean = dense_loss(model, start, train)
    assert rise == pytest.approx(np.mean(losses) - clean.item(), abs=1e-5)
    assert distance == pytest.approx(np.mean(distances), rel=1e-4)


@torch.no_grad()
def test_measures_are_those_of_the_dense_network(minima, task):
    model, _, train = minima
    _, splits = task
    result = train_toy.measure(model, splits, seed=5)
    x, y = splits["test"]
    right = model(x).argmax(1) == y
    assert result["test_loss"] == pytest.approx(dense_loss(model, merged(model), (x, y)).item())
    assert result["test_acc"] == pytest.approx(100 * right.sum().item() / len(y))

    for space, sigma in [("full_space", 0.3), ("equal", result["moved"])]:
        rise = -dense_loss(model, merged(model), train)
        for sample in range(10):
            with flatlora.perturbed(model, sigma, ("sharpness", 5, sample)):
                rise += dense_loss(model, merged(model), train) / 10
        assert result[space] == pytest.approx(rise.item(), abs=1e-5)


def test_t_quantiles_are_those_of_scipy():
    t = pytest.importorskip("scipy.stats").t
    np.testing.assert_allclose(train_toy.T975, t.ppf(0.975, range(1, 21)), atol=5e-4)


@pytest.fixture
def call(monkeypatch, tmp_path, task):
    """Run the command in an empty folder, with untrained networks."""
    monkeypatch.setattr(train_toy, "source_task", lambda: (task[0], task[0]))
    monkeypatch.chdir(tmp_path)

    def call(words):
        monkeypatch.setattr(sys, "argv", ["train_toy.py", *words.split()])
        train_toy.main()

    return call


def test_the_table_holds_the_numbers_of_the_json(call, capsys, tmp_path):
    call("--seeds 2 --steps 3 --lr 0.1")
    lines = capsys.readouterr().out.splitlines()
    runs = json.loads((tmp_path / "out" / "toy.json").read_text())["runs"]
    for label, key in train_toy.ROWS.items():
        (line,) = [line for line in lines if line.startswith(label)]
        lora, *others = [np.array([run[key] for run in runs[method]]) for method in train_toy.METHODS]
        digits = 1 if key == "test_acc" else 4
        expected = f"{lora.mean():.{digits}f}"
        for values in others:
            differences = values - lora
            half = 12.706 * differences.std(ddof=1) / math.sqrt(2)  # Student's t of two values
            expected += f" {differences.mean():+.{digits}f} +-{half:.{digits}f}"
        assert line.removeprefix(label).split() == expected.split()
    assert max(map(len, lines)) <= 80


WRONG = {
    "--seeds 1": "--seeds must be at least 2",
    "--steps 0": "--steps must be above 0, got 0",
    "--steps 1e3": "argument --steps: invalid int value: '1e3'",
    "--sigma -1": "--sigma must be above 0, got -1.0",
    "--rho nan": "--rho must be above 0, got nan",
}


@pytest.mark.parametrize("option", WRONG)
def test_a_wrong_option_is_an_error_before_the_training(option, call, capsys, tmp_path):
    with pytest.raises(SystemExit):
        call(option)
    assert WRONG[option] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- The picture ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_plane_holds_dense_losses_noise_and_a_steep_direction_out_of_reach(minima, monkeypatch):
    lora, flat, train = minima
    monkeypatch.setattr(train_toy, "ACROSS", torch.tensor([0.0, 0.5, 1.0]))
    monkeypatch.setattr(train_toy, "UP", torch.tensor([0.0, 10.0]))
    loss, dots = train_toy.plane(lora, flat, train, sigma=0.3)

    direction = train_toy.steep_direction(lora, flat, train)
    size = get_total_norm(merged(lora)) / 100
    half_way = copy.deepcopy(lora)
    for p, end in zip(half_way.parameters(), flat.parameters()):
        p.lerp_(end, 0.5)
    weights = [weight + 10 * size * part for weight, part in zip(merged(half_way), direction)]
    torch.testing.assert_close(loss[0, 2], dense_loss(lora, merged(flat), train))
    torch.testing.assert_close(loss[1, 1], dense_loss(lora, weights, train), rtol=1e-4, atol=0)

    start = merged(flat)
    with flatlora.perturbed(flat, 0.3, ("picture", 7)):
        heights = [((new - old) * part).sum() for new, old, part in zip(merged(flat), start, direction)]
    torch.testing.assert_close(dots[7, 1], sum(heights) / size, rtol=1e-3, atol=1e-4)

    for column, model in [(0, lora), (2, flat)]:
        rise = loss[1, column] - loss[0, column]
        noise_rise = flatlora.sharpness(model, train_toy.loss_fn, [train], 0.1, 10, 0)  # equally far, in all directions
        assert rise > 3 * abs(noise_rise)
        for layer, part in zip(model[::2], direction):
            assert (part @ layer.lora_A.T).abs().max() < 1e-5  # so it holds no b A
            assert (layer.lora_B.T @ part).abs().max() < 1e-5  # and no B a


def test_the_picture_shows_where_the_loss_is_high_and_low(call, monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    x = train_toy.ACROSS
    y = train_toy.UP[:, None]  # (Y, 1)
    width = 3 + 9 * x.clamp(0, 1)  # in which the loss rises by 0.5
    loss = 0.1 + 0.5 * (y / width).square() + (x - 0.5).square() + 0.001 * y  # lowest in the middle
    monkeypatch.setattr(train_toy, "plane", lambda *_: (loss, torch.zeros(5, 2)))
    call("--seeds 2 --steps 3 --plot idea.v2")

    assert {path.name for path in tmp_path.glob("*.png")} == {"idea.v2-light.png", "idea.v2-dark.png"}
    (axes,) = pyplot.gcf().axes
    high, low = axes.texts
    assert high.get_position() == pytest.approx((-0.3, 16.2))
    assert low.get_position() == pytest.approx((0.6, 0), abs=0.15)
    _, labels = axes.get_legend_handles_labels()
    assert "noise, magnified 5 times" in labels
    assert "LoRA: loss rises by < 0.5 within \u00b13.0 %" in labels
    assert "Flat-LoRA: loss rises by < 0.5 within \u00b112.0 %" in labels
