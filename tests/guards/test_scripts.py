"""train_gpt2.py: it is what -h says, reads the data that it is given, compares like with like, prints what it wrote."""

import argparse
import ast
import importlib
import io
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import flatlora
import train_gpt2

TINY = ["--n-layer=1", "--n-embd=16", "--block-size=16", "--pretrain-steps=2", "--steps=3", "--batch-size=2", "--r=2"]
TINY += ["--eval-windows=4", "--seeds=2", "--lr=0.05", "--methods"]


@pytest.fixture
def call(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *words: (monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *map(str, words)]), train_gpt2.main())


def base_in(out):
    """The base that a run TINY wrote."""
    (file,) = Path(out).glob("base-*.pt")
    model = train_gpt2.GPT(train_gpt2.GPTConfig(1, 1, 16, 16)).eval()
    model.load_state_dict(torch.load(file, weights_only=True)["trained"], strict=False)  # lm_head is wte
    return model


@pytest.mark.parametrize("file, lines", [("flatlora.py", 350), ("train_toy.py", 300), ("train_gpt2.py", 600)])
def test_each_file_is_short_and_arrows_point_one_way(file, lines):
    text = Path(train_gpt2.__file__).with_name(file).read_text("utf-8")
    assert text.count("\n") <= lines
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else {node.module}
    names = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert {"torch"} < names <= {"torch", "numpy", "tqdm", "flatlora"} or names == {"torch"}


def test_help_fits_two_screens_and_shows_every_option(call, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    parsers, parse = [], argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self: (parsers.append(self), parse(self))[1])
    with pytest.raises(SystemExit):
        call("-h")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 80
    actions = parsers[0]._actions
    assert 20 < len(actions) <= 32 and all(action.help for action in actions)
    shown = [line.split()[0].strip(",") for line in lines if line.startswith("  -")]
    assert shown == [action.option_strings[0] for action in actions]


WRONG = {
    "--sigma -1": "sigma must be a finite number >= 0, got -",
    "--sigma nan": "sigma must be a finite number >= 0, got nan",
    "--rho nan --methods sam": "rho must be a finite number >= 0, got nan",
    "--alpha 0": "alpha above 0 and finite, got r=2, alpha=0.0",
    "--lr -1": "-1.0",
    "--lora-dropout 2 --methods dropout": "2.0",
    "--r 0": "--r: must be at least 1, got 0",
    "--seeds x": "--seeds: invalid count value: 'x'",
    "--rr 1": "unrecognized arguments: --rr 1",
    "--out SHORT": "SHORT",
    "--out SHORT/below": "SHORT",
    "--text nowhere": "nowhere cannot be used: [Errno 2] No such file",
    "--text SHORT": "--block-size must be below 8 for the val text",
    "--ood SHORT --block-size 40": "--block-size must be below 40 for the ood text",
    "--text SHORT --data BINS": "--data: not allowed with argument --text",
    "--data nowhere": "train.bin cannot be used: [Errno 2] No such file",
    "--data BINS": "the train text has the token 299, the model only 256 of them",
    "--data ODD": "train.bin cannot be used: ",
    "--init nowhere": "--init must be one of gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder with config.json",
    "--sample nowhere.pt": "nowhere.pt cannot be used: [Errno 2] No such file",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_option_ends_in_one_line(words, call, capsys):
    Path("SHORT").write_bytes(b"x" * 40)
    for folder, content in (("BINS", np.arange(300, dtype=np.uint16).tobytes()), ("ODD", b"x" * 301)):
        Path(folder).mkdir()
        for name in ("train.bin", "val.bin"):
            Path(folder, name).write_bytes(content)
    with pytest.raises(SystemExit) as end:
        call(*TINY, "flat", *words.split())
    printed = capsys.readouterr()
    line = printed.err.splitlines()[-1] if end.value.code == 2 else end.value.code
    assert line.startswith("train_gpt2.py: ") and WRONG[words] in line and "\n" not in line
    assert printed.out == "" and not Path("out/results.json").exists()


# ---- What is printed -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii"])
def test_a_stream_shows_what_it_can_after_the_results_are_written(encoding, call, monkeypatch):
    class Stream(io.BytesIO):
        def write(self, content):
            assert Path("ü☃/results.json").exists()
            return super().write(content)

    def printed(*words):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Stream(), encoding))
        call(*words)
        sys.stdout.flush()
        return sys.stdout.buffer.getvalue()

    assert f"Numbers: {'ü☃'}/results".encode(encoding, "replace") in printed(*TINY, "sam", "lora", "--out", "ü☃")
    content, model = torch.load("ü☃/sam.pt", weights_only=True), base_in("ü☃")
    prompt = list("ü☃ ".encode())
    plain = train_gpt2.generate(model, prompt, 40)
    flatlora.load_lora_state_dict(flatlora.inject_lora(model, 2, 32, targets=train_gpt2.TARGETS), content["adapters"])
    adapted = train_gpt2.generate(flatlora.merge_lora(model), prompt, 40)
    text = bytes(prompt + adapted).decode(errors="replace").encode(encoding, "replace") + os.linesep.encode()
    assert printed("--sample", "ü☃/sam.pt", "--prompt=ü☃ ", "--length=40") == text and adapted != plain


def test_each_printed_cell_is_in_the_json(call, capsys):
    methods = ["lora", "dropout", "flat", "sam", "sam-full", "full"]
    call(*TINY, *methods)
    text, results = capsys.readouterr().out, json.loads(Path("out/results.json").read_text())
    assert text.startswith(results["report"]) and max(map(len, text.splitlines())) <= 80
    assert [(r["seed"], r["method"]) for r in results["runs"]] == [
        (0, "base"),
        *((s, m) for s in (0, 1) for m in methods),
    ]
    digits = {"val_loss": 3, "test_loss": 3, "ood_loss": 3, "sharpness": 4, "passes": 0, "ms": 0}
    by = {
        m: [[r.get(k, math.nan) for k in digits] for r in results["runs"] if r["method"] == m]
        for m in ["base", *methods]
    }
    _, means, _, differences, *_ = text.split("\n\n")
    for line, method in zip(means.splitlines()[2:], by, strict=True):
        cells = zip(np.mean(by[method], 0), digits.values())
        assert line.split() == [method, *("-" if np.isnan(x) else f"{x:.{d}f}" for x, d in cells)]
    for line, method in zip(differences.splitlines()[2:], methods[1:], strict=True):
        gaps = np.subtract(by[method], by["lora"])[:, :4]  # (2, 4); 12.706: Student's t of two values
        cells = zip(gaps.mean(0), 12.706 * gaps.std(0, ddof=1) / math.sqrt(2), digits.values())
        cells = ["-" if np.isnan(x) else f"{x:+.{d}f} +-{half:.{d}f}" for x, half, d in cells]
        assert line.split() == " ".join([method, *cells]).split()
    assert [by[method][0][4] for method in methods] == [1, 1, 1, 2, 2, 1]


def runs(method, losses, passes=2, ms=10.0):
    same = {"val_loss": 1.0, "ood_loss": 1.0, "sharpness": 0.1, "passes": passes, "ms": ms}
    return [{"method": method, "seed": i, **same, "test_loss": loss} for i, loss in enumerate(losses)]


LORA = runs("lora", [1.0, 2.0, 3.0])
VERDICTS = {  # gaps with a standard deviation of 0.1; the t of three values is 4.303, and 4.303 * 0.1 / sqrt(3) = 0.248
    "flat lower by 0.300 +-0.248 at 2 passes": LORA + runs("flat", [0.6, 1.7, 2.8]),
    "flat higher by 0.300 +-0.248 at 2 passes": LORA + runs("flat", [1.2, 2.3, 3.4]),
    "flat the same within the interval at 2 passes": LORA + runs("flat", [0.9, 1.8, 2.7]),
    "flat higher by 0.300 +-0.248, sam lower by 1.000 +-0.000 at 2 passes": LORA
    + runs("flat", [1.2, 2.3, 3.4], passes=1)
    + runs("sam", [0.0, 1.0, 2.0]),
    "": LORA[:1] + runs("flat", [0.5]),
    " ": runs("flat", [0.5, 0.6]) + runs("sam", [0.1, 0.2]),
}


@pytest.mark.parametrize("words", VERDICTS)
def test_the_verdict_follows_the_intervals(words):
    text = " ".join(train_gpt2.report(VERDICTS[words]).split())
    assert f"against that of lora: {words} per step. " in text if words.strip() else "+-" not in text
    assert ("no evidence for flatness" in text) == bool(words.strip())


def test_long_numbers_fit():
    text = train_gpt2.report(runs("lora", [10.0, 20.0], ms=1_234_567.8) + runs("sam-full", [10.0, 21.0]))
    assert "1234568" in text and "+0.500 +-6.353" in text and max(map(len, text.splitlines())) <= 80
    for table in (block.splitlines() for block in text.split("\n\n") if "---" in block):
        assert len({len(line) for line in table}) == 1


# ---- What is compared ----------------------------------------------------------------------------------------
def test_methods_share_adapters_and_data_and_never_write_the_base(call, monkeypatch):
    seen, bases, train = [], [], train_gpt2.train
    for own in (flatlora.flat_lora_step, flatlora.sam_step):

        def step(model, loss_fn, batches, optimizer, *settings, own=own, **more):
            lora = [p.detach().clone() for name, p in model.named_parameters() if "lora_" in name]
            seen.append((lora, [t.clone() for batch in batches for t in batch], settings))
            return own(model, loss_fn, batches, optimizer, *settings, **more)

        monkeypatch.setattr(flatlora, own.__name__, step)
    monkeypatch.setattr(train_gpt2, "train", lambda base, *rest: (bases.append(base), train(base, *rest))[1])
    call(*TINY, "lora", "dropout", "flat", "sam", "sam-full", "full", "--seeds=1")
    tries = [seen[i : i + 3] for i in range(2, len(seen), 3)]  # after two steps of pre-training
    assert len(tries) == 6 and not torch.equal(tries[0][0][1][0], tries[0][1][1][0])
    for own in tries:
        assert all(map(torch.equal, own[0][0], tries[0][0][0]))
        assert all(torch.equal(a, b) for mine, first in zip(own, tries[0]) for a, b in zip(mine[1], first[1]))
    growing = [pytest.approx(0.1 * (1 - math.cos(math.pi * t / 3))) for t in range(3)]
    assert [[settings[0] for *_, settings in own] for own in tries[:3]] == [[0, 0, 0], [0, 0, 0], growing]
    assert [own[1][2][1] for own in tries[:3]] == [(0, 1, 0)] * 3  # seed, step, rank
    assert [own[1][2][:2] for own in tries[3:5]] == [(0.2, "lora"), (0.2, "full")]
    assert all(map(torch.equal, bases[1].parameters(), base_in("out").parameters())) and bases[1] is bases[-1]


@pytest.mark.parametrize("given", ["text", "texts", "data"])
def test_the_given_data_is_used(given, call, monkeypatch, tmp_path):
    """Every training window lies in the training part, and the base's losses are those of the other parts."""
    files = [np.random.default_rng(k).integers(50 * k, 50 * k + 50, 500, dtype=np.uint8) for k in range(4)]
    for i, content in enumerate(files):
        Path(f"{i}").write_bytes(content.tobytes())
        Path(f"{['train', 'val', '', ''][i]}.bin").write_bytes(content.astype(np.uint16).tobytes())
    words = {"text": ["--text", 0], "texts": ["--text", 0, 1, 2], "data": ["--data", tmp_path]}[given]
    batches, step = [], flatlora.flat_lora_step
    monkeypatch.setattr(flatlora, "flat_lora_step", lambda *a, **k: (batches.append(a[2]), step(*a, **k))[1])
    call(*TINY, "lora", "--ood", 3, *words)
    used, parts = files[: 3 if given == "texts" else 1], {"train": (0, 300), "val": (300, 400), "test": (400, 500)}
    parts = {name: np.concatenate([file[a:b] for file in used]) for name, (a, b) in parts.items()}
    if given == "data":
        parts = {"train": files[0], "val": files[1][:250], "test": files[1][250:]}
    for x, y in (pair for batch in batches[2:] for pair in zip(*batch[0])):  # after two steps of pre-training
        assert bytes([*x, y[-1]]) in parts["train"].tobytes() and torch.equal(x[1:], y[:-1])
    found = json.loads(Path("out/results.json").read_text())["runs"][0]
    for name, ids in {"val": parts["val"], "test": parts["test"], "ood": files[3]}.items():
        ids, starts = torch.tensor(ids).long(), range(0, len(ids) - 16, 16)
        rows = [ids[i : i + 17] for i in starts[:: -(-len(starts) // 4)]]  # four windows, evenly spread
        losses = [-base_in("out")(row[None, :16])[0].log_softmax(-1)[range(16), row[1:]].mean().item() for row in rows]
        assert found[f"{name}_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_the_test_of_the_bare_run_hangs_on_no_file_and_is_not_in_train():
    args = argparse.Namespace(init=None, data=None, text=None, ood=None, block_size=64)
    data = train_gpt2.load_data(args, train_gpt2.GPTConfig(1, 1, 16, 64))
    train, test = (bytes(data[name].tolist()) for name in ("train", "test"))
    assert not [i for i in range(0, len(test) - 64, 64) if test[i : i + 65] in train]
    sources = [p.read_bytes() for p in Path(importlib.import_module("email").__path__[0]).glob("*.py")]
    shares = sorted(np.mean([test[i : i + 16] in source for i in range(0, len(test), 16)]) for source in sources)
    assert shares[-1] <= 0.2 and shares[-10] > 0.01


def test_a_byte_order_mark_is_dropped_and_another_encoding_named_with_its_place(tmp_path):
    config, args = train_gpt2.GPTConfig(1, 1, 16, 8), argparse.Namespace(init=None, data=None, ood=None, block_size=8)
    args.text = [tmp_path / "text"]
    args.text[0].write_bytes("\ufeffJosé ".encode() * 30)
    assert bytes(train_gpt2.load_data(args, config)["train"][:5].tolist()) == "José".encode()
    args.init = "gpt2"  # whose tokens are made of text, not of bytes
    for encoding, place in {"utf-16": "byte 0xff in position 0", "latin-1": "byte 0xe9 in position 3"}.items():
        args.text[0].write_bytes("José ".encode(encoding) * 30)
        with pytest.raises(ValueError, match=f"text cannot be used: 'utf-8' codec can't decode {place}"):
            train_gpt2.load_data(args, config)
    args.text[0].write_bytes("Jose ".encode("utf-16-le") * 30)
    with pytest.raises(ValueError, match="text cannot be used: in UTF-8 its byte 1 would not be zero"):
        train_gpt2.load_data(args, config)


def test_learning_rate_by_hand():
    rates = [train_gpt2.learning_rate(step, 20, 1.0) for step in (0, 1, 2, 11, 20)]  # a warm-up of two steps
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.55, 0.1])
    assert train_gpt2.learning_rate(99, 5000, 1.0) == pytest.approx(100 / 101)  # of at most a hundred


def test_generation_repeats_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    model, state, tokens = train_gpt2.GPT(train_gpt2.GPTConfig(1, 1, 16, 8)), torch.get_rng_state(), list(b"ab")
    model.transformer["wpe"].weight.data.mul_(50)
    texts = [train_gpt2.generate(model, tokens, 30, seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2] and torch.equal(torch.get_rng_state(), state)
    for _ in range(30):
        tokens.append(int(model(torch.tensor([tokens[-8:]]))[0, -1].argmax()))
    assert train_gpt2.generate(model, b"ab", 30, top_k=1) == tokens[2:]
