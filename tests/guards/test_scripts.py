"""train_gpt2.py: it is what -h says, reads the data that it is given, compares like with like, prints what it wrote."""

import ast
import email
import io
import math
import pickle
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from running import BARE, DEVICE, PRETRAINING, TINY, base_of, ending, only, results, run

import flatlora
import train_gpt2


@pytest.mark.parametrize("file", ["flatlora.py", "train_toy.py", "train_gpt2.py"])
def test_arrows_point_one_way(file):
    """What is imported before a run; libraries of an extra are imported where they are used."""
    text = Path(train_gpt2.__file__).with_name(file).read_text("utf-8")
    nodes = ast.parse(text).body
    for node in list(nodes):
        if isinstance(node, ast.Try):  # Ctrl-C during the imports is caught
            nodes += node.body
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    packages = {name.partition(".")[0] for name in names}
    packages -= sys.stdlib_module_names | {"numpy", "tqdm", "flatlora"}
    assert packages == {"torch"}
    assert ("flatlora" in names) == (file != "flatlora.py")


def test_help_fits_two_screens_and_shows_every_option(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        run(tmp_path, "-h")
    lines = capsys.readouterr().out.splitlines()
    options = [line for line in lines if line.startswith("  -")]
    assert len(options) == 25
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 80


# ---- Arguments -----------------------------------------------------------------------------------------------
WRONG = {
    "--out SHORT": "SHORT",
    "--text nowhere": "nowhere cannot be used: FileNotFoundError: [Errno 2] No such file",
    "--text SHORT": "the val text has 8 tokens, and --block-size 16 asks for more",
    "--text EMPTY": "the train text has 0 tokens",
    "--data BINS": "--data needs --init",
    "--text SHORT --data BINS --init x": "--data takes the place of --text: give one of them",
    "--peft": "--peft needs --init",
    "--alpha 0": "--alpha must be above 0",
    "--alpha nan": "--alpha must be from 0 to 1000000, got nan",
    "--lora-dropout 1": "--lora-dropout below 1",
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
    characters = text % 65
    large = text.astype(np.uint32) * 300
    inputs = {
        "BINS": np.arange(40, 340, dtype=np.uint16).tobytes(),
        "ODD": b"x" * 301,
        "META": text.astype(np.uint16).tobytes(),
        "CHARACTERS": characters.astype(np.uint16).tobytes() + bytes(50),
        "UINT32": large.tobytes(),
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
    line = end.value.code
    if line == 2:  # argparse's own error
        line = printed.err.splitlines()[-1]
    assert line.startswith("train_gpt2.py: ")
    assert WRONG[words] in line
    assert "\n" not in line
    assert printed.out == ""


def test_more_processes_than_gpus_are_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "--nproc-per-node must be at most 1, the number of GPUs here" in ending(tmp_path)


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
    config = train_gpt2.GPTConfig(1, 1, 16, 16, vocab_size=122)
    with pytest.raises(ValueError, match=r"the train text has the token 1\d\d, the model only 122 of them"):
        train_gpt2.load_data(BARE, config, None)


def test_a_window_beyond_the_models_places_is_an_error():
    config = train_gpt2.GPTConfig(1, 1, 16, block_size=15)
    with pytest.raises(ValueError, match="--block-size must be at most 15 for this model, got 16"):
        train_gpt2.load_data(BARE, config, None)


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii"])
def test_a_stream_shows_what_it_can_after_the_results_are_written(encoding, monkeypatch, tmp_path):
    out = tmp_path / "ü☃"

    class Stream(io.BytesIO):
        def write(self, content):
            assert list(out.glob("results-*"))
            return super().write(content)

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Stream(), encoding))
    run(out, *TINY, "lora", "--prompt=☃")
    sys.stdout.flush()
    shown = sys.stdout.buffer.getvalue()
    assert "ü☃/results".encode(encoding, "replace") in shown


# ---- Like with like ------------------------------------------------------------------------------------------
METHODS = {  # and what takes their steps
    "lora": "flat_lora_step",
    "flat": "flat_lora_step",
    "sam": "sam_step",
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of one TINY run of each method, its steps by method, and the bases of the pre-training and of each."""
    out = tmp_path_factory.mktemp("compared")
    bases = []
    train = train_gpt2.train

    def recorded(base, *rest):
        bases.append(base)
        return train(base, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt2, "train", recorded)
        steps = run(out, *TINY, *METHODS)[PRETRAINING:]

    by = {}
    for i, method in enumerate(METHODS):
        by[method] = steps[3 * i : 3 * i + 3]
    return out, by, bases


def test_methods_share_adapters_and_windows(compared):
    _, steps, _ = compared
    first = steps["lora"][0]
    for method, function in METHODS.items():
        assert [step.function for step in steps[method]] == [function] * 3
        for step, of_lora in zip(steps[method], steps["lora"]):
            assert_same(step.batches, of_lora.batches)
        assert_same(steps[method][0].before, first.before)
    with pytest.raises(AssertionError):
        assert_same(steps["lora"][1].batches, first.batches)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_methods_differ_in_their_settings(compared):
    _, steps, _ = compared
    assert [step.settings[0] for step in steps["lora"]] == [0, 0, 0]
    sigmas = [step.settings[0] for step in steps["flat"]]
    expected = [0, 0.1 * (1 - math.cos(math.pi / 3)), 0.1 * (1 - math.cos(2 * math.pi / 3))]
    assert sigmas == pytest.approx(expected)
    assert steps["sam"][0].settings == (0.2, 1.0)  # rho, max_grad_norm


def test_no_method_writes_the_base(compared):
    out, _, bases = compared
    base = bases[1]
    assert bases[-1] is base
    after = [p.cpu() for p in base.parameters()]
    assert all(map(torch.equal, after, base_of(out).parameters()))


def slow_run(base, data, method, seed, recipe):
    """What `train` does, as plainly as it can be said: one micro-batch per step."""
    sigma = recipe.sigma if method == "flat" else 0
    torch.manual_seed(seed)
    model = flatlora.inject_lora(base, recipe.r, recipe.alpha, recipe.lora_dropout, train_gpt2.TARGETS).train()
    parameters = flatlora.lora_parameters(model)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0)
    for step in range(recipe.steps):
        draw = np.random.default_rng([seed, step, 0])
        (starts,) = draw.integers(len(data) - 16, size=(1, recipe.batch_size))
        torch.manual_seed(int(draw.integers(2**63)))
        text = torch.stack([data[i : i + 17] for i in starts]).long()  # (B, T + 1)
        targets = text[:, 1:].flatten()
        optimizer.param_groups[0]["lr"] = train_gpt2.learning_rate(step, recipe.steps, recipe.lr)

        growth = (1 - math.cos(math.pi * step / recipe.steps)) / 2
        optimizer.zero_grad()
        with flatlora.perturbed(model, sigma * growth, (seed, step, 0)):
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
                logits = model(text[:, :-1])  # (B, T, vocab_size)
            F.cross_entropy(logits.float().flatten(0, 1), targets).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return model


CHANGES = [{}, {"dtype": "bfloat16"}, {"lr": 0.5}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("method", ["lora", "flat"])
def test_a_run_is_that_of_the_slow_loop(method, change, tmp_path):
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
        weights.append(train_gpt2.trained_state(model))

    slow = slow_run(base, data, method, 1, recipe)
    torch.testing.assert_close(weights[1], train_gpt2.trained_state(slow), rtol=1e-4, atol=1e-5)
    A = "transformer.h.0.attn.c_attn.lora_A"
    assert not torch.allclose(weights[0][A], weights[1][A])


def test_a_plain_step_takes_the_mean_gradient_clips_it_and_refuses_what_is_not_finite():
    def mean(model, x):
        return model(x).mean()

    model = torch.nn.Linear(4, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ones = torch.ones(1, 4)
    loss = train_gpt2.plain_step(model, mean, [ones, 3 * ones], optimizer)
    assert loss == pytest.approx(2 * before.sum().item(), rel=1e-5)
    moved = before - model.weight.detach()  # the gradient is (2, 2, 2, 2), of length 4
    torch.testing.assert_close(moved, torch.full((1, 4), 0.5), rtol=1e-4, atol=1e-5)
    with pytest.raises(FloatingPointError, match="not finite"):
        train_gpt2.plain_step(model, mean, [math.inf * ones], optimizer)


def test_seeds_draw_their_own_windows_and_noise(tmp_path):
    steps = run(tmp_path, *TINY, "flat", "--seeds=2")[PRETRAINING:]
    texts = set()
    for step in steps:
        tokens, _ = step.batches[0]
        texts.add(tokens.cpu().numpy().tobytes())
    assert len(texts) == 6
    seeds = [step.settings[1] for step in steps]
    of_first = [(0, 0, 0), (0, 1, 0), (0, 2, 0)]  # (seed, step, rank)
    of_second = [(1, 0, 0), (1, 1, 0), (1, 2, 0)]
    assert seeds == of_first + of_second


def test_c_proj_starts_smaller():
    model = train_gpt2.GPT(train_gpt2.GPTConfig(n_layer=8, n_head=2, n_embd=64, block_size=64))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif p.dim() == 2:
            expected = 0.02 / 4 if "c_proj" in name else 0.02  # sqrt(2 * 8) = 4
            assert p.std().item() == pytest.approx(expected, rel=0.05), name


def saved_run(out, seed):
    """The model of flat, the texts and the result that a run TINY saved."""
    content = train_gpt2.load(only(out, f"flat-{seed}-*.pt"))
    recipe = train_gpt2.Recipe(r=2)
    model = train_gpt2.model_for(base_of(out), "flat", recipe).eval().to(DEVICE)
    train_gpt2.restore(model, content["trained"])
    texts = train_gpt2.load_data(BARE, model.config, None)
    return model, texts, content["log"]["result"]


def test_the_saved_run_is_that_of_its_seed(tmp_path):
    run(tmp_path, *TINY, "flat", "--seeds=2")
    recipe = train_gpt2.Recipe(batch_size=2, block_size=16, eval_windows=4)
    for seed in (0, 1):
        model, texts, result = saved_run(tmp_path, seed)
        found = train_gpt2.losses(model, texts, recipe)
        assert found == {key: result[key] for key in ("val_loss", "test_loss", "ood_loss")}


def four_places(data):
    """At most four windows of 16, evenly spread, in whole batches of two."""
    every = range(0, len(data) - 16, 16)
    stride = math.ceil(len(every) / 4)
    starts = every[::stride]
    return starts[: len(starts) // 2 * 2]


def test_sharpness_is_of_the_training_text_at_a_tenth(compared):
    out, _, _ = compared
    model, texts, result = saved_run(out, seed=0)
    data = texts["train"]
    a, b, c, d = four_places(data)
    batches = []
    for pair in ((a, b), (c, d)):
        text = torch.stack([data[i : i + 17] for i in pair]).long().to(DEVICE)
        batches.append((text[:, :-1], text[:, 1:]))
    expected = flatlora.sharpness(model, train_gpt2.loss_fn, batches, sigma=0.1, samples=4, seed=0)
    assert result["sharpness"] == pytest.approx(expected, abs=1e-7)


# ---- What is printed -----------------------------------------------------------------------------------------
COLUMNS = ["val_loss", "test_loss", "ood_loss", "sharpness"]


@pytest.fixture(scope="module")
def printed(compared, tmp_path_factory):
    """What two seeds of each method print, and their results, of which the first seed is that of `compared`."""
    out = tmp_path_factory.mktemp("printed") / "out"
    shutil.copytree(compared[0], out)
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        run(out, *TINY, *METHODS, "--seeds=2")
    return stream.getvalue(), results(out, seeds=2)


def by_method(runs):
    by = {}
    for each in runs:
        by.setdefault(each["method"], []).append(each)
    return by


def test_results_are_in_the_order_of_the_runs(printed):
    _, found = printed
    order = [(each["seed"], each["method"]) for each in found["runs"]]
    assert order == [(0, "base"), *((0, m) for m in METHODS), *((1, m) for m in METHODS)]


def test_the_printed_report_is_in_the_json(printed):
    text, found = printed
    assert text.startswith(found["report"])
    words = " ".join(text.split())
    assert "n = 2: seeds 0 to 1, methods untuned" in words
    assert "base writes:" in text
    assert "flat writes:" in text
    assert max(map(len, found["report"].splitlines())) <= 80


def rows(text):
    """The words of each row of the table."""
    above, _, _ = text.partition("\n\n")
    _, _, table = above.partition("---")
    _, *lines = table.splitlines()
    return [line.split() for line in lines]


def means(runs, keys):
    cells = []
    for key in keys:
        values = [each[key] for each in runs]
        cells.append(f"{np.mean(values):.4f}")
    return cells


def test_each_printed_mean_is_in_the_json(printed):
    text, found = printed
    by = by_method(found["runs"])
    of_base, of_lora, *_ = rows(text)
    *losses, _ = COLUMNS
    assert of_base == ["base", *means(by["base"], losses), "-"]
    assert of_lora == ["lora", *means(by["lora"], COLUMNS)]


def test_each_printed_difference_is_in_the_json(printed):
    text, found = printed
    by = by_method(found["runs"])
    _, _, *others = rows(text)
    for words, method in zip(others, ["flat", "sam"], strict=True):
        expected = [method]
        for key in COLUMNS:
            gaps = []
            for own, lora in zip(by[method], by["lora"], strict=True):
                gaps.append(own[key] - lora[key])
            half = 12.706 * statistics.stdev(gaps) / math.sqrt(2)  # Student's t of two values
            cell = train_gpt2.plus_minus(np.mean(gaps), half)
            expected += cell.split()
        assert words == expected


def synthetic(method, losses):
    same = {"method": method, "val_loss": 12345.6789, "ood_loss": 10.0, "sharpness": 0.1}
    runs = []
    for seed, loss in enumerate(losses):
        runs.append(same | {"seed": seed, "test_loss": loss})
    return runs


LORA = synthetic("lora", [10.0, 20.0, 30.0])
VERDICTS = {  # gaps with a standard deviation of 0.1; the t of three values is 4.303, and 4.303 * 0.1 / sqrt(3) = 0.248
    "flat lower (-0.4000 +-0.2484)": synthetic("flat", [9.5, 19.6, 29.7]),
    "flat undecided (-0.3000 +-0.2484)": synthetic("flat", [9.6, 19.7, 29.8]),
    "flat undecided (+0.2200 +-0.2484)": synthetic("flat", [10.12, 20.22, 30.32]),
    "flat not shown to differ (-0.2000 +-0.2484)": synthetic("flat", [9.7, 19.8, 29.9]),
    "flat higher (+0.4000 +-0.2484)": synthetic("flat", [10.3, 20.4, 30.5]),
    "flat equal": synthetic("flat", [10.0, 20.0, 30.0]),
    "sam higher (+0.4000 +-0.2484)": synthetic("sam", [10.3, 20.4, 30.5]),
}


@pytest.mark.parametrize("words", VERDICTS)
def test_the_verdict_follows_the_intervals_and_long_numbers_fit(words):
    text = train_gpt2.report(LORA + VERDICTS[words], "GPT-2.")
    assert "12345.6789" in text
    assert max(map(len, text.splitlines())) <= 80
    assert f"against lora's: {words}." in " ".join(text.split())


def test_a_long_cell_does_not_touch_its_neighbour():
    text = train_gpt2.table([["", "a", "b"], ["flat", "+0.00000 +-0.00002", "-0.0030 +-0.0063"]])
    assert text.splitlines()[-1].split() == ["flat", "+0.00000", "+-0.00002", "-0.0030", "+-0.0063"]


def test_one_seed_has_no_interval():
    text = train_gpt2.report(LORA[:1] + synthetic("flat", [0.5]), "GPT-2.")
    assert "+-" not in text
    words = " ".join(text.split())
    assert "No intervals: they need lora, another method and two --seeds" in words


def test_no_width_is_rounded_to_zero():
    assert train_gpt2.plus_minus(0.00004, 0.00002) == "+0.00004 +-0.00002"
    assert train_gpt2.plus_minus(-0.004, 0.012) == "-0.0040 +-0.0120"


STUDENT = {2: 12.706, 3: 4.303, 10: 2.262, 16: 2.131, 40: 2.131}


@pytest.mark.parametrize("n", STUDENT)
def test_intervals_are_students(n):
    values = [0.0] * (n - 1) + [1.0]
    mean, half = train_gpt2.interval(values)
    assert mean == pytest.approx(1 / n)
    error = statistics.stdev(values) / math.sqrt(n)
    assert half == pytest.approx(STUDENT[n] * error)


def test_the_curve_falls_with_the_loss():
    losses = np.linspace(3, 1, 200).tolist()
    curve = train_gpt2.curve(losses)
    assert curve[0] in "█7"
    assert curve[-1] in "▁0"


# ---- Data and text -------------------------------------------------------------------------------------------
def test_each_text_is_split_into_three_fifths_one_and_one():
    parts = train_gpt2.split([b"aaabc", b"AAABC"])
    assert parts == {"train": b"aaaAAA", "val": b"bB", "test": b"cC"}


@pytest.fixture
def files(monkeypatch, tmp_path):
    """Four texts of 500 bytes each, all of them ASCII, without a byte in common."""
    monkeypatch.chdir(tmp_path)
    files = []
    for k in range(4):
        rng = np.random.default_rng(k)
        content = rng.integers(30 * k + 5, 30 * k + 35, 500, dtype=np.uint8)
        Path(f"{k}").write_bytes(content.tobytes())
        files.append(content)
    return files


def check_parts(steps, train, **others):
    """Every training window lies in `train`, and the base's losses are those of the other parts."""
    for step in steps[PRETRAINING:]:
        for x, y in zip(*step.batches[0]):
            assert bytes([*x, y[-1]]) in train.tobytes()
            assert torch.equal(x[1:], y[:-1])

    base = base_of("out")
    found = results("out")["runs"][0]
    for name, part in others.items():
        ids = torch.tensor(part).long()
        losses = []
        for i in four_places(ids):
            logits = base(ids[None, i : i + 16])[0]
            losses.append(F.cross_entropy(logits, ids[i + 1 : i + 17]).item())
        assert found[f"{name}_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_a_given_text_is_split_in_three(files):
    steps = run("out", *TINY, "lora", "--ood", 3, "--text", 0)
    text = files[0]
    check_parts(steps, text[:300], val=text[300:400], test=text[400:], ood=files[3])


def test_each_of_several_texts_is_split_in_three(files):
    steps = run("out", *TINY, "lora", "--ood", 3, "--text", 0, 1, 2)
    texts = np.stack(files[:3])  # (3, 500)
    train, val, test = np.split(texts, [300, 400], axis=1)
    check_parts(steps, train.flatten(), val=val.flatten(), test=test.flatten(), ood=files[3])


def test_the_test_of_the_bare_run_hangs_on_no_file_and_is_not_in_train():
    data = train_gpt2.load_data(BARE, train_gpt2.GPTConfig(1, 1, 16, 64), None)
    train = bytes(data["train"].tolist())
    test = bytes(data["test"].tolist())
    for i in range(0, len(test) - 64, 64):
        assert test[i : i + 65] not in train

    folder = Path(email.__file__).parent
    pieces = [test[i : i + 16] for i in range(0, len(test), 16)]
    shares = []
    for path in folder.glob("*.py"):
        source = path.read_bytes()
        shares.append(np.mean([piece in source for piece in pieces]))
    shares.sort()
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
    by_hand = {0: 1 / 3, 1: 2 / 3, 2: 1.0, 11: 0.55, 20: 0.1}  # a warm-up of two steps
    for step, rate in by_hand.items():
        assert train_gpt2.learning_rate(step, 20, 1.0) == pytest.approx(rate)
    assert train_gpt2.learning_rate(99, 5000, 1.0) == pytest.approx(100 / 101)  # of at most a hundred
