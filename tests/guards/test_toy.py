"""train_toy.py: its equations hold, its comparison is paired, it prints what it wrote, and it ends well."""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import flatlora
import train_toy

SCALING = 2.0  # of the adapters of `adapted`


def adapted(dtype=torch.float64):
    """The toy's network in the middle of a training: W' is not W."""
    torch.manual_seed(0)
    model = flatlora.inject_lora(train_toy.mlp().to(dtype), r=3, alpha=6)
    for layer in layers_of(model):
        nn.init.normal_(layer.lora_B, std=0.5)
    return model


def layers_of(model):
    return list(flatlora.lora_layers(model).values())


def two_batches(dtype=torch.float64):
    torch.manual_seed(1)
    x = torch.randn(2, 32, train_toy.INPUTS, dtype=dtype)
    y = torch.randint(train_toy.CLASSES, (2, 32))
    return [(x[0], y[0]), (x[1], y[1])]


def sgd(model, lr=0.1):
    return torch.optim.SGD(flatlora.lora_parameters(model), lr=lr)


def bytes_of(model):
    return [p.detach().view(torch.uint8).numpy().tobytes() for p in model.parameters()]


def trainable_names(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


# ---- SAM on W' -----------------------------------------------------------------------------------------------


def dense_loss(model, batches, shifts):
    """The mean loss at the weights W + s B A + shift, written out."""
    total = 0.0
    for x, y in batches:
        for layer, shift in zip(layers_of(model), shifts):
            weight = layer.base.weight + SCALING * layer.lora_B @ layer.lora_A + shift
            x = x @ weight.T + layer.base.bias
            if layer.out_features != train_toy.CLASSES:
                x = x.relu()
        total = total + nn.functional.cross_entropy(x, y) / len(batches)
    return total


@pytest.mark.parametrize("rho", [0.3, 0.0])  # with 0 it is plain LoRA
def test_sam_on_merged_is_the_two_pass_formula(rho):
    model = adapted()
    batches = two_batches()
    zeros = [torch.zeros_like(layer.base.weight).requires_grad_() for layer in layers_of(model)]
    clean = dense_loss(model, batches, zeros)
    by_weight = torch.autograd.grad(clean, zeros)
    norm = math.sqrt(sum(g.square().sum().item() for g in by_weight))  # over all layers
    worst = [rho * g / norm for g in by_weight]
    expected = torch.autograd.grad(dense_loss(model, batches, worst), flatlora.lora_parameters(model))

    loss = train_toy.sam_on_merged_step(model, train_toy.loss_fn, batches, sgd(model, lr=0), rho)

    assert loss == pytest.approx(clean.item())
    torch.testing.assert_close([p.grad for p in flatlora.lora_parameters(model)], list(expected))


def test_sam_on_merged_clips():
    model = adapted()
    before = [p.detach().clone() for p in flatlora.lora_parameters(model)]
    train_toy.sam_on_merged_step(model, train_toy.loss_fn, two_batches(), sgd(model, lr=1.0), 0.3, max_grad_norm=0.01)
    steps = [p.detach() - old for p, old in zip(flatlora.lora_parameters(model), before)]
    length = math.sqrt(sum(step.square().sum().item() for step in steps))
    assert length == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("failing", [1, 2, 3, 4])  # two batches in each of two passes
def test_sam_on_merged_leaves_every_bit_when_it_is_interrupted(failing):
    model = adapted()
    before = bytes_of(model)
    trainable = trainable_names(model)
    calls = []

    def interrupted(model, batch):
        calls.append(batch)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return train_toy.loss_fn(model, batch)

    with pytest.raises(KeyboardInterrupt):
        train_toy.sam_on_merged_step(model, interrupted, two_batches(), sgd(model), 0.3)

    assert bytes_of(model) == before
    assert trainable_names(model) == trainable
    assert all(layer.noise is None for layer in layers_of(model))


def test_sam_on_merged_writes_a_and_b_alone():
    model = adapted()
    frozen = [layer.base for layer in layers_of(model)]
    before = [bytes_of(linear) for linear in frozen]
    train_toy.sam_on_merged_step(model, train_toy.loss_fn, two_batches(), sgd(model), 0.3)
    assert [bytes_of(linear) for linear in frozen] == before
    assert all(p.grad is None for linear in frozen for p in linear.parameters())
    assert all(layer.noise is None for layer in layers_of(model))


def test_a_shift_ends_with_its_context():
    model = adapted()
    shifts = [torch.ones_like(layer.base.weight) for layer in layers_of(model)]
    with pytest.raises(KeyboardInterrupt), train_toy.shifted(model, shifts):
        raise KeyboardInterrupt
    assert all(layer.noise is None for layer in layers_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sam_on_merged_refuses_half_precision(dtype):
    model = adapted(dtype)
    before = bytes_of(model)
    with pytest.raises(ValueError, match=f"float32 or float64, {dtype} would round"):
        train_toy.sam_on_merged_step(model, train_toy.loss_fn, two_batches(dtype), sgd(model), 0.3)
    assert bytes_of(model) == before


def test_sam_on_merged_stands_still_where_the_gradient_is_zero():
    model = adapted()
    before = bytes_of(model)

    def level(model, batch):
        return 0 * train_toy.loss_fn(model, batch)

    train_toy.sam_on_merged_step(model, level, two_batches(), sgd(model), 0.3)
    assert bytes_of(model) == before


def test_sam_on_merged_leaves_an_unused_layer_alone():
    model = adapted()
    first, *unused = layers_of(model)
    before = [bytes_of(layer) for layer in unused]

    def loss_of_the_first_layer(model, batch):
        x, _ = batch
        return first(x).square().mean()

    train_toy.sam_on_merged_step(model, loss_of_the_first_layer, two_batches(), sgd(model), 0.3)
    assert [bytes_of(layer) for layer in unused] == before


@pytest.mark.parametrize("rho", [-0.1, math.inf, math.nan])
def test_sam_on_merged_refuses_a_wrong_rho(rho):
    model = adapted()
    with pytest.raises(ValueError, match=f"rho must be a finite number >= 0, got {rho}"):
        train_toy.sam_on_merged_step(model, train_toy.loss_fn, two_batches(), sgd(model), rho)


def test_sam_on_merged_refuses_a_loss_that_is_no_number():
    model = adapted()
    before = bytes_of(model)
    x, y = two_batches()[0]
    with pytest.raises(FloatingPointError, match="the loss is not finite: nan"):
        train_toy.sam_on_merged_step(model, train_toy.loss_fn, [(x * math.nan, y)], sgd(model), 0.3)
    assert bytes_of(model) == before


# ---- Noise on A and B ----------------------------------------------------------------------------------------


def distance_from_here(model):
    """A loss whose rise under noise is |dW'|^2 over all layers."""
    here = [layer.weight.detach() for layer in layers_of(model)]

    def loss_fn(model, batch):
        return sum((layer.weight - start).square().sum() for layer, start in zip(layers_of(model), here))

    return loss_fn


def whole(model):
    return sum(layer.weight.square().sum().item() for layer in layers_of(model))


def fresh_noise(weight, sigma):
    """Eq. 7 as it stands in the paper."""
    rows = []
    for row in weight.detach():
        std = sigma * row.norm() / math.sqrt(len(row))
        rows.append(std * torch.randn(len(row), dtype=weight.dtype))
    return torch.stack(rows)


def mean_square_of_fresh_noise(model, sigma, draws=200):
    total = 0.0
    for layer in layers_of(model):
        product = layer.lora_B @ layer.lora_A
        for _ in range(draws):
            b = fresh_noise(layer.lora_B, sigma)
            a = fresh_noise(layer.lora_A, sigma)
            moved = (layer.lora_B + b) @ (layer.lora_A + a)
            total += (SCALING * (moved - product)).square().sum().item() / draws
    return total


def test_noise_on_factors_has_the_law_of_equation_7():
    model = adapted()
    expected = mean_square_of_fresh_noise(model, sigma=0.3)
    rise = train_toy.sharpness_on_factors(model, distance_from_here(model), [None], 0.3, samples=200, seed=0)
    moved = train_toy.moved_by(model, 0.3)

    assert rise == pytest.approx(expected, rel=0.04)
    assert moved == pytest.approx(math.sqrt(expected / whole(model)), rel=0.02)


@pytest.mark.parametrize("r, sigma", [(2, 1.0), (30, 0.1)])  # 30 is above the size of the last layer
def test_noise_on_w_prime_of_strength_moved_by_moves_it_as_far(r, sigma):
    torch.manual_seed(0)
    model = flatlora.inject_lora(train_toy.mlp(), r=r)
    for layer in layers_of(model):
        nn.init.normal_(layer.lora_B, std=0.1)

    equal = train_toy.moved_by(model, sigma)
    on_factors = train_toy.sharpness_on_factors(model, distance_from_here(model), [None], sigma, 200, seed=1)
    on_merged = flatlora.sharpness(model, distance_from_here(model), [None], equal, 200, seed=1)

    assert on_factors == pytest.approx(equal**2 * whole(model), rel=0.04)
    assert on_merged == pytest.approx(equal**2 * whole(model), rel=0.04)


def test_noise_on_factors_has_one_direction_per_sample_at_every_sigma():
    model = adapted()
    start = flatlora.lora_state_dict(model)["2.lora_B"]
    seen = []

    def recording(model, batch):
        seen.append(layers_of(model)[1].lora_B.detach() - start)
        return train_toy.loss_fn(model, batch)

    for sigma in (0.1, 0.2):
        train_toy.sharpness_on_factors(model, recording, two_batches()[:1], sigma, samples=2, seed=0)
    clean, first, second, _, twice_first, twice_second = seen

    assert clean.count_nonzero() == 0
    torch.testing.assert_close([twice_first, twice_second], [2 * first, 2 * second])
    assert torch.cosine_similarity(first.flatten(), second.flatten(), dim=0).abs() < 0.3


def test_noise_on_factors_is_seeded_by_the_name_of_each(monkeypatch):
    model = adapted()
    draw = flatlora.draw_noise
    names = []

    def recorded(factor, sigma, seed, name):
        names.append(name)
        return draw(factor, sigma, seed, name)

    monkeypatch.setattr(flatlora, "draw_noise", recorded)
    train_toy.sharpness_on_factors(model, train_toy.loss_fn, two_batches(), 0.3, samples=1, seed=0)
    assert names == trainable_names(model)


def test_sharpness_on_factors_is_a_mean_rise_after_which_every_bit_is_back():
    model = adapted()
    before = bytes_of(model)
    losses = []

    def recording(model, batch):
        losses.append(train_toy.loss_fn(model, batch))
        return losses[-1]

    rise = train_toy.sharpness_on_factors(model, recording, two_batches(), 0.3, samples=3, seed=0)

    by_batch = torch.stack(losses).view(4, 2)  # without noise, and three samples
    clean, *noisy = by_batch.mean(1).tolist()
    assert rise == pytest.approx(sum(noisy) / 3 - clean)
    assert bytes_of(model) == before


def test_noise_on_factors_leaves_every_bit_when_it_is_interrupted():
    model = adapted()
    before = bytes_of(model)
    calls = []

    def interrupted(model, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train_toy.loss_fn(model, batch)

    with pytest.raises(KeyboardInterrupt):
        train_toy.sharpness_on_factors(model, interrupted, two_batches()[:1], 0.3, samples=2, seed=0)
    assert bytes_of(model) == before


# ---- The comparison ------------------------------------------------------------------------------------------

STEPS = {
    "flat_lora_step": flatlora.flat_lora_step,
    "sam_step": flatlora.sam_step,
    "sam_on_merged_step": train_toy.sam_on_merged_step,
}


def steps_of(method, monkeypatch):
    """What each step of a fine-tuning gets: (its function, the adapters, x and y, its settings)."""
    seen = []
    inside = []  # the merged step calls another, which is not to count

    def recorded(name):
        def step(model, loss_fn, batches, optimizer, *settings):
            if not inside:
                seen.append((name, flatlora.lora_state_dict(model), batches[0], settings))
            inside.append(name)
            STEPS[name](model, loss_fn, batches, optimizer, *settings)
            inside.pop()

        return step

    for name in STEPS:
        module = train_toy if name == "sam_on_merged_step" else flatlora
        monkeypatch.setattr(module, name, recorded(name))
    torch.manual_seed(0)
    teacher = train_toy.mlp().requires_grad_(False)
    train = train_toy.target_task(teacher, 3)["train"]
    torch.manual_seed(len(method))  # which must not matter
    train_toy.finetune(teacher, train, method, 3, train_toy.Settings(steps=2, rho=0.1))
    return seen


EXPECTED = {  # the function and the settings of the second of two steps, half way up the ramp
    "lora": ("flat_lora_step", (0.0, (3, 1))),
    "flat": ("flat_lora_step", (pytest.approx(0.3), (3, 1))),
    "sam": ("sam_step", (0.1,)),
    "sam-full": ("sam_on_merged_step", (0.1,)),
}


@pytest.mark.parametrize("method", EXPECTED)
def test_methods_differ_in_their_step_alone(method, monkeypatch):
    lora = steps_of("lora", monkeypatch)
    own = steps_of(method, monkeypatch)

    adapters = own[0][1]
    assert all(torch.equal(adapters[name], p) for name, p in lora[0][1].items())
    for (_, _, batch, _), (_, _, lora_batch, _) in zip(own, lora, strict=True):
        assert all(map(torch.equal, batch, lora_batch))
    assert not torch.equal(own[0][2][0], own[1][2][0])  # a batch of its own for each step
    assert (own[1][0], own[1][3]) == EXPECTED[method]


def run_of(method, seed, value):
    keys = ["test_loss", "equal_0.3", "lora_0.3"]
    return {"method": method, "seed": seed, **dict.fromkeys(keys, value)}


def test_differences_are_paired():
    lora = [run_of("lora", 0, 1.0), run_of("lora", 1, 5.0)]
    flat = [run_of("flat", 0, 1.1), run_of("flat", 1, 5.3)]
    mixed = [lora[0], flat[0], lora[1], flat[1]]
    summary = train_toy.summarise(mixed, ["lora", "flat"])
    assert summary["mean"]["flat"]["test_loss"] == pytest.approx(3.2)
    assert summary["difference"]["flat"]["test_loss"] == pytest.approx((0.2, 12.706 * 0.1))  # t of two values


def test_interval_is_students():
    """The density of t with k degrees of freedom, at t = sqrt(k) tan(angle), is cos(angle)^(k - 1)."""
    angle = np.linspace(-math.pi / 2, math.pi / 2, 200_001)
    for n in [*range(2, 32), 60]:
        values = np.random.default_rng(n).normal(size=n)
        mean, half = train_toy.interval(values.tolist())
        t = half * math.sqrt(n) / values.std(ddof=1)
        density = np.cos(angle) ** (n - 2)
        within = np.abs(angle) <= math.atan(t / math.sqrt(n - 1))
        share = density[within].sum() / density.sum()
        assert mean == pytest.approx(values.mean())
        if n <= 31:
            assert share == pytest.approx(0.95, abs=2e-4)
        else:
            assert 0.95 <= share < 0.96


JUDGED = {  # (mean, half width) and the word
    (0.2, 0.1): "higher",
    (-0.2, 0.1): "lower",
    (0.0, 0.1): "not shown to differ",
    (-0.1, 0.15): "not shown to differ",
    (0.0, 0.0): "not shown to differ",
    (0.1, 0.11): "undecided",
    (-0.1, 0.09): "undecided",
}


@pytest.mark.parametrize("difference", JUDGED)
def test_the_verdict_follows_the_interval(difference):
    word = JUDGED[difference]
    mean = {"lora": dict.fromkeys(["lora_0.3", "full_0.3", "equal_0.3", "moved_0.3"], 0.1)}
    summary = {"mean": mean, "difference": {"flat": {"test_loss": difference}}, "gap": difference}
    first, *_, last = train_toy.verdict(summary).splitlines()
    assert first == f"Test loss of flat (one pass per step) against LoRA's: {word}."
    in_space = {"higher": "sharper, as in Figure 1", "lower": "flatter, against Figure 1"}
    assert last == f"space against LoRA space: {in_space.get(word, word)}."


# ---- What is printed -----------------------------------------------------------------------------------------

TINY = ["--seeds=2", "--steps=4", "--pretrain-steps=20", "--lr=0.1", "--methods", "flat", "sam", "sam-full"]


@pytest.fixture
def call(monkeypatch):
    threads = torch.get_num_threads()  # main() sets it

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["train_toy.py", *map(str, words)])
        train_toy.main()

    yield call
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """What a tiny run printed, without the line that names the file, and the bytes of the file."""
    out = tmp_path_factory.mktemp("tiny")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["train_toy.py", *TINY, "--out", str(out)])
        train_toy.main()
    text, _, _ = printed.getvalue().partition("All numbers")
    return text, (out / "toy.json").read_bytes()


def values(content, method, key):
    return np.array([run[key] for run in content["runs"] if run["method"] == method])


def as_printed(differences, digits):
    half = 12.706 * differences.std(ddof=1) / math.sqrt(2)  # Student's t of two values
    return f"{differences.mean():+.{digits}f} ± {half:.{digits}f}"


def test_the_table_shows_the_numbers_of_the_json(tiny_run):
    text, file = tiny_run
    content = json.loads(file)
    for key, (label, digits) in train_toy.ROWS.items():
        lora = values(content, "lora", key)
        cells = [f"{lora.mean():.{digits}f}"]
        for method in ("flat", "sam", "sam-full"):
            cells.append(as_printed(values(content, method, key) - lora, digits))
        (line,) = [line for line in text.splitlines() if line.startswith(label)]
        assert line.removeprefix(label).split() == " ".join(cells).split()

    gap = values(content, "lora", "equal_0.3") - values(content, "lora", "lora_0.3")
    assert f"is {as_printed(gap, 4)}." in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_run_repeats_and_ascii_shows_what_it_can(tiny_run, call, tmp_path):
    text, file = tiny_run
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    with contextlib.redirect_stdout(stream):
        call(*TINY, "--out", tmp_path / "ü")
    stream.flush()
    assert stream.buffer.getvalue().decode("ascii").startswith(text.replace("± ", "+-"))
    (written,) = (tmp_path / "ü").iterdir()
    assert written.name == "toy.json"
    assert written.read_bytes() == file


def test_the_measures_are_those_of_their_splits():
    model = adapted(torch.float32).eval()
    splits = {name: batch for name, batch in zip(["train", "test"], two_batches(torch.float32))}
    result = train_toy.measure(model, splits, seed=5, samples=2)

    logits = model(splits["test"][0])
    right = logits.argmax(1) == splits["test"][1]
    assert result["test_acc"] == pytest.approx(100 * right.sum().item() / 32)
    assert result["test_loss"] == pytest.approx(train_toy.loss_fn(model, splits["test"]).item())
    train = (model, train_toy.loss_fn, [splits["train"]])
    moved = train_toy.moved_by(model, 0.3)
    assert result["moved_0.3"] == moved
    assert result["lora_0.3"] == train_toy.sharpness_on_factors(*train, 0.3, 2, 5)
    assert result["full_0.3"] == flatlora.sharpness(*train, 0.3, 2, 5)
    assert result["equal_0.3"] == flatlora.sharpness(*train, moved, 2, 5)


def test_the_landscape_puts_each_letter_at_its_height_above_its_sigma():
    rises = {f"{space}_{sigma}": sigma for space in train_toy.SPACES for sigma in train_toy.STRENGTHS}
    falls = dict.fromkeys(rises, -1.0)
    lines = train_toy.chart({"lora": rises, "sam-full": falls}, height=4).splitlines()
    assert lines == [
        "rise    LoRA space            full space            full, equal |dW'|",
        "0.600 |                L    |                L    |                L",
        "0.450 |           L         |           L         |           L",
        "0.300 |      L              |      L              |      L",
        "0.150 | L                   | L                   | L",
        "0.000 | W    W    W    W    | W    W    W    W    | W    W    W    W",
        "sigma   0.15 0.3  0.45 0.6    0.15 0.3  0.45 0.6    0.15 0.3  0.45 0.6",
        "       L lora, W sam-full",
    ]


def test_help_fits_80_columns(call, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        call("-h")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 50


# ---- How it ends ---------------------------------------------------------------------------------------------

WRONG = {  # options, and what the one line must hold
    "--r 0": "--r must be from 1 to 1000, got 0",
    "--r 1000000000000": "--r must be from 1 to 1000, got 1000000000000",
    "--steps 1000000000000": "--steps must be from 2 to 1000000, got",
    "--pretrain-steps 1": "--pretrain-steps must be from 2 to 1000000, got 1",
    "--seeds 1": "--seeds must be from 2 to 10000, got 1",
    "--seeds 1e3": "argument --seeds: invalid int value: '1e3'",
    "--lr 1e38": "--lr must be from 0 to 100, got 1e+38",
    "--alpha 0": "alpha > 0",
    "--dropout 1": "0 <= dropout < 1",
    "--sigma -1": "--sigma must be from 0 to 100, got -1.0",
    "--rho nan": "--rho must be from 0 to 1000, got nan",
    "--methods sgd": "argument --methods: invalid choice: 'sgd'",
    "--schedule linear": "argument --schedule: invalid choice: 'linear'",
    "--out FILE": "FILE",
    "--out FOLDER": "toy.json is a folder",
    "--plot FILE/picture": "FILE",
    "--plot FOLDER --sigma 0": "--plot needs --sigma and --lr above 0",
    "--plot FOLDER --lr 0": "--plot needs --sigma and --lr above 0",
    "--plot FOLDER --r 32": "--plot needs --r below 32",
}


@pytest.mark.parametrize("options", WRONG)
def test_a_wrong_option_ends_in_one_line_before_the_training(options, call, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_toy, "source_task", lambda steps: pytest.fail("the training began"))
    monkeypatch.setattr(train_toy, "import_matplotlib", lambda: None)  # of which only the drawing has need
    Path("FILE").write_text("")
    Path("FOLDER/toy.json").mkdir(parents=True)
    with pytest.raises(SystemExit) as end:
        call(*options.split())

    line = end.value.code
    if line == 2:  # argparse has printed it
        line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("train_toy.py: ")
    assert WRONG[options] in line
    assert "\n" not in line


def test_a_folder_that_takes_no_file_ends_in_one_line_before_the_training(call, monkeypatch, tmp_path):
    def full(dir):
        raise OSError("no space left")

    monkeypatch.setattr(train_toy, "source_task", lambda steps: pytest.fail("the training began"))
    monkeypatch.setattr(train_toy.tempfile, "TemporaryFile", full)
    with pytest.raises(SystemExit, match=r"^train_toy.py: no space left$"):
        call("--out", tmp_path)


def test_a_training_that_diverges_ends_in_one_line(call, tmp_path):
    with pytest.raises(SystemExit, match=r"^train_toy.py: the [a-z ]+ is not finite: [a-z]+$"):
        call("--seeds=2", "--steps=300", "--pretrain-steps=2", "--lr=100", "--alpha=1000", "--out", tmp_path)


def test_plot_without_matplotlib_says_what_to_install(call, monkeypatch, tmp_path):
    monkeypatch.setattr(train_toy, "source_task", lambda steps: pytest.fail("the training began"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with pytest.raises(SystemExit, match=r"^train_toy.py: --plot needs matplotlib: pip install matplotlib$"):
        call("--out", tmp_path, "--plot", tmp_path / "picture")


def test_ctrl_c_ends_in_one_line(call, monkeypatch, tmp_path):
    def interrupted(steps):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_toy, "source_task", interrupted)
    with pytest.raises(SystemExit, match=r"^\ntrain_toy.py: stopped$"):
        call("--out", tmp_path)


def test_ctrl_c_during_the_import_ends_in_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, train_toy.__file__], env=environment, capture_output=True, text=True)
    assert done.stderr.strip() == "train_toy.py: stopped"
    assert done.returncode == 1


def test_an_interrupted_write_leaves_the_earlier_file(monkeypatch, tmp_path):
    path = tmp_path / "toy.json"
    path.write_text("earlier")

    def full(self, text, encoding):
        with self.open("w") as file:
            file.write(text[:3])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        train_toy.write(path, "new text")
    assert path.read_text() == "earlier"


# ---- The picture ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_minima():
    """A student after LoRA and after Flat-LoRA, and their training data."""
    torch.manual_seed(0)
    student = train_toy.mlp().requires_grad_(False)
    train = train_toy.target_task(train_toy.mlp().requires_grad_(False), 0)["train"]
    settings = train_toy.Settings(steps=20, lr=0.02)
    lora = train_toy.finetune(student, train, "lora", 0, settings)
    flat = train_toy.finetune(student, train, "flat", 0, settings)
    return lora, flat, train


def test_the_slice_has_lora_at_0_and_flat_lora_at_1(two_minima, monkeypatch):
    lora, flat, train = two_minima
    monkeypatch.setattr(train_toy, "ACROSS", torch.tensor([0.0, 0.5, 1.0]))
    monkeypatch.setattr(train_toy, "UP", torch.tensor([0.0, 0.1]))
    plane = train_toy.slice_of_loss(lora, flat, train, sigma=0.6)

    assert plane.loss[0, 0].item() == pytest.approx(train_toy.loss_fn(lora, train).item())
    assert plane.loss[0, 2].item() == pytest.approx(train_toy.loss_fn(flat, train).item())

    middle = layers_of(lora)
    ends = layers_of(flat)
    worst = train_toy.worst_out_of_reach(lora, flat, train)
    x, y = train
    for layer, end, direction in zip(middle, ends, worst):
        A = (layer.lora_A + end.lora_A) / 2
        B = (layer.lora_B + end.lora_B) / 2
        weight = layer.base.weight + layer.scaling * B @ A + plane.y[1] * direction
        x = x @ weight.T + layer.base.bias
        if layer is not middle[-1]:
            x = x.relu()
    assert plane.loss[1, 1].item() == pytest.approx(nn.functional.cross_entropy(x, y).item(), rel=1e-4)


def test_y_is_out_of_reach_of_small_steps_of_a_and_b(two_minima):
    lora, flat, train = two_minima
    direction = train_toy.worst_out_of_reach(lora, flat, train)
    assert sum(part.square().sum().item() for part in direction) == pytest.approx(1.0)
    for model in (lora, flat):
        for layer, part in zip(layers_of(model), direction):
            by_b = torch.randn_like(layer.lora_B) @ layer.lora_A
            by_a = layer.lora_B @ torch.randn_like(layer.lora_A)
            assert abs((by_b * part).sum().item()) < 1e-4 * by_b.norm().item()
            assert abs((by_a * part).sum().item()) < 1e-4 * by_a.norm().item()


def rise_along(model, train, direction):
    base = train_toy.loss_fn(model, train).item()
    rises = []
    for sign in (1.0, -1.0):
        with train_toy.shifted(model, [sign * part for part in direction]):
            rises.append(train_toy.loss_fn(model, train).item() - base)
    return max(rises)


def test_y_is_steeper_than_random_directions_out_of_reach(two_minima):
    lora, flat, train = two_minima
    worst = train_toy.worst_out_of_reach(lora, flat, train)
    torch.manual_seed(0)
    for _ in range(10):
        normals = [torch.randn_like(part) for part in worst]
        parts = [train_toy.out_of_reach(*three) for three in zip(normals, layers_of(lora), layers_of(flat))]
        length = train_toy.total_norm(parts)
        random = [part / length for part in parts]
        assert rise_along(lora, train, worst) > 2 * rise_along(lora, train, random)
        assert rise_along(flat, train, worst) > 2 * rise_along(flat, train, random)


def test_the_dots_are_as_wide_as_the_noise_in_the_plane(two_minima):
    """The variance of noise along a direction d is the sum over rows of sigma^2 |W'_i|^2 / n |d_i|^2."""
    lora, flat, train = two_minima
    worst = train_toy.worst_out_of_reach(lora, flat, train)
    dots = train_toy.noise_in_plane(lora, flat, worst, sigma=0.6)

    var_x = 0.0
    var_y = 0.0
    length = 0.0
    for start, end, along_y in zip(layers_of(lora), layers_of(flat), worst):
        step = 1e-3  # W' before the end of the line, for the direction of x by differences
        A = end.lora_A - step * (end.lora_A - start.lora_A)
        B = end.lora_B - step * (end.lora_B - start.lora_B)
        along_x = (end.weight - end.base.weight - end.scaling * B @ A) / step
        variances = 0.6**2 * end.weight.square().sum(1) / end.in_features  # (m,)
        var_x += (variances @ along_x.square().sum(1)).item()
        var_y += (variances @ along_y.square().sum(1)).item()
        length += along_x.square().sum().item()
    expected = torch.tensor([math.sqrt(var_x) / length, math.sqrt(var_y)])

    torch.testing.assert_close(dots.square().mean(0).sqrt(), expected, rtol=0.2, atol=0)


def test_bars_end_where_the_loss_has_risen():
    y = torch.linspace(-2, 2, 41)
    loss = torch.stack([4 * y**2, y**2 / 8], dim=1)  # (Y, 2)
    plane = train_toy.Plane(torch.tensor([0.0, 1.0]), y, loss, torch.zeros(1, 2))
    lora = train_toy.bar(plane, 0.0)
    flat = train_toy.bar(plane, 1.0)
    assert lora == pytest.approx((-0.4, 0.4))  # 4 y^2 = 0.5 at 0.35
    assert flat == pytest.approx((-2.0, 2.0))


def test_valleys_are_called_narrow_only_if_they_are():
    wide = (-1.0, 1.0)
    narrow = (-0.5, 0.5)
    assert train_toy.described([narrow, wide]) == ["LoRA:\nnarrow valley", "Flat-LoRA:\nwide valley"]
    assert train_toy.described([wide, narrow]) == ["LoRA:\nwide valley", "Flat-LoRA:\nnarrow valley"]
    assert train_toy.described([wide, wide]) == ["LoRA", "Flat-LoRA"]


def test_plot_writes_two_pictures(call, monkeypatch, capsys, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    monkeypatch.setattr(train_toy, "ACROSS", torch.tensor([0.0, 0.5, 1.0]))
    monkeypatch.setattr(train_toy, "UP", torch.linspace(-0.1, 0.1, 5))
    call(*TINY[:-2], "--out", tmp_path, "--plot", tmp_path / "new" / "idea.v2")
    light = image.imread(tmp_path / "new" / "idea.v2-light.png")
    dark = image.imread(tmp_path / "new" / "idea.v2-dark.png")
    assert light.shape[:2] == dark.shape[:2] == (688, 960)
    assert light[-1, 0, :3].min() == 1.0  # the paper
    assert dark[-1, 0, :3].max() < 0.1
    assert "idea.v2-dark.png" in capsys.readouterr().out
