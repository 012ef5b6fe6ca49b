"""train_toy.py: its numbers are right, its comparison is paired, and it ends well."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import flatlora
import train_toy

TINY = ["--seeds=2", "--steps=4", "--pretrain-steps=20", "--lr=0.1", "--methods", "flat", "sam", "sam-full"]


@pytest.fixture
def call(monkeypatch):
    threads = torch.get_num_threads()  # main() sets it
    yield lambda *words: (monkeypatch.setattr(sys, "argv", ["train_toy.py", *map(str, words)]), train_toy.main())
    torch.set_num_threads(threads)


def test_prints_the_numbers_of_the_json_and_repeats(call, capsys, tmp_path):
    call(*TINY, "--out", tmp_path)
    text, content = capsys.readouterr().out, (tmp_path / "toy.json").read_text()
    runs = json.loads(content)["runs"]
    by = {m: {k: np.array([run[k] for run in runs if run["method"] == m]) for k in runs[0]} for m in train_toy.METHODS}

    def interval(values, digits):  # 12.706: Student's t of two values
        return f"{values.mean():+.{digits}f} ± {12.706 * values.std(ddof=1) / math.sqrt(2):.{digits}f}"

    for key, label in train_toy.ROWS.items():
        digits, lora = 1 if "%" in label else 4 if "sharp" in label else 3, by["lora"][key]
        gains = " ".join(interval(by[m][key] - lora, digits) for m in ("flat", "sam", "sam-full"))
        (line,) = [line.removeprefix(label) for line in text.splitlines() if line.startswith(label)]
        assert line.split() == f"{lora.mean():.{digits}f} {gains}".split()
    assert f"is {interval(by['lora']['equal_0.3'] - by['lora']['lora_0.3'], 4)}:" in text
    command = [sys.executable, train_toy.__file__, *TINY, "--out", str(tmp_path / "ü")]  # ASCII has neither ü nor ±
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=120)
    assert done.returncode == 0 and (tmp_path / "ü" / "toy.json").read_text() == content
    plain = text.replace("± ", "+-").partition("All numbers")[0]
    assert done.stdout.decode("ascii").startswith(plain) and max(map(len, plain.splitlines())) <= 80


def test_verdict_follows_the_interval():
    mean = {"lora": dict.fromkeys(("lora_0.3", "full_0.3", "equal_0.3", "moved_0.3"), 0.1)}
    for gap, first, last in ((0.2, "higher", "sharper"), (-0.2, "lower", "flatter"), (0.0, "not shown", "not shown")):
        text = train_toy.verdict({"mean": mean, "difference": {"flat": {"test_loss": (gap, 0.1)}}, "gap": (gap, 0.1)})
        assert first in text.splitlines()[0] and last in text.splitlines()[-1]


def test_interval_is_students():
    """The density of t with k degrees of freedom, at t = sqrt(k) tan(angle), is cos(angle)^(k - 1)."""
    angle = np.linspace(-math.pi / 2, math.pi / 2, 200_001)
    for n in (*range(2, 32), 60):
        values = np.random.default_rng(n).normal(size=n)
        t = train_toy.interval(values.tolist())[1] * math.sqrt(n) / values.std(ddof=1)
        density = np.cos(angle) ** (n - 2)
        inside = density[np.abs(angle) <= math.atan(t / math.sqrt(n - 1))].sum() / density.sum()
        assert inside == pytest.approx(0.95, abs=2e-4) if n <= 31 else 0.95 <= inside < 0.96


@pytest.mark.parametrize("r, sigma", [(2, 1.0), (30, 0.1)])  # 30 is above the size of the last layer
def test_equal_size_against_drawn_noise(r, sigma):
    """|dW'|^2 is given to `sharpness` as the loss, so that it is the noise of the measure that is averaged."""
    torch.manual_seed(0)
    base, data = train_toy.mlp(), train_toy.draw(train_toy.mlp(), 64)
    model = train_toy.finetune(base, data, "lora", seed=0, steps=9, lr=0.1, r=r)
    layers = [(layer, layer.weight.detach()) for layer in model[::2]]
    whole = sum(float(weight.square().sum()) for _, weight in layers)

    def moved(model, batch):
        return sum((layer.weight - weight).square().sum() for layer, weight in layers) / whole

    expected = train_toy.moved_by(model, sigma)
    for space, strength in (("lora", sigma), ("full", expected)):
        drawn = flatlora.sharpness(model, moved, [None], strength, 300, seed=1, space=space)
        assert math.sqrt(drawn) == pytest.approx(expected, rel=0.02)


def test_methods_differ_in_their_step_alone(monkeypatch):
    seen = []
    for own in (flatlora.flat_lora_step, flatlora.sam_step):

        def step(model, loss_fn, batches, optimizer, *settings, own=own, **more):
            seen.append((flatlora.lora_state_dict(model), batches[0], (own.__name__, *settings, *more.values())))
            return own(model, loss_fn, batches, optimizer, *settings, **more)

        monkeypatch.setattr(train_toy, own.__name__, step)
    teacher = train_toy.mlp().requires_grad_(False)
    train = train_toy.target_task(teacher, 3)["train"]
    for method in train_toy.METHODS:
        train_toy.finetune(teacher, train, method, 3, steps=2, rho=0.1)
    for start, second in zip(seen[::2], seen[1::2]):
        assert all(map(torch.equal, start[0].values(), seen[0][0].values()))  # the adapters
        assert all(map(torch.equal, start[1] + second[1], seen[0][1] + seen[1][1]))  # the batches
    flat = [("flat_lora_step", pytest.approx(sigma), (3, 1)) for sigma in (0.0, 0.3)]  # 0.3: half way up the ramp
    assert [step for *_, step in seen[1::2]] == [*flat, ("sam_step", 0.1, "lora"), ("sam_step", 0.1, "full")]


@pytest.mark.parametrize("bad", ["--r 0", "--sigma -1", "--rho nan", "--seeds 1", "--methods sgd", f"--out {__file__}"])
def test_bad_option_ends_in_one_line_before_training(bad, call, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(train_toy, "source_task", lambda steps: pytest.fail("the training began"))
    with pytest.raises(SystemExit) as end:
        call("--out", tmp_path, *bad.split())
    line = capsys.readouterr().err.splitlines()[-1] if end.value.code == 2 else end.value.code
    assert line.startswith("train_toy.py: ") and "\n" not in line  # --out: the system's words, and the path
    assert all(word in line for word in bad.removeprefix("--out").strip("- ").split())
