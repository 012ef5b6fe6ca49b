"""Runs of train_gpt2.py equal those of a slow loop, also after a kill, when repeated, or with two processes."""

import importlib
import itertools
import math
import os
import runpy
import shutil
import signal
import socket
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import ended, started
from running import TINY, ending, only, results, run

import flatlora
import train_gpt2

METHODS = train_gpt2.METHODS
# Strong settings, so that each has an effect: gradient norms are above 1, and noise and dropout change the loss.
STRONG = ["--alpha=400", "--sigma=2", "--rho=0.5", "--lora-dropout=0.3", "--grad-accum=2", "--steps=5", "--seeds=2"]
LONG = [*TINY, *METHODS, *STRONG, "--text", "one", "two", "--ood", "three"]
ALL = 10 + 5 * 3 * 2  # steps of LONG, the first ten of them pre-training

BYTES = np.random.default_rng(0).integers(97, 123, (3, 600), np.uint8)
TRAIN, VAL, TEST = (torch.tensor(part).flatten().long() for part in np.split(BYTES[:2], [360, 480], axis=1))
OOD = torch.tensor(BYTES[2]).long()


def write_texts(folder):
    for name, content in zip(("one", "two", "three"), BYTES):
        Path(folder, name).write_bytes(content.tobytes())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the texts and the output of an uninterrupted run of LONG."""
    folder = tmp_path_factory.mktemp("finished")
    write_texts(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("out", *LONG) == ALL
    return folder


@pytest.fixture
def earlier(finished, tmp_path, monkeypatch):
    """Change to a copy of this folder. Returns the contents of its output files."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return contents()


def contents(folder="out"):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# ---- The slow loop -------------------------------------------------------------------------------------------
def windows(data, starts):
    text = torch.stack([data[i : i + 17] for i in starts])  # (B, T + 1)
    return text[:, :-1], text[:, 1:]


def loss_fn(model, batch):
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def slow_run(model, method, data, seed, steps=5, peak=0.05, micro_batches=2, ranks=(0,)):
    """What `train` does, as plainly as possible."""
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0)
    for step in range(steps):
        warmup = steps // 10  # the first of ten steps, none of five
        rate = 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (steps - warmup))
        optimizer.param_groups[0]["lr"] = peak * rate if step >= warmup else peak / 2
        sigma = 2 * (1 - math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        for rank in ranks:
            rng = np.random.default_rng([seed, step, rank])
            starts = rng.integers(len(data) - 16, size=(micro_batches, 2))
            batches = [windows(data, row) for row in starts]
            torch.manual_seed(int(rng.integers(2**63)))
            if method == "sam":
                flatlora.sam_step(model, loss_fn, batches, optimizer, 0.5, 1.0)
                continue
            noise = flatlora.perturbed(model, sigma, (seed, step, rank)) if method == "flat" else nullcontext()
            with noise:
                for batch in batches:
                    loss = loss_fn(model, batch) / micro_batches / len(ranks)
                    loss.backward()
        if method != "sam":
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    return model


def base_of(folder):
    """Loaded as the docstring of the script says."""
    model = train_gpt2.GPT(train_gpt2.GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=16))
    model.load_state_dict(load_run(folder, "base", 0))
    return model


def load_run(folder, method, seed):
    return torch.load(only(folder / "out", f"{method}-{seed}-*.pt"))["model"]


def adapted(folder, seed, alpha=400, dropout=0.3):
    base = base_of(folder)
    torch.manual_seed(seed)
    return flatlora.inject_lora(base, 2, alpha, dropout, targets=train_gpt2.TARGETS)


def assert_near(model, state):
    torch.testing.assert_close(flatlora.lora_state_dict(model), state, rtol=1e-3, atol=1e-4)  # Adam enlarges rounding


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_that_of_the_slow_loop(method, seed, finished):
    """The weights depend on texts, initial adapters, windows, dropout, noise, clipping and each option."""
    model = slow_run(adapted(finished, seed), method, TRAIN, seed)
    assert_near(model, load_run(finished, method, seed))


def test_the_base_is_fully_trained_and_not_changed_later(finished):
    torch.manual_seed(0)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(1, 1, 16, 16))
    text = "\n\n".join(train_gpt2.topics[key] for key in sorted(train_gpt2.topics))
    slow_run(model, "base", torch.tensor(list(text.encode())), 0, steps=10, peak=3e-3, micro_batches=1)
    torch.testing.assert_close(model.state_dict(), load_run(finished, "base", 0))


def test_each_result_is_that_of_its_run(finished):
    runs = [("base", 0), *((method, seed) for seed in (0, 1) for method in METHODS)]
    for found, (method, seed) in zip(results(finished / "out")["runs"], runs, strict=True):
        assert (found["method"], found["seed"]) == (method, seed)
        model = base_of(finished)
        if method != "base":
            model = adapted(finished, 5).eval()
            flatlora.load_lora_state_dict(model, load_run(finished, method, seed))
            sharp = flatlora.sharpness(model, loss_fn, evenly(TRAIN), sigma=0.1, samples=4, seed=0)
            assert found["sharpness"] == pytest.approx(sharp, abs=1e-6)
        for name, data in {"val": VAL, "test": TEST, "ood": OOD}.items():
            losses = [loss_fn(model, batch).item() for batch in evenly(data)]
            assert found[f"{name}_loss"] == pytest.approx(np.mean(losses), abs=1e-6)


def evenly(data):
    """At most four windows, evenly spread, in batches of two."""
    every = range(0, len(data) - 16, 16)
    starts = every[:: math.ceil(len(every) / 4)]
    return [windows(data, starts[i : i + 2]) for i in range(0, len(starts) - 1, 2)]


def test_all_models_share_the_weights_of_the_base(earlier, monkeypatch):
    models = []
    monkeypatch.setattr(train_gpt2, "train", lambda model, *_: models.append(model))
    run("out", *LONG)
    base, *others = ({p.data_ptr() for p in model.parameters()} for model in models)
    assert len(others) == 6
    for one, other in itertools.combinations(others, 2):
        assert one & other == base


# ---- Processes -----------------------------------------------------------------------------------------------
def start(folder, words, environment, killed_at=None):
    """Run the script. It saves after each step, and may be killed in the middle of a write."""
    os.chdir(folder)
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
    sys.argv = ["train_gpt2.py", *words]
    torch.set_num_threads(1)
    script = importlib.reload(train_gpt2)
    script.CHECKPOINT_SECONDS = 0
    write = Path.write_bytes
    calls = itertools.count(1)

    def half_written(path, content):
        if next(calls) == killed_at:
            write(path, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, content)

    Path.write_bytes = half_written
    script.main()


def test_a_rank_counts_only_if_there_are_several(tmp_path):
    assert ended(started(start, tmp_path, [*TINY, "lora"], {"RANK": "1"})) == 0
    assert len(results(tmp_path / "out")["runs"]) == 2


def test_two_processes_equal_one_with_both_noises_and_batches(tmp_path):
    write_texts(tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    words = [*LONG, "--methods", "lora", "flat", "--seeds=1", "--alpha=4", "--lora-dropout=0"]
    first = started(start, tmp_path, words, {**environment, "RANK": "0"})
    second = started(start, tmp_path, words, {**environment, "RANK": "1"}, 1)  # killed if it writes anything
    assert [ended(first), ended(second)] == [0, 0]
    for method in ("lora", "flat"):
        model = slow_run(adapted(tmp_path, 0, 4, 0), method, TRAIN, 0, ranks=(0, 1))
        assert_near(model, load_run(tmp_path, method, 0))


KILLS = {5: "4 of 10", 20: "4 of 5", ALL + 1: "5 of 5"}  # in the pre-training, in a run, at the results


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("killed_at", KILLS)
def test_killed_and_resumed_equals_uninterrupted(killed_at, finished, tmp_path, monkeypatch, capsys):
    write_texts(tmp_path)
    assert ended(started(start, tmp_path, LONG, {}, killed_at)) == -signal.SIGKILL
    monkeypatch.chdir(tmp_path)
    only("out", ".writing-*").unlink()
    assert not list(Path("out").glob("results-*"))
    assert run("out", *LONG) == ALL - (killed_at - 1)  # no step is done twice
    assert f": {KILLS[killed_at]} steps are done" in capsys.readouterr().err
    expected = finished / "out"
    assert results("out") == results(expected)
    assert contents().keys() == contents(expected).keys()
    for path in expected.glob("*.pt"):
        torch.testing.assert_close(torch.load(Path("out", path.name)), torch.load(path), rtol=0, atol=0)


# ---- Changes that train again --------------------------------------------------------------------------------
STEPS = {"--seeds=3": 3 * 5, "--methods sam": 0, "--eval-windows=3": 0, "--ood one": 0, "--sigma=1": 2 * 5}
STEPS |= {"--rho=1": 2 * 5, "--steps=4": 6 * 4, "--pretrain-steps=3": 3 + 6 * 5}
STEPS |= dict.fromkeys(["--lr=1", "--r=3", "--alpha=1", "--lora-dropout=0", "--grad-accum=1"], 6 * 5)
STEPS |= dict.fromkeys(["--batch-size=3", "--dtype=bfloat16"], ALL)


@pytest.mark.parametrize("words", STEPS)
def test_a_changed_training_option_trains_again(words, earlier):
    assert run("out", *LONG, *words.split()) == STEPS[words]
    after = contents()
    assert earlier.items() <= after.items()  # nothing is overwritten
    assert any(name.startswith("results-") for name in after.keys() - earlier.keys())


def test_one_character_anywhere_is_another_text(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = bytearray(b"some text " * 40_000)
    steps = []
    for place in (0, 10_001, 250_003, 399_999):  # of train twice, val and test
        text[place] ^= 1
        Path("text").write_bytes(text)
        steps.append(run("out", *TINY, "lora", "--text", "text"))
    assert steps == [10 + 3, 3, 3, 3]


def test_changed_code_trains_again(monkeypatch, tmp_path):
    """Run copies of both files three times: unedited, after editing one, and after editing both."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *TINY, "lora"])
    for module in (train_gpt2, flatlora):
        shutil.copy(module.__file__, tmp_path)
    runs = []
    for edited in ("another.py", "train_gpt2.py", "flatlora.py"):
        with open(edited, "a") as file:
            file.write("\n# edited\n")
        monkeypatch.delitem(sys.modules, "flatlora")
        runpy.run_path("train_gpt2.py", run_name="__main__")
        runs.append(len(list(Path("out").glob("lora-0-*.pt"))))
    assert runs == [1, 2, 3]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limits on a process")
@pytest.mark.parametrize("change", ["--sigma=1", "--eval-windows=3"])  # fails at a run, at the results
def test_a_full_disk_loses_no_earlier_result(change, earlier):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a longer file fails as on a full disk
    try:
        assert ending("out", *LONG, change).endswith("File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents() == earlier
