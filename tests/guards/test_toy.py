"""train_toy.py: its equations hold, its comparison is paired, and it prints and draws what it computed."""

import copy
import json
import math
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import get_total_norm

import flatlora
import train_toy

ARGS = Namespace(steps=20, lr=0.02, sigma=0.6, rho=0.1)


@pytest.fixture(scope="module")
def task():
    """A student that has not been trained, and the data of a task."""
    torch.manual_seed(0)
    student = train_toy.mlp().requires_grad_(False)
    return student, train_toy.target_task(student, 0)


@pytest.fixture(scope="module")
def minima(task):
    """LoRA's and Flat-LoRA's model, and their training data."""
    student, splits = task
    lora = train_toy.finetune(student, splits["train"], "lora", 0, ARGS)
    flat = train_toy.finetune(student, splits["train"], "flat", 0, ARGS)
    return lora, flat, splits["train"]


def merged(model):
    return [layer.frozen_weight + layer.scaling * layer.lora_B @ layer.lora_A for layer in model[::2]]


def dense_loss(model, weights, batch):
    """The loss with these weights, written out."""
    x, y = batch
    x = (x @ weights[0].T + model[0].bias).relu()
    x = (x @ weights[1].T + model[2].bias).relu()
    return cross_entropy(x @ weights[2].T + model[4].bias, y)


def noise_on(weight, sigma, seed, name):
    noise = flatlora.draw_noise(weight, sigma, seed, name)
    return noise.scale * noise.normals


# ---- SAM on W' -----------------------------------------------------------------------------------------------


def test_sam_on_merged_is_the_two_pass_formula(minima):
    model, _, (x, y) = minima
    halves = [(x[:150], y[:150]), (x[150:], y[150:])]
    parameters = flatlora.lora_parameters(model)
    weights = merged(model)
    clean = dense_loss(model, weights, (x, y))
    gradients = torch.autograd.grad(clean, weights)
    norm = get_total_norm(gradients)
    worst = [weight + 0.3 * g / norm for weight, g in zip(merged(model), gradients)]
    expected = torch.autograd.grad(dense_loss(model, worst, (x, y)), parameters)
    clipped = [0.01 * g / get_total_norm(expected) for g in expected]

    optimizer = torch.optim.SGD(parameters, lr=0)
    loss = train_toy.sam_on_merged_step(model, train_toy.loss_fn, halves, optimizer, 0.3, max_grad_norm=0.01)

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

EXPECTED = {  # the function and the settings of the step half way up the ramp
    "lora": ("flat_lora_step", 0.0, 0),
    "flat": ("flat_lora_step", pytest.approx(0.3), (3, 10)),
    "sam": ("sam_step", 0.1),
    "sam-full": ("sam_on_merged_step", 0.1),
}


def steps_of(method, task, monkeypatch):
    """Of each step its function and settings, its batch, and the adapters."""
    seen = []

    def record(name):
        def step(model, loss_fn, batches, optimizer, *settings, **named):
            optimizer.step()  # which has no gradient, so that nothing moves
            seen.append(((name, *settings, *named.values()), batches[0], flatlora.lora_state_dict(model)))

        return step

    monkeypatch.setattr(flatlora, "flat_lora_step", record("flat_lora_step"))
    monkeypatch.setattr(flatlora, "sam_step", record("sam_step"))
    monkeypatch.setattr(train_toy, "sam_on_merged_step", record("sam_on_merged_step"))
    student, splits = task
    torch.manual_seed(len(method))  # which must not matter
    train_toy.finetune(student, splits["train"], method, 3, ARGS)
    return seen


@pytest.mark.parametrize("method", EXPECTED)
def test_methods_differ_in_their_step_alone(method, task, monkeypatch):
    own = steps_of(method, task, monkeypatch)
    lora = steps_of("lora", task, monkeypatch)
    assert own[10][0] == EXPECTED[method]
    torch.testing.assert_close([step[1:] for step in own], [step[1:] for step in lora], rtol=0, atol=0)
    assert not torch.equal(own[0][1][0], own[1][1][0])  # each step has its own batch


# ---- Measures and table --------------------------------------------------------------------------------------


@torch.no_grad()
def test_noise_on_factors_has_the_law_of_equation_7(minima, monkeypatch):
    model, _, train = minima
    parameters = flatlora.lora_parameters(model)
    draws = []
    moved = flatlora.moved
    monkeypatch.setattr(flatlora, "moved", lambda p, shifts: draws.append(shifts) or moved(p, shifts))
    monkeypatch.setattr(train_toy, "SAMPLES", 200)
    rise, distance = train_toy.noise_on_factors(model, train, seed=0)

    for p, shifts in zip(parameters, zip(*draws)):
        std = torch.stack(shifts).square().mean((0, 2)).sqrt()  # of each row
        torch.testing.assert_close(std, 0.3 * p.norm(dim=1) / math.sqrt(p.shape[1]), rtol=0.15, atol=0)

    start = merged(model)
    expected = -dense_loss(model, start, train)
    lengths = 0
    for shifts in draws:
        with moved(parameters, shifts):
            weights = merged(model)
        expected += dense_loss(model, weights, train) / 200
        lengths += get_total_norm([weight - old for weight, old in zip(weights, start)]) / 200
    assert rise == pytest.approx(expected.item(), abs=1e-5)
    assert distance == pytest.approx((lengths / get_total_norm(start)).item(), rel=1e-4)


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
            weights = merged(model)
            for weight, name in zip(weights, "024"):
                weight += noise_on(weight, sigma, ("sharpness", 5, sample), name)
            rise += dense_loss(model, weights, train) / 10
        assert result[space] == pytest.approx(rise.item(), abs=1e-5)


def test_interval_is_students():
    t = pytest.importorskip("scipy.stats").t
    np.testing.assert_allclose(train_toy.T975, t.ppf(0.975, range(1, 21)), atol=5e-4)


@pytest.fixture
def call(monkeypatch, tmp_path, task):
    """Runs the command in an empty folder, with networks that have not been trained."""
    threads = torch.get_num_threads()  # main() sets it
    monkeypatch.setattr(train_toy, "source_task", lambda: (task[0], task[0]))
    monkeypatch.chdir(tmp_path)

    def call(words):
        monkeypatch.setattr(sys, "argv", ["train_toy.py", *words.split()])
        train_toy.main()

    yield call
    torch.set_num_threads(threads)


def test_the_table_holds_the_numbers_of_the_json(call, capsys, tmp_path):
    call("--seeds 2 --steps 3 --lr 0.1")
    lines = capsys.readouterr().out.splitlines()
    runs = json.loads((tmp_path / "out" / "toy.json").read_text())["runs"]
    for label, key in train_toy.ROWS.items():
        (line,) = [line for line in lines if line.startswith(label)]
        values = {method: np.array([run[key] for run in own]) for method, own in runs.items()}
        digits = 1 if key == "test_acc" else 4
        expected = f"{values['lora'].mean():.{digits}f}"
        for method in ("flat", "sam", "sam-full"):
            differences = values[method] - values["lora"]
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
def test_the_plane_holds_dense_losses_and_noise(minima, monkeypatch):
    lora, flat, train = minima
    monkeypatch.setattr(train_toy, "ACROSS", torch.tensor([0.0, 0.5, 1.0]))
    monkeypatch.setattr(train_toy, "UP", torch.tensor([0.0, 10.0]))
    loss, dots = train_toy.plane(lora, flat, train, sigma=0.3)

    direction = train_toy.steep_direction(lora, flat, train)
    size = get_total_norm(merged(lora)) / 100
    half_way = copy.deepcopy(lora)
    for p, end in zip(half_way.parameters(), flat.parameters()):
        p.add_(end).div_(2)
    weights = [weight + 10 * size * part for weight, part in zip(merged(half_way), direction)]
    torch.testing.assert_close(loss[0, 2], dense_loss(lora, merged(flat), train))
    torch.testing.assert_close(loss[1, 1], dense_loss(lora, weights, train), rtol=1e-4, atol=0)

    height = 0
    for weight, part, name in zip(merged(flat), direction, "024"):
        height += (noise_on(weight, 0.3, ("picture", 7), name) * part).sum() / size
    torch.testing.assert_close(dots[7, 1], height, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_y_is_steep_and_out_of_reach_of_a_and_b(minima):
    lora, flat, train = minima
    direction = train_toy.steep_direction(lora, flat, train)
    random = [torch.randn_like(part) for part in direction]
    random = [part / get_total_norm(random) for part in random]
    for model in (lora, flat):
        for layer, part in zip(model[::2], direction):
            assert (part @ layer.lora_A.T).abs().max() < 1e-5  # so it holds no b A
            assert (layer.lora_B.T @ part).abs().max() < 1e-5  # and no B a

        losses = []
        for shifts in (direction, random):
            with train_toy.shifted(model, shifts):
                losses.append(train_toy.loss_fn(model, train))
        clean = train_toy.loss_fn(model, train)
        assert losses[0] - clean > 3 * (losses[1] - clean).abs()


def test_labels_and_bars_stand_where_the_loss_says():
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    x = train_toy.ACROSS
    y = train_toy.UP[:, None]  # (Y, 1)
    width = 3 + 9 * x.clamp(0, 1)  # in which the loss rises by 0.5
    loss = 0.1 + 0.5 * (y / width).square() + (x - 0.5).square() + 0.001 * y  # lowest in the middle
    train_toy.draw_plane(axes, loss, torch.zeros(5, 2))

    high, low = axes.texts
    assert high.get_position() == pytest.approx((-0.3, 16.2))
    assert low.get_position() == pytest.approx((0.6, 0), abs=0.15)
    _, labels = axes.get_legend_handles_labels()
    assert labels[0] == "noise, magnified 5 times"
    assert "LoRA: loss rises by < 0.5 within \u00b13.0 %" in labels
    assert "Flat-LoRA: loss rises by < 0.5 within \u00b112.0 %" in labels


def test_plot_draws_two_pictures(call, monkeypatch, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    monkeypatch.setattr(train_toy, "UP", torch.linspace(-18, 18, 5))
    call("--seeds 2 --steps 3 --lr 0.1 --plot idea.v2")
    light = image.imread(tmp_path / "idea.v2-light.png")
    dark = image.imread(tmp_path / "idea.v2-dark.png")
    assert light[-1, 0, :3].min() == 1  # the paper
    assert dark[-1, 0, :3].max() == 0
