"""train_gpt2.py: it is what -h says, reads the data that it is given, compares like with like, prints what it wrote."""

import argparse
import ast
import importlib
import io
import math
import pickle
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from running import TINY, base_of, only, results, run

import flatlora
import train_gpt2


@pytest.mark.parametrize("file", ["flatlora.py", "train_toy.py", "train_gpt2.py"])
def test_arrows_point_one_way(file):
    """What is imported before a run; libraries of an extra are imported where they are used."""
    text = Path(train_gpt2.__file__).with_name(file).read_text("utf-8")
    nodes = []
    for node in ast.parse(text).body:
        nodes += node.body if isinstance(node, ast.Try) else [node]  # Ctrl-C during the imports is caught
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    names -= sys.stdlib_module_names | {"numpy", "tqdm"}
    assert names == ({"torch"} if file == "flatlora.py" else {"torch", "flatlora"})


def test_help_fits_two_screens_and_shows_every_option(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        run(tmp_path, "-h")
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  -") for line in lines) == 25
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 80


# ---- Arguments -----------------------------------------------------------------------------------------------
WRONG = {
    "--out SHORT": "SHORT",
    "--text nowhere": "nowhere cannot be used: FileNotFoundError: [Errno 2] No such file",
    "--text SHORT": "the val text cannot be used: ValueError: it has 8 tokens, the model 16 places: too few",
    "--text EMPTY": "the train text cannot be used: ValueError: it has 0 tokens",
    "--data BINS": "--data needs --init",
    "--peft": "--peft needs --init",
    "--text SHORT --data BINS --init x": "give one of them",
    "--alpha 0": "alpha > 0",
    "--alpha nan": "--alpha must be from 0 to 1000000, got nan",
    "--lora-dropout 1": "0 <= dropout < 1",
    "--sigma -1": "--sigma must be from 0 to 1000000, got -1.0",
    "--rho nan": "--rho must be from 0 to 1000000, got nan",
    "--lr 1e38": "--lr must be from 0 to 1000000, got 1e+38",
    "--r 0": "--r must be from 1 to 1000000, got 0",
    "--steps 1000000000000": "--steps must be from 1 to 1000000, got 1000000000000",
    # the next two of argparse, after the usage
    "--r x": "--r: invalid int value: 'x'",
    "--rr 1": "unrecognized arguments: --rr 1",
}


def write_inputs():
    Path("SHORT").write_bytes(b"x" * 40)
    Path("EMPTY").write_bytes(b"")
    text = np.frombuffer(b"some text of a few words" * 20, np.uint8)
    inputs = {
        "BINS": np.arange(40, 340, dtype=np.uint16).tobytes(),
        "ODD": b"x" * 301,
        "META": text.astype(np.uint16).tobytes(),
        "CHARACTERS": (text % 65).astype(np.uint16).tobytes() + bytes(50),
        "UINT32": (text.astype(np.uint32) * 300).tobytes(),
    }
    for folder, content in inputs.items():
        Path(folder).mkdir()
        Path(folder, "train.bin").write_bytes(content)
        Path(folder, "val.bin").write_bytes(content)
    Path("META", "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 65}))


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_option_ends_in_one_line_before_the_first_step(words, monkeypatch, capsys, tmp_path):
    def step(*_):
        raise AssertionError("a step was taken")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt2, "plain_step", step)
    write_inputs()
    with pytest.raises(SystemExit) as end:
        run("out", *TINY, "flat", *words.split())
    printed = capsys.readouterr()
    line = printed.err.splitlines()[-1] if end.value.code == 2 else end.value.code
    assert line.startswith("train_gpt2.py: ")
    assert WRONG[words] in line
    assert "\n" not in line
    assert printed.out == ""


TOKENS = {
    "nowhere": "train.bin cannot be used: FileNotFoundError: [Errno 2] No such file",
    "ODD": "train.bin cannot be used: ",
    "META": "META has a meta.pkl, so its tokens are characters",
    "CHARACTERS": "its tokens look like characters",
    "UINT32": "every second number is 0 or 1, as in uint32",
}


@pytest.mark.parametrize("folder", TOKENS)
def test_token_files_of_another_model_are_an_error(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_inputs()
    with pytest.raises(ValueError) as error:
        train_gpt2.load_tokens(Path(folder))
    assert TOKENS[folder] in str(error.value)


def test_a_token_beyond_the_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="it has the token 256, the model only 256 of them"):
        train_gpt2.check_ids(np.arange(257), train_gpt2.GPTConfig(1, 1, 16, 16), 16)


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii"])
def test_a_stream_shows_what_it_can_after_the_results_are_written(encoding, monkeypatch, tmp_path):
    class Stream(io.BytesIO):
        def write(self, content):
            assert list((tmp_path / "ü☃").glob("results-*"))
            return super().write(content)

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Stream(), encoding))
    run(tmp_path / "ü☃", *TINY, "lora", "--prompt=☃")
    sys.stdout.flush()
    assert "ü☃/results".encode(encoding, "replace") in sys.stdout.buffer.getvalue()


# ---- Like with like ------------------------------------------------------------------------------------------
METHODS = {"lora": "flat_lora_step", "dropout": "flat_lora_step", "flat": "flat_lora_step"}
METHODS |= {"sam": "sam_step"}


def test_methods_share_adapters_and_data_and_never_write_the_base(monkeypatch, tmp_path):
    bases = []
    train = train_gpt2.train

    def recorded(base, *rest):
        bases.append(base)
        return train(base, *rest)

    monkeypatch.setattr(train_gpt2, "train", recorded)
    steps = run(tmp_path, *TINY, *METHODS)[2:]  # without those of the pre-training
    assert [name for name, *_ in steps[::3]] == list(METHODS.values())
    first = steps[0]
    for _, before, batches, _ in steps[::3]:
        assert all(map(torch.equal, batches[0], first[2][0]))
        assert before.keys() == first[1].keys()
        assert all(torch.equal(p, first[1][name]) for name, p in before.items())
    assert not torch.equal(steps[0][2][0][0], steps[1][2][0][0])

    sigmas = [[settings[0] for _, _, _, settings in steps[i : i + 3]] for i in (0, 3, 6)]
    growing = [pytest.approx(0.1 * (1 - math.cos(math.pi * t / 3))) for t in range(3)]
    assert sigmas == [[0, 0, 0], [0, 0, 0], growing]
    assert steps[9][3] == (0.2, 1.0)  # rho, max_grad_norm
    assert bases[1] is bases[-1]
    assert all(map(torch.equal, bases[1].parameters(), base_of(tmp_path).parameters()))


def slow_run(base, data, method, seed, recipe):
    """What `train` does, as plainly as it can be said: one micro-batch per step."""
    torch.manual_seed(seed)
    rate = recipe.lora_dropout if method == "dropout" else 0
    model = flatlora.inject_lora(base, recipe.r, recipe.alpha, rate, train_gpt2.TARGETS).train()
    parameters = flatlora.lora_parameters(model)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0)
    for step in range(recipe.steps):
        draw = np.random.default_rng([seed, step, 0])
        (starts,) = draw.integers(len(data) - 16, size=(1, recipe.batch_size))
        torch.manual_seed(int(draw.integers(2**63)))
        text = torch.stack([data[i : i + 17] for i in starts]).long()
        optimizer.param_groups[0]["lr"] = train_gpt2.learning_rate(step, recipe.steps, recipe.lr)
        optimizer.zero_grad()
        grow = (1 - math.cos(math.pi * step / recipe.steps)) / 2
        with flatlora.perturbed(model, recipe.sigma * grow if method == "flat" else 0, (seed, step, 0)):
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
                logits = model(text[:, :-1])
            F.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return model


CHANGES = [{}, {"dtype": "bfloat16"}, {"lr": 0.5}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("method", ["dropout", "flat"])
def test_a_run_is_that_of_the_slow_loop(method, change, monkeypatch, tmp_path):
    """Windows, dropout and noise of each step, the clipping and every setting: another step gives other weights."""
    settings = {"steps": 4, "lr": 0.05, "batch_size": 2, "block_size": 16, "r": 2, "sigma": 2.0, "lora_dropout": 0.5}
    recipe = train_gpt2.Recipe(**(settings | change))
    torch.manual_seed(1)
    base = train_gpt2.GPT(train_gpt2.GPTConfig(1, 1, 16, 16))
    for p in base.parameters():
        p.data *= 20  # so that gradients are longer than 1 and clipping counts
    data = torch.randint(256, (500,), dtype=torch.int32)
    weights = []
    for seed in (0, 1):
        file = tmp_path / f"{seed}.pt"
        model, _ = train_gpt2.train(base, method, data, recipe, seed, file)
        weights.append(train_gpt2.trained(model))
    slow = slow_run(base, data, method, 1, recipe)
    torch.testing.assert_close(weights[1], train_gpt2.trained(slow), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*(w["transformer.h.0.attn.c_attn.lora_A"] for w in weights))


def test_a_plain_step_takes_the_mean_gradient_clips_it_and_refuses_what_is_not_finite():
    def mean(model, x):
        return model(x).mean()

    model = torch.nn.Linear(4, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss = train_gpt2.plain_step(model, mean, [torch.ones(1, 4), 3 * torch.ones(1, 4)], optimizer)
    assert loss == pytest.approx(2 * before.sum().item(), rel=1e-5)
    moved = before - model.weight.detach()  # the gradient is (2, 2, 2, 2), of length 4
    torch.testing.assert_close(moved, torch.full((1, 4), 0.5), rtol=1e-4, atol=1e-5)
    with pytest.raises(FloatingPointError, match="not finite"):
        train_gpt2.plain_step(model, mean, [torch.full((1, 4), math.inf)], optimizer)


def test_seeds_draw_their_own_windows_and_noise(tmp_path):
    steps = run(tmp_path, *TINY, "flat", "--seeds=2")[2:]
    texts = [torch.stack(batches[0]) for _, _, batches, _ in steps]
    assert len({text.numpy().tobytes() for text in texts}) == 6
    assert [settings[1] for *_, settings in steps] == [(seed, step, 0) for seed in (0, 1) for step in range(3)]


def test_c_proj_starts_smaller():
    model = train_gpt2.GPT(train_gpt2.GPTConfig(n_layer=8, n_head=2, n_embd=64, block_size=64))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif p.dim() == 2:
            expected = 0.02 / 4 if "c_proj" in name else 0.02  # sqrt(2 * 8) = 4
            assert p.std().item() == pytest.approx(expected, rel=0.05), name


def saved_run(out, seed=0):
    """The model, the texts and the result of a run TINY."""
    content = train_gpt2.load(only(out, f"flat-{seed}-*.pt"))
    model = train_gpt2.trainable(base_of(out), "flat", train_gpt2.Recipe(r=2)).eval()
    train_gpt2.restore(model, content["trained"])
    args = argparse.Namespace(data=None, text=None, ood=None, block_size=16)
    return model, train_gpt2.load_data(args, model.config, None), content["log"]["result"]


def test_the_saved_run_is_that_of_its_seed(tmp_path):
    run(tmp_path, *TINY, "flat", "--seeds=2")
    for seed in (0, 1):
        model, texts, result = saved_run(tmp_path, seed)
        recipe = train_gpt2.Recipe(batch_size=2, block_size=16, eval_windows=4)
        found = train_gpt2.losses(model, texts, recipe)
        assert found == {key: result[key] for key in found}


def test_sharpness_is_of_the_training_text_at_a_tenth(tmp_path):
    run(tmp_path, *TINY, "flat")
    model, texts, result = saved_run(tmp_path)
    data = texts["train"]
    starts = range(0, len(data) - 16, 16)
    starts = starts[:: -(-len(starts) // 4)]  # four windows, evenly spread
    batches = []
    for pair in (starts[:2], starts[2:4]):
        text = torch.stack([data[i : i + 17] for i in pair]).long()
        batches.append((text[:, :-1], text[:, 1:]))
    expected = flatlora.sharpness(model, train_gpt2.loss_fn, batches, sigma=0.1, samples=4, seed=0)
    assert result["sharpness"] == pytest.approx(expected, abs=1e-7)


# ---- What is printed -----------------------------------------------------------------------------------------
def test_each_printed_cell_is_in_the_json(capsys, tmp_path):
    run(tmp_path, *TINY, *METHODS, "--seeds=2")
    text = capsys.readouterr().out
    runs = results(tmp_path)["runs"]
    assert text.startswith(results(tmp_path)["report"])
    assert [(r["seed"], r["method"]) for r in runs] == [(0, "base"), *((seed, m) for seed in (0, 1) for m in METHODS)]
    by = {m: [r for r in runs if r["method"] == m] for m in ["base", *METHODS]}
    table = text.split("\n\n")[0].splitlines()
    table = table[next(i for i, line in enumerate(table) if line.startswith("---")) + 1 :]
    for line, method in zip(table, by, strict=True):
        for key, digits in {"val_loss": 3, "test_loss": 3, "ood_loss": 3, "sharpness": 4}.items():
            if method not in ("base", "lora"):
                gaps = [a[key] - b[key] for a, b in zip(by[method], by["lora"])]
                half = 12.706 * statistics.stdev(gaps) / math.sqrt(2)  # Student's t of two values
                assert train_gpt2.plus_minus(np.mean(gaps), half, digits) in line
            elif key in by[method][0]:
                mean = np.mean([run[key] for run in by[method]])
                assert f" {mean:.{digits}f}" in line
    assert table[0].split()[-1] == "-"  # the sharpness of the base
    assert "n = 2: seeds 0 to 1, methods untuned" in " ".join(text.split())
    assert "base writes:" in text and "flat writes:" in text
    assert max(map(len, results(tmp_path)["report"].splitlines())) <= 80


def synthetic(method, losses):
    same = {"val_loss": 12345.6789, "ood_loss": 10.0, "sharpness": 0.1}
    return [{"method": method, "seed": i, **same, "test_loss": loss} for i, loss in enumerate(losses)]


LORA = synthetic("lora", [10.0, 20.0, 30.0])
VERDICTS = {  # gaps with a standard deviation of 0.1; the t of three values is 4.303, and 4.303 * 0.1 / sqrt(3) = 0.248
    "flat lower (-0.400 +-0.248)": synthetic("flat", [9.5, 19.6, 29.7]),
    "flat undecided (-0.300 +-0.248)": synthetic("flat", [9.6, 19.7, 29.8]),
    "flat undecided (+0.220 +-0.248)": synthetic("flat", [10.12, 20.22, 30.32]),
    "flat not shown to differ (-0.200 +-0.248)": synthetic("flat", [9.7, 19.8, 29.9]),
    "flat higher (+0.400 +-0.248)": synthetic("flat", [10.3, 20.4, 30.5]),
    "flat equal": synthetic("flat", [10.0, 20.0, 30.0]),
    "sam higher (+0.400 +-0.248)": synthetic("sam", [10.3, 20.4, 30.5]),
}


@pytest.mark.parametrize("words", VERDICTS)
def test_the_verdict_follows_the_intervals_and_long_numbers_fit(words):
    text = train_gpt2.report(LORA + VERDICTS[words], "GPT-2.")
    assert "12345.679" in text
    assert max(map(len, text.splitlines())) <= 80
    assert f"against lora's: {words}." in " ".join(text.split())


def test_one_seed_has_no_interval():
    text = train_gpt2.report(LORA[:1] + synthetic("flat", [0.5]), "GPT-2.")
    assert "+-" not in text
    assert "No interval: for one it takes lora, another method and two --seeds" in " ".join(text.split())


def test_no_width_is_rounded_to_zero():
    assert train_gpt2.plus_minus(0.00004, 0.00002, 3) == "+0.00004 +-0.00002"
    assert train_gpt2.plus_minus(-0.004, 0.012, 3) == "-0.004 +-0.012"


@pytest.mark.parametrize("n, t", [(2, 12.706), (3, 4.303), (10, 2.262), (16, 2.131), (40, 2.131)])
def test_intervals_are_students(n, t):
    values = [0.0] * (n - 1) + [1.0]
    mean, half = train_gpt2.interval(values)
    assert mean == pytest.approx(1 / n)
    assert half == pytest.approx(t * statistics.stdev(values) / math.sqrt(n))


def test_the_curve_falls_with_the_loss():
    assert train_gpt2.curve(np.linspace(3, 1, 200).tolist())[0] in "█7"
    assert train_gpt2.curve(np.linspace(3, 1, 200).tolist())[-1] in "▁0"


# ---- Data and text -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("given", [[0], [0, 1, 2]])
def test_the_given_text_is_used(given, monkeypatch, tmp_path):
    """Every training window lies in the training part, and the base's losses are those of the other parts."""
    monkeypatch.chdir(tmp_path)
    files = [np.random.default_rng(k).integers(30 * k + 5, 30 * k + 35, 500, dtype=np.uint8) for k in range(4)]
    for i, content in enumerate(files):
        Path(f"{i}").write_bytes(content.tobytes())
    steps = run("out", *TINY, "lora", "--ood", 3, "--text", *given)[2:]  # without those of the pre-training

    used = files[: len(given)]
    parts = {"train": (0, 300), "val": (300, 400), "test": (400, 500)}
    parts = {name: np.concatenate([file[a:b] for file in used]) for name, (a, b) in parts.items()}
    for _, _, batches, _ in steps:
        for x, y in zip(*batches[0]):
            assert bytes([*x, y[-1]]) in parts["train"].tobytes()
            assert torch.equal(x[1:], y[:-1])

    for name, ids in {"val": parts["val"], "test": parts["test"], "ood": files[3]}.items():
        ids = torch.tensor(ids).long()
        starts = range(0, len(ids) - 16, 16)
        starts = starts[:: -(-len(starts) // 4)]  # four windows at most, evenly spread
        losses = []
        for i in starts[: len(starts) // 2 * 2]:  # in whole batches of two
            logits = base_of("out")(ids[None, i : i + 16])[0]
            losses.append(F.cross_entropy(logits, ids[i + 1 : i + 17]).item())
        assert results("out")["runs"][0][f"{name}_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_the_test_of_the_bare_run_hangs_on_no_file_and_is_not_in_train():
    args = argparse.Namespace(data=None, text=None, ood=None, block_size=64)
    data = train_gpt2.load_data(args, train_gpt2.GPTConfig(1, 1, 16, 64), None)
    train, test = (bytes(data[name].tolist()) for name in ("train", "test"))
    assert not [i for i in range(0, len(test) - 64, 64) if test[i : i + 65] in train]
    sources = [p.read_bytes() for p in Path(importlib.import_module("email").__path__[0]).glob("*.py")]
    shares = sorted(np.mean([test[i : i + 16] in source for i in range(0, len(test), 16)]) for source in sources)
    assert shares[-1] <= 0.2
    assert shares[-10] > 0.01


ENCODINGS = {"utf-16": "byte 0xff in position 0", "latin-1": "byte 0xe9 in position 3"}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_text_in_another_encoding_is_named_with_its_place(encoding, tmp_path):
    path = tmp_path / "text"
    path.write_text("José", "utf-8")
    assert train_gpt2.read_files([path]) == ["José".encode()]
    path.write_text("José", encoding)
    with pytest.raises(ValueError, match=f"text cannot be used: .*utf-8.* {ENCODINGS[encoding]}"):
        train_gpt2.read_files([path])


def test_learning_rate_by_hand():
    rates = [train_gpt2.learning_rate(step, 20, 1.0) for step in (0, 1, 2, 11, 20)]  # a warm-up of two steps
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.55, 0.1])
    assert train_gpt2.learning_rate(99, 5000, 1.0) == pytest.approx(100 / 101)  # of at most a hundred
