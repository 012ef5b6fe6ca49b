"""train_gpt2.py: it is what -h says, reads the data that it is given, compares like with like, prints what it wrote."""

import argparse
import ast
import importlib
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import flatlora
import train_gpt2

ROOT = Path(train_gpt2.__file__).parent
TINY = ["--n-layer=1", "--n-embd=16", "--block-size=16", "--pretrain-steps=2", "--steps=3", "--batch-size=2", "--r=2"]
TINY += ["--eval-windows=4", "--seeds=2"]


@pytest.fixture
def call(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *words: (monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *map(str, words)]), train_gpt2.main())


def results(out="out"):
    return json.loads(Path(out, "results.json").read_text())


# ---- The files -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("file, lines", [("flatlora.py", 350), ("train_toy.py", 300), ("train_gpt2.py", 600)])
def test_each_file_is_short_and_arrows_point_one_way(file, lines):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert text.count("\n") <= lines and max(map(len, text.splitlines())) <= 120
    imported = set()
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            names += [a.value for a in node.args if isinstance(a, ast.Constant)]
        imported |= {name.split(".")[0] for name in names}
    allowed = {"torch", "numpy"} if file == "flatlora.py" else {"torch", "numpy", "tqdm", "flatlora"}
    assert "torch" in imported and imported - sys.stdlib_module_names <= allowed


def test_nothing_else_is_imported_in_a_bare_run():
    code = "import sys, train_gpt2; print({'safetensors', 'tiktoken', 'transformers', 'peft', 'train_toy'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True, timeout=60) == "set()\n"


def test_help_fits_two_screens_and_holds_every_option(call, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    parsers, parse = [], argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self: (parsers.append(self), parse(self))[1])
    for words in (["-h"], ["--init", "gpt2", "-h"]):
        with pytest.raises(SystemExit):
            call(*words)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 100 and max(map(len, lines)) <= 80
        options = [action for action in parsers.pop()._actions if action.dest != "help"]
        assert 20 < len(options) <= 32 and all(action.help for action in options)
        shown = [line.split()[0] for line in lines if line.startswith("  -")]
        assert shown == ["-h,", *(action.option_strings[0] for action in options)]
    commands = re.findall(r"train_gpt2\.py(.*?)(?:  #.*)?$", train_gpt2.__doc__, re.MULTILINE)
    monkeypatch.undo()
    monkeypatch.setattr(train_gpt2, "compare", lambda args: seen.append(args))
    monkeypatch.setattr(train_gpt2, "sample", lambda args: seen.append(args))
    seen = []
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *re.sub(r'"(.*)"', r"\1", command).split()])
        train_gpt2.main()
    assert len(seen) == 5 and {len(args.methods) for args in seen} == {1, 4}  # with --init flat alone


# ---- Wrong options -------------------------------------------------------------------------------------------
WRONG = [
    ("--sigma -1", "sigma must be a finite number >= 0, got -"),
    ("--sigma nan", "sigma must be a finite number >= 0, got nan"),
    ("--rho nan --methods sam", "rho must be a finite number >= 0, got nan"),
    ("--alpha 0", "got r=2, alpha=0.0"),
    ("--lr -1", "-1.0"),
    ("--lr nan", "nan"),
    ("--weight-decay -1", "-1.0"),
    ("--lora-dropout 2 --methods dropout", "2.0"),
    ("--r 0", "--r: must be at least 1, got 0"),
    ("--steps -1", "--steps: must be at least 1, got -1"),
    ("--seeds x", "--seeds: invalid count value: 'x'"),
    ("--rr 1", "unrecognized arguments: --rr 1"),
    ("--block-size 20000", "--block-size must be below "),
    ("--text nowhere", "nowhere cannot be used: [Errno 2] No such file"),
    ("--text EMPTY", "--block-size must be below 0 for the train text"),
    ("--text SHORT", "--block-size must be below 8 for the val text"),
    ("--ood SHORT", "--block-size must be below 40 for the ood text --block-size 40"),
    ("--text SHORT --data BINS", "--data: not allowed with argument --text"),
    ("--data nowhere", "train.bin cannot be used: [Errno 2] No such file"),
    ("--data BINS", "the train text has the token 299, the model only 256 of them"),
    ("--data ODD", "train.bin cannot be used: "),
    ("--init nowhere", "--init must be one of gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder with config.json"),
    ("--sample nowhere.pt", "nowhere.pt cannot be used: [Errno 2] No such file"),
]


@pytest.mark.parametrize("words, line", WRONG)
def test_a_wrong_option_ends_in_one_line(words, line, call, capsys, tmp_path):
    for name, size in (("EMPTY", 0), ("SHORT", 40)):
        (tmp_path / name).write_bytes(b"x" * size)
    for name, bytes_ in (("BINS", np.arange(300, dtype=np.uint16).tobytes()), ("ODD", b"x" * 301)):
        (tmp_path / name).mkdir()
        for file in ("train.bin", "val.bin"):
            (tmp_path / name / file).write_bytes(bytes_)
    line, _, more = line.partition(" --block-size 40")
    with pytest.raises(SystemExit) as end:
        call(*TINY, "--methods", "flat", *words.split(), *["--block-size=40"] * ("--ood" in words))
    printed = capsys.readouterr()
    found = printed.err.splitlines()[-1] if end.value.code == 2 else end.value.code
    assert found.startswith("train_gpt2.py: ") and line in found and "\n" not in found
    assert printed.out == "" and not (tmp_path / "out" / "results.json").exists()


def test_a_shell_sees_one_line_and_a_failure(tmp_path):
    command = [sys.executable, train_gpt2.__file__, "--text", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    words = "train_gpt2.py: nowhere cannot be used: [Errno 2] No such file or directory: 'nowhere'\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", words)


# ---- What is printed -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii"])
def test_a_stream_shows_what_it_can(encoding, call, monkeypatch):
    for words in ([*TINY, "--methods", "lora", "--out", "ü☃"], ["--sample", "ü☃/lora.pt", "--prompt=ü☃", "--length=9"]):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        call(*words)
        stream.flush()
        printed, shown = stream.buffer.getvalue().decode(encoding), "?" if encoding == "ascii" else "ü"
        assert f"Numbers: {shown}?/results.json" in printed or printed.startswith(f"{shown}?")
    assert results("ü☃")["report"] in printed or len(results("ü☃")["runs"]) == 3


def test_the_results_are_written_before_anything_is_printed(call, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError("Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(SystemExit, match="Broken pipe"):
        call(*TINY, "--methods", "lora")
    assert len(results()["runs"]) == 3 and [p.name for p in Path("out").glob("lora*")] == ["lora.pt"]


def test_each_printed_cell_is_in_the_json(call, capsys):
    methods = ["lora", "dropout", "flat", "sam", "sam-full", "full"]
    call(*TINY, "--lr=0.05", "--methods", *methods)
    text = capsys.readouterr().out
    runs = results()["runs"]
    assert text.startswith(results()["report"]) and max(map(len, text.splitlines())) <= 80
    head, means, _, differences, verdict, end = text.split("\n\n")
    assert [(run["seed"], run["method"]) for run in runs] == [(0, "base"), *((s, m) for s in (0, 1) for m in methods)]
    columns = {"val_loss": 3, "test_loss": 3, "ood_loss": 3, "sharpness": 4, "passes": 0, "ms": 0}
    by = {
        m: [[run.get(key, math.nan) for key in columns] for run in runs if run["method"] == m]
        for m in ["base", *methods]
    }
    for line, method in zip(means.splitlines()[2:], by, strict=True):
        cells = zip(np.mean(by[method], 0), columns.values())
        assert line.split() == [method, *("-" if np.isnan(x) else f"{x:.{d}f}" for x, d in cells)]
    for line, method in zip(differences.splitlines()[2:], methods[1:], strict=True):
        gaps = np.subtract(by[method], by["lora"])[:, :4]  # (2, 4); 12.706: Student's t of two values
        cells = zip(gaps.mean(0), 12.706 * gaps.std(0, ddof=1) / math.sqrt(2), columns.values())
        shown = [["-"] if np.isnan(x) else [f"{x:+.{d}f}", f"+-{half:.{d}f}"] for x, half, d in cells]
        assert line.split() == [method, *sum(shown, [])]
    assert [by[m][0][4] for m in methods] == [1, 1, 1, 2, 2, 1] and "results.json" in end


def synthetic(method, losses, **more):
    same = {"val_loss": 1.0, "ood_loss": 1.0, "sharpness": 0.1, "passes": 2, "ms": 10.0}
    return [{"method": method, "seed": i, **same, "test_loss": loss, **more} for i, loss in enumerate(losses)]


LORA, WORDS = synthetic("lora", [1.0, 2.0, 3.0]), "Test loss against that of lora: "
VERDICTS = {  # the t of three values is 4.303; a standard deviation of 0.1 gives 4.303 * 0.1 / sqrt(3) = 0.248
    "flat lower by 0.300 +-0.248 at 2 passes": [*LORA, *synthetic("flat", [0.6, 1.7, 2.8])],
    "flat higher by 0.300 +-0.248 at 2 passes": [*LORA, *synthetic("flat", [1.2, 2.3, 3.4])],
    "flat the same within the interval at 2 passes": [*LORA, *synthetic("flat", [0.9, 1.8, 2.7])],
    "flat higher by 0.300 +-0.248, sam lower by 1.000 +-0.000 at 2 passes": [
        *LORA, *synthetic("flat", [1.2, 2.3, 3.4], passes=1), *synthetic("sam", [0.0, 1.0, 2.0])
    ],
    "": [*LORA[:1], *synthetic("flat", [0.5])],
    " ": synthetic("flat", [0.5, 0.6]) + synthetic("sam", [0.1, 0.2]),
}  # fmt: skip


@pytest.mark.parametrize("words", VERDICTS)
def test_the_verdict_follows_the_intervals(words):
    text = " ".join(train_gpt2.report(VERDICTS[words]).split())
    assert f"{WORDS}{words} per step." in text if words.strip() else WORDS not in text and "+-" not in text
    assert ("no evidence for flatness" in text) == bool(words.strip())


def test_long_numbers_fit_and_columns_stand():
    runs = [{"method": "base", "seed": 0, "val_loss": 10.825, "test_loss": 10.825, "ood_loss": 10.825}]
    for method in ("lora", "sam-full"):
        for i in (0, 1):
            far = {k: 3.0 + i * (method != "lora") for k in ("val_loss", "test_loss", "ood_loss")}
            runs.append({"method": method, "seed": i, **far, "sharpness": 1.5, "passes": 2, "ms": 1_234_567.8})
    text = train_gpt2.report(runs)
    assert "1234568" in text and "+0.500 +-6.353" in text and max(map(len, text.splitlines())) <= 80
    for table in (block.splitlines() for block in text.split("\n\n") if "---" in block):
        assert len({len(line) for line in table}) == 1


# ---- What is compared ----------------------------------------------------------------------------------------
def test_methods_share_adapters_and_data_and_never_write_the_base(call, monkeypatch):
    seen, bases, train = [], [], train_gpt2.train
    for name in ("flat_lora_step", "sam_step"):

        def step(model, loss_fn, batches, optimizer, *settings, own=getattr(flatlora, name), **more):
            if lora := [p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n]:
                seen.append((lora, [t.clone() for batch in batches for t in batch], settings))
            return own(model, loss_fn, batches, optimizer, *settings, **more)

        monkeypatch.setattr(flatlora, name, step)
    monkeypatch.setattr(train_gpt2, "train", lambda base, *rest: (bases.append(base), train(base, *rest))[1])
    call(*TINY, "--seeds=1", "--lr=0.1", "--methods", "lora", "dropout", "flat", "sam", "sam-full", "full")
    runs = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert len(runs) == 5 and not torch.equal(runs[0][0][1][0], runs[0][1][1][0])
    for run in runs:
        assert all(map(torch.equal, run[0][0], runs[0][0][0]))
        assert all(torch.equal(a, b) for own, first in zip(run, runs[0]) for a, b in zip(own[1], first[1]))
    sigmas = [[settings[0] for *_, settings in run] for run in runs[:3]]
    assert sigmas == [[0, 0, 0], [0, 0, 0], [pytest.approx(0.1 * (1 - math.cos(math.pi * t / 3))) for t in range(3)]]
    assert [run[1][2][1] for run in runs[:3]] == [(0, 1, 0)] * 3  # seed, step, rank
    assert [run[1][2][:2] for run in runs[3:]] == [(0.2, "lora"), (0.2, "full")]
    (file,) = Path("out").glob("base-*.pt")
    saved = torch.load(file, weights_only=True)["trained"]
    assert all(torch.equal(p, saved[name]) for name, p in bases[1].named_parameters()) and len({*map(id, bases)}) == 2


def test_learning_rate_by_hand():
    rates = [train_gpt2.learning_rate(step, 20, 1.0) for step in (0, 1, 2, 11, 20)]  # warm-up of two steps
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.55, 0.1])
    assert train_gpt2.learning_rate(99, 5000, 1.0) == pytest.approx(100 / 101)  # of at most a hundred
    assert train_gpt2.learning_rate(0, 1, 1.0) == 1.0


# ---- Data ----------------------------------------------------------------------------------------------------
def losses(model, ids, starts):
    """Nats per token of 16-token windows, one after the other, from the definition."""
    rows = [ids[i : i + 17] for i in starts]
    return sum(-model(r[None, :16])[0].log_softmax(-1)[range(16), r[1:]].mean().item() for r in rows) / len(rows)


@pytest.mark.parametrize("given", ["text", "texts", "data"])
def test_the_given_data_is_used(given, call, monkeypatch, tmp_path):
    """Every training window lies in the training part, and the base's losses are those of the other parts."""
    rng, batches = np.random.default_rng(0), []
    files = [rng.integers(k * 50, k * 50 + 50, 500, dtype=np.uint8) for k in range(4)]
    for i, content in enumerate(files):
        (tmp_path / f"{i}").write_bytes(content.tobytes())
    for name, content in (("train", files[0]), ("val", files[1])):
        (tmp_path / f"{name}.bin").write_bytes(content.astype(np.uint16).tobytes())
    words = {"text": ["--text", 0], "texts": ["--text", 0, 1, 2], "data": ["--data", tmp_path]}[given]
    step = flatlora.flat_lora_step
    monkeypatch.setattr(flatlora, "flat_lora_step", lambda *a, **k: (batches.append(a[2]), step(*a, **k))[1])
    call(*TINY, "--methods", "lora", "--ood", 3, "--eval-windows=4", *words)
    used = files[: 3 if given == "texts" else 1]
    parts = {
        k: np.concatenate([f[a:b] for f in used])
        for k, a, b in (("train", 0, 300), ("val", 300, 400), ("test", 400, 500))
    }
    if given == "data":
        parts = {"train": files[0], "val": files[1][:250], "test": files[1][250:]}
    text = parts["train"].tobytes()
    for batch in batches[2:]:  # after the two of the pre-training
        for x, y in zip(*batch[0]):
            assert bytes([*x, y[-1]]) in text and torch.equal(x[1:], y[:-1])
    (file,) = Path("out").glob("base-*.pt")
    model = train_gpt2.GPT(train_gpt2.GPTConfig(1, 1, 16, 16))
    model.load_state_dict(torch.load(file, weights_only=True)["trained"], strict=False)  # lm_head is wte
    for name, part in {"val": parts["val"], "test": parts["test"], "ood": files[3]}.items():
        ids = torch.tensor(part).long()
        starts = range(0, len(ids) - 16, 16)
        expected = losses(model, ids, starts[:: -(-len(starts) // 4)])
        assert results()["runs"][0][f"{name}_loss"] == pytest.approx(expected, abs=1e-5)


def test_each_file_is_in_each_split_once():
    files = [bytes(range(10)), bytes(range(10, 23)), b"x"]
    parts = train_gpt2.split(files)
    assert parts["val"] == bytes([6, 7, 17, 18, 19]) and parts["test"] == bytes([8, 9, 20, 21, 22]) + b"x"
    assert sorted(b"".join(parts.values())) == sorted(b"".join(files))


def test_the_test_of_the_bare_run_hangs_on_no_file_and_is_not_in_train():
    args = argparse.Namespace(init=None, data=None, text=None, ood=None, block_size=64)
    data = train_gpt2.load_data(args, train_gpt2.GPTConfig(1, 1, 16, 64))
    train, test = (bytes(data[name].tolist()) for name in ("train", "test"))
    windows = [test[i : i + 65] for i in range(0, len(test) - 64, 64)]
    assert not [window for window in windows if window in train]
    sources = [p.read_bytes() for p in Path(importlib.import_module("email").__path__[0]).glob("*.py")]
    pieces = [[test[i : i + 16] in source for i in range(0, len(test), 16)] for source in sources]
    shares = sorted(sum(found) / len(found) for found in pieces)
    assert shares[-1] <= 0.2 and sum(share > 0.01 for share in shares) >= 10


ENCODINGS = [("utf-16", 0), ("utf-16-le", 1), ("latin-1", 4)]  # the place of the first byte that is wrong


@pytest.mark.parametrize("encoding, place", ENCODINGS)
def test_another_encoding_is_named_with_its_place(encoding, place, call, tmp_path):
    (tmp_path / "text").write_bytes("Jos\u00e9 ".replace("\u00e9", " \u00e9").encode(encoding) * 99)
    with pytest.raises(ValueError, match=rf"text cannot be used: .*utf-8.* {place}\b|UTF-8 its byte {place} would not"):
        train_gpt2.read_files([tmp_path / "text"], utf8=True)
    assert train_gpt2.read_files([tmp_path / "text"]) == [(tmp_path / "text").read_bytes()]  # bytes are bytes


def test_a_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "text").write_bytes("\ufeffJosé".encode())
    assert train_gpt2.read_files([tmp_path / "text"] * 2, utf8=True) == ["José".encode()] * 2


# ---- Text ----------------------------------------------------------------------------------------------------
def test_generation_repeats_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    model, state = train_gpt2.GPT(train_gpt2.GPTConfig(1, 1, 16, 8)).eval(), torch.get_rng_state()
    model.transformer["wte"].weight.data.mul_(20)
    texts = [train_gpt2.generate(model, b"ab", 30, seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2] and torch.equal(torch.get_rng_state(), state)
    tokens = list(b"ab")
    for _ in range(30):
        tokens.append(int(model(torch.tensor([tokens[-8:]]))[0, -1].argmax()))
    assert train_gpt2.generate(model, b"ab", 30, top_k=1) == tokens[2:]


def test_a_saved_adapter_writes_its_own_text(call, capsys):
    call(*TINY, "--seeds=1", "--lr=0.5", "--methods", "lora", "sam")
    capsys.readouterr()
    content = torch.load("out/sam.pt", weights_only=True)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(**content["config"]))
    base = torch.load(Path("out", content["base"]), weights_only=True)["trained"]
    model.load_state_dict(base, strict=False)  # lm_head is wte
    plain = train_gpt2.generate(model, b"def ", 40)
    flatlora.load_lora_state_dict(flatlora.inject_lora(model, 2, 32, targets=train_gpt2.TARGETS), content["adapters"])
    adapted = train_gpt2.generate(flatlora.merge_lora(model), b"def ", 40)
    call("--sample", "out/sam.pt", "--length=40")
    assert capsys.readouterr().out == (b"def " + bytes(adapted)).decode(errors="replace") + "\n" and adapted != plain
