"""train_gpt2.py: it is what -h says, reads the data that it is given, compares like with like, prints what it wrote."""

import argparse
import ast
import importlib
import io
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from running import TINY, base_of, results, run

import train_gpt2


@pytest.mark.parametrize("file, lines", [("flatlora.py", 350), ("train_toy.py", 300), ("train_gpt2.py", 600)])
def test_each_file_is_short_and_arrows_point_one_way(file, lines):
    text = Path(train_gpt2.__file__).with_name(file).read_text("utf-8")
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {getattr(node, "module", None) or alias.name for node in nodes for alias in node.names}
    names = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert names - {"numpy", "tqdm"} == ({"torch"} if file == "flatlora.py" else {"torch", "flatlora"})
    assert text.count("\n") <= lines


def test_help_fits_two_screens_and_shows_every_option(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    parsers, parse = [], argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self: (parsers.append(self), parse(self))[1])
    with pytest.raises(SystemExit):
        run(tmp_path, "-h")
    lines, actions = capsys.readouterr().out.splitlines(), parsers[0]._actions
    assert [line.split()[0].strip(",") for line in lines if line[:3] == "  -"] == [a.option_strings[0] for a in actions]
    assert 20 < len(actions) <= 32 and all(action.help for action in actions)
    assert len(lines) <= 100 and max(map(len, lines)) <= 80


WRONG = {
    "--rho nan --methods sam": "rho must be a finite number >= 0, got nan",
    "--out SHORT": "SHORT",
    "--text nowhere": "nowhere cannot be used: [Errno 2] No such file",
    "--text SHORT": "--block-size must be below 8 for the val text",
    "--data nowhere": "train.bin cannot be used: [Errno 2] No such file",
    "--data BINS": "the train text has the token 299, the model only 256 of them",
    "--data ODD": "train.bin cannot be used: ",
    "--init nowhere": "--init must be one of gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder with config.json",
    "--sample nowhere.pt": "nowhere.pt cannot be used: [Errno 2] No such file",
    # of argparse, after the usage
    "--r 0": "--r: must be at least 1, got 0",
    "--rr 1": "unrecognized arguments: --rr 1",
    "--text SHORT --data BINS": "--data: not allowed with argument --text",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_option_ends_in_one_line(words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("SHORT").write_bytes(b"x" * 40)
    for folder, content in (("BINS", np.arange(300, dtype=np.uint16).tobytes()), ("ODD", b"x" * 301)):
        Path(folder).mkdir()
        Path(folder, "train.bin").write_bytes(content)
        Path(folder, "val.bin").write_bytes(content)
    with pytest.raises(SystemExit) as end:
        run("out", *TINY, "flat", *words.split())
    printed = capsys.readouterr()
    line = printed.err.splitlines()[-1] if end.value.code == 2 else end.value.code
    assert line.startswith("train_gpt2.py: ") and WRONG[words] in line and "\n" not in line
    assert printed.out == "" and not Path("out/results.json").exists()


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii"])
def test_a_stream_shows_what_it_can_after_the_results_are_written(encoding, monkeypatch, tmp_path):
    class Stream(io.BytesIO):
        def write(self, content):
            assert (tmp_path / "ü☃" / "results.json").exists()
            return super().write(content)

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Stream(), encoding))
    run(tmp_path / "ü☃", *TINY, "lora")
    run(tmp_path, "--sample", tmp_path / "ü☃" / "lora.pt", "--prompt", "☃", "--length=1")
    sys.stdout.flush()
    assert "ü☃/results".encode(encoding, "replace") in sys.stdout.buffer.getvalue()


METHODS = {"lora": "flat_lora_step", "dropout": "flat_lora_step", "flat": "flat_lora_step"}
METHODS |= {"sam": "sam_step", "sam-full": "sam_step", "full": "flat_lora_step"}


def test_methods_share_adapters_and_data_and_never_write_the_base(monkeypatch, tmp_path):
    bases, train = [], train_gpt2.train
    monkeypatch.setattr(train_gpt2, "train", lambda base, *rest: (bases.append(base), train(base, *rest))[1])
    steps = run(tmp_path, *TINY, *METHODS)[2:]  # without those of the pre-training
    names, before, batches, settings = ([list(part[i : i + 3]) for i in range(0, 18, 3)] for part in zip(*steps))
    assert names == [[name] * 3 for name in METHODS.values()]
    for start, data in zip(before[:5], batches):
        assert start[0].keys() == before[0][0].keys() and all(
            torch.equal(p, before[0][0][k]) for k, p in start[0].items()
        )
        assert all(map(torch.equal, sum([x[0] for x in data], ()), sum([x[0] for x in batches[0]], ())))
    assert not torch.equal(batches[0][0][0][0], batches[0][1][0][0])
    growing = [pytest.approx(0.1 * (1 - math.cos(math.pi * t / 3))) for t in range(3)]
    assert [[step[0] for step in own] for own in settings[:3]] == [[0, 0, 0], [0, 0, 0], growing]
    assert [step[1] for step in settings[2]] == [(0, 0, 0), (0, 1, 0), (0, 2, 0)]  # seed, step, rank
    assert [own[0][:2] for own in settings[3:5]] == [(0.2, "lora"), (0.2, "full")]
    assert all(map(torch.equal, bases[1].parameters(), base_of(tmp_path).parameters())) and bases[1] is bases[-1]


# ---- What is printed -----------------------------------------------------------------------------------------
def test_each_printed_cell_is_in_the_json(capsys, tmp_path):
    run(tmp_path, *TINY, *METHODS, "--seeds=2")
    text, runs = capsys.readouterr().out, results(tmp_path)["runs"]
    assert text.startswith(results(tmp_path)["report"])
    assert [(r["seed"], r["method"]) for r in runs] == [(0, "base"), *((seed, m) for seed in (0, 1) for m in METHODS)]
    digits = {"val_loss": 3, "test_loss": 3, "ood_loss": 3, "sharpness": 4, "passes": 0, "ms": 0}
    by = {m: [[r.get(k, math.nan) for k in digits] for r in runs if r["method"] == m] for m in ["base", *METHODS]}
    _, means, _, differences, *_ = text.split("\n\n")
    for line, method in zip(means.splitlines()[2:], by, strict=True):
        cells = zip(np.mean(by[method], 0), digits.values())
        assert line.split() == [method, *("-" if np.isnan(x) else f"{x:.{d}f}" for x, d in cells)]
    for line, method in zip(differences.splitlines()[2:], [*METHODS][1:], strict=True):
        gaps = np.subtract(by[method], by["lora"])[:, :4]  # (2, 4); 12.706: Student's t of two values
        cells = zip(gaps.mean(0), 12.706 * gaps.std(0, ddof=1) / math.sqrt(2), digits.values())
        cells = ["-" if np.isnan(x) else f"{x:+.{d}f} +-{half:.{d}f}" for x, half, d in cells]
        assert line.split() == " ".join([method, *cells]).split()
    assert [by[method][0][4] for method in METHODS] == [1, 1, 1, 2, 2, 1]


def synthetic(method, losses, passes=2):
    same = {"val_loss": 10.0, "ood_loss": 10.0, "sharpness": 0.1, "passes": passes, "ms": 1_234_567.8}
    return [{"method": method, "seed": i, **same, "test_loss": loss} for i, loss in enumerate(losses)]


LORA = synthetic("lora", [10.0, 20.0, 30.0])
VERDICTS = {  # gaps with a standard deviation of 0.1; the t of three values is 4.303, and 4.303 * 0.1 / sqrt(3) = 0.248
    "flat lower by 0.300 +-0.248 at 2 passes": LORA + synthetic("flat", [9.6, 19.7, 29.8]),
    "sam-full the same within the interval at 2 passes": LORA + synthetic("sam-full", [9.9, 19.8, 29.7]),
    "flat higher by 0.300 +-0.248, sam lower by 9.000 +-0.000 at 2 passes": LORA
    + synthetic("flat", [10.2, 20.3, 30.4], passes=1)
    + synthetic("sam", [1.0, 11.0, 21.0]),
    "": LORA[:1] + synthetic("flat", [0.5]),
}


@pytest.mark.parametrize("words", VERDICTS)
def test_the_verdict_follows_the_intervals_and_long_numbers_fit(words):
    text = train_gpt2.report(VERDICTS[words])
    assert "1234568" in text and max(map(len, text.splitlines())) <= 80
    text = " ".join(text.split())
    assert f"against that of lora: {words} per step. " in text if words.strip() else "+-" not in text
    assert ("no evidence for flatness" in text) == bool(words.strip())


# ---- Data and text -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("given", ["text", "texts", "data"])
def test_the_given_data_is_used(given, monkeypatch, tmp_path):
    """Every training window lies in the training part, and the base's losses are those of the other parts."""
    monkeypatch.chdir(tmp_path)
    files = [np.random.default_rng(k).integers(50 * k, 50 * k + 50, 500, dtype=np.uint8) for k in range(4)]
    for i, content in enumerate(files):
        Path(f"{i}").write_bytes(content.tobytes())
        Path(f"{['train', 'val', '', ''][i]}.bin").write_bytes(content.astype(np.uint16).tobytes())
    words = {"text": ["--text", 0], "texts": ["--text", 0, 1, 2], "data": ["--data", tmp_path]}[given]
    steps = run("out", *TINY, "lora", "--ood", 3, *words)[2:]  # without those of the pre-training
    used, parts = files[: 3 if given == "texts" else 1], {"train": (0, 300), "val": (300, 400), "test": (400, 500)}
    parts = {name: np.concatenate([file[a:b] for file in used]) for name, (a, b) in parts.items()}
    if given == "data":
        parts = {"train": files[0], "val": files[1][:250], "test": files[1][250:]}
    for x, y in (pair for _, _, batches, _ in steps for pair in zip(*batches[0])):
        assert bytes([*x, y[-1]]) in parts["train"].tobytes() and torch.equal(x[1:], y[:-1])
    for name, ids in {"val": parts["val"], "test": parts["test"], "ood": files[3]}.items():
        ids, starts = torch.tensor(ids).long(), range(0, len(ids) - 16, 16)
        rows = [ids[i : i + 17] for i in starts[:: -(-len(starts) // 4)]]  # four windows, evenly spread
        losses = [-base_of("out")(row[None, :16])[0].log_softmax(-1)[range(16), row[1:]].mean().item() for row in rows]
        assert results("out")["runs"][0][f"{name}_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_the_test_of_the_bare_run_hangs_on_no_file_and_is_not_in_train():
    args = argparse.Namespace(init=None, data=None, text=None, ood=None, block_size=64)
    data = train_gpt2.load_data(args, train_gpt2.GPTConfig(1, 1, 16, 64))
    train, test = (bytes(data[name].tolist()) for name in ("train", "test"))
    assert not [i for i in range(0, len(test) - 64, 64) if test[i : i + 65] in train]
    sources = [p.read_bytes() for p in Path(importlib.import_module("email").__path__[0]).glob("*.py")]
    shares = sorted(np.mean([test[i : i + 16] in source for i in range(0, len(test), 16)]) for source in sources)
    assert shares[-1] <= 0.2 and shares[-10] > 0.01


ENCODINGS = {"utf-16": "byte 0xff in position 0", "latin-1": "byte 0xe9 in position 3", "utf-16-le": "byte 1 would not"}


def test_a_byte_order_mark_is_dropped_and_another_encoding_named_with_its_place(tmp_path):
    path = tmp_path / "text"
    path.write_text("\ufeffJosé", "utf-8")
    assert train_gpt2.read_files([path]) == train_gpt2.read_files([path], utf8=True) == ["José".encode()]
    args = argparse.Namespace(init="gpt2", data=None, text=[path], ood=None)
    for encoding, place in ENCODINGS.items():
        path.write_text("Jose" if encoding == "utf-16-le" else "José", encoding)
        with pytest.raises(ValueError, match=f"(?i)text cannot be used: .*utf-8.* {place}"):
            train_gpt2.load_data(args, None)


def test_learning_rate_by_hand():
    rates = [train_gpt2.learning_rate(step, 20, 1.0) for step in (0, 1, 2, 11, 20)]  # a warm-up of two steps
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.55, 0.1])
    assert train_gpt2.learning_rate(99, 5000, 1.0) == pytest.approx(100 / 101)  # of at most a hundred
