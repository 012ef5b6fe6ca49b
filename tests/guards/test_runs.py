"""Runs of train_gpt2.py that are stopped, killed, started twice or split over two ranks end as if they had not been.

Finished runs are kept. On a full disk or with bad files nothing is lost, and one line says what is wrong.
"""

import itertools
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import CONTEXT, ended, started
from running import BARE, TINY, base_of, ending, only, results, run

import flatlora
import train_gpt2

LONG = [*TINY, "lora", "flat", "sam", "--lora-dropout=0.1", "--grad-accum=2", "--pretrain-steps=8", "--steps=8"]
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has neither SIGKILL nor limits on a process")


def outcome(out):
    """All that a run leaves, apart from times: the numbers, the trained weights, and the names of its files."""
    weights = {}
    for path in out.glob("*-0-*.pt"):
        for name, p in train_gpt2.load(path)["trained"].items():
            weights[path.name, name] = p.numpy().tobytes()
    return results(out)["runs"], weights, {path.name for path in out.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder that LONG leaves when nothing disturbs it."""
    out = tmp_path_factory.mktemp("whole")
    assert len(run(out, *LONG)) == 4 * 8
    names = sorted(path.name.partition("-")[0] for path in out.iterdir())
    assert names == ["base", "flat", "lora", "results", "sam"]
    return out


# ---- Stopped and killed --------------------------------------------------------------------------------------
def start(folder):
    """LONG, which saves after each step, in a process of its own."""
    os.chdir(folder)
    sys.argv = ["train_gpt2.py", *LONG]
    torch.set_num_threads(1)
    train_gpt2.CHECKPOINT_SECONDS = 0
    train_gpt2.main()


def start_to_be_cut(folder, place, number, count):
    """`start`, with a signal inside the write of that count, or soon after it."""
    calls = itertools.count(1)
    write = Path.write_bytes
    replace = os.replace

    def half_written(path, content):
        if next(calls) == count:
            half = bytes(content)[: len(content) // 2]
            write(path, half)
            os.kill(os.getpid(), number)
        return write(path, content)

    def replaced(source, target):
        if next(calls) == count:
            delay = random.uniform(0, 0.02)
            threading.Timer(delay, os.kill, (os.getpid(), number)).start()
        return replace(source, target)

    if place == "inside":
        Path.write_bytes = half_written
    else:
        os.replace = replaced
    try:
        start(folder)
    except SystemExit as end:
        Path(folder, "ending").write_text(str(end))
        raise


def cut(folder, *where):
    """LONG in a process that is cut: how the process ended, and how many steps it has saved."""
    code = ended(started(start_to_be_cut, folder, *where))
    out = folder / "out"
    assert not list(out.glob("results-*"))  # so it was cut
    saved = 0
    for path in out.glob("*-0-*.pt"):
        saved += len(train_gpt2.load(path)["log"]["loss"])
    return code, saved


CUTS = [
    ("inside", "SIGKILL", 4),
    ("inside", "SIGKILL", 36),  # the results
    ("after", "SIGKILL", 14),
    ("after", "SIGINT", 19),
    ("after", "SIGTERM", 30),
]


@POSIX
@pytest.mark.parametrize("place, name, count", CUTS)
def test_the_same_command_goes_on_bit_for_bit(place, name, count, whole, tmp_path, capsys):
    number = signal.Signals[name]
    code, saved = cut(tmp_path, place, number, count)
    if name == "SIGINT":
        assert code == 1
        line = Path(tmp_path, "ending").read_text()
        assert line == "\ntrain_gpt2.py: stopped; the same command goes on"
    else:
        assert code == -number
    out = tmp_path / "out"
    torn = {path.name for path in out.glob(".writing-*")}
    assert len(torn) == 1 or place == "after"
    assert count - 5 < saved <= 4 * 8  # up to three writes are of finished runs

    capsys.readouterr()
    assert len(run(out, *LONG)) == 4 * 8 - saved  # no step is taken twice
    partly = saved % 8
    said = re.findall(r"goes on from step (\d+)\n", capsys.readouterr().err)
    assert said == ([str(partly)] if partly else [])
    *same, names = outcome(out)
    expected = outcome(whole)
    assert (*same, names - torn) == expected


INTERRUPTED_BY_TORCH = f"""
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, *rest):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
runpy.run_path({train_gpt2.__file__!r}, None, "__main__")
"""


def test_ctrl_c_during_the_imports_ends_without_a_traceback(tmp_path):
    words = [sys.executable, "-c", INTERRUPTED_BY_TORCH]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.stderr == ""
    assert done.returncode == -signal.SIGINT


# ---- Kept ----------------------------------------------------------------------------------------------------
def test_more_seeds_and_methods_only_add(tmp_path, capsys):
    run(tmp_path, *TINY, "lora", "flat")
    before = {path: path.read_bytes() for path in tmp_path.glob("*-0-*.pt")}
    first = results(tmp_path)["runs"]
    steps = run(tmp_path, *TINY, "lora", "flat", "sam", "--seeds=2")
    assert len(steps) == 3 + 3 * 3  # sam's seed 0 and all of seed 1
    after = results(tmp_path, seeds=2)["runs"]
    assert after[:3] == first
    assert len(after) == 1 + 2 * 3
    assert {path: path.read_bytes() for path in before} == before
    assert capsys.readouterr().err.count("lora, seed 0:") >= 2  # a line for a kept run, too


def test_a_run_goes_on_from_nothing_but_an_equal_run(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(128)) * 8)
    words = [*TINY, "lora"]
    run(tmp_path, *words)
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    changes = ["--lr=0.1", "--sigma=0.1", "--eval-windows=3", f"--text={tmp_path / 'text'}"]
    for change in [*changes, f"--ood={tmp_path / 'text'}"]:
        assert len(run(tmp_path, *words, change)) == 3
    assert len(run(tmp_path, *words, "flat")) == 3
    for change in ("--batch-size=3", "--pretrain-steps=4"):  # with another base
        assert len(run(tmp_path, *words, change)) in (5, 7)
    assert {path: path.read_bytes() for path in kept} == kept  # nothing is overwritten
    assert len(run(tmp_path, *words)) == 0


def test_the_name_of_a_run_depends_on_the_base():
    torch.manual_seed(0)
    recipe = train_gpt2.Recipe()
    data = {"train": torch.arange(100)}
    names = set()
    for _ in range(2):
        base = train_gpt2.GPT(train_gpt2.GPTConfig(1, 1, 16, 16))
        names.add(train_gpt2.mark_of(base, data, recipe))
    assert len(names) == 2


def start_together(folder, both):
    both.wait()
    start(folder)


def test_the_same_command_twice_at_the_same_time(whole, tmp_path):
    both = CONTEXT.Barrier(2)
    pair = [started(start_together, tmp_path, both) for _ in range(2)]
    assert [ended(process) for process in pair] == [0, 0]
    assert outcome(tmp_path / "out") == outcome(whole)


def drawn(data, step, rank):
    """The two micro-batches of two windows, each (2, 17)."""
    rng = np.random.default_rng([0, step, rank])
    starts = rng.integers(len(data) - 16, size=(2, 2))
    texts = []
    for places in starts:
        windows = [data[i : i + 17] for i in places]
        texts.append(torch.stack(windows).long())
    return texts


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]


def test_two_ranks_are_one_process_with_both_noises_and_batches(tmp_path):
    words = [*TORCHRUN, train_gpt2.__file__, *TINY, "lora", "flat", "--grad-accum=2", "--lr=0.0015"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # one GPU would not do for two ranks
    for _ in range(2):  # gloo's threads may abort a process that ends, https://github.com/pytorch/pytorch/issues/179291
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=100, env=environment)
        if "terminate called without an active exception" not in done.stderr:
            break
    for once in ("Means over the seeds", "Numbers: out"):  # of rank 0
        assert done.stdout.count(once) == 1, done.stderr

    out = tmp_path / "out"
    model = base_of(out).train()
    data = train_gpt2.load_data(BARE, model.config, None)["train"]
    torch.manual_seed(0)
    flatlora.inject_lora(model, 2, 32, targets=train_gpt2.TARGETS)
    parameters = flatlora.lora_parameters(model)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = train_gpt2.learning_rate(step, 3, 0.0015)
        optimizer.zero_grad()
        sigma = flatlora.sigma_at(step, 3, 0.2)
        for rank in (0, 1):
            with flatlora.perturbed(model, sigma, (0, step, rank)):
                for text in drawn(data, step, rank):
                    logits = model(text[:, :-1]).flatten(0, 1)
                    loss = F.cross_entropy(logits, text[:, 1:].flatten())
                    (loss / 4).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    saved = train_gpt2.load(only(out, "flat-0-*.pt"))["trained"]
    torch.testing.assert_close(saved, train_gpt2.trained_state(model), rtol=1e-3, atol=2e-6)  # Adam enlarges rounding


# ---- Full disks and bad files --------------------------------------------------------------------------------
@pytest.fixture
def out(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "out")


@POSIX
def test_a_full_disk_loses_no_earlier_result(out):
    import resource

    before = {p: p.read_bytes() for p in out.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # a longer file fails as on a full disk
    try:
        assert ending(out, *LONG, "--sigma=0.1").endswith("File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p: p.read_bytes() for p in out.iterdir()} == before


def damaged(content):
    """Cut anywhere, random bytes, and a pickle of something else."""
    rng = random.Random(0)
    for n in range(10):
        yield content[: rng.randrange(len(content))]
        yield rng.randbytes(n * n)
    for other in (None, {}, {"base": 1}, [1, 2]):
        yield pickle.dumps(other)


def check_named(victim, out):
    """The run ends in a line that names the file `victim`."""
    line = ending(out, *LONG)
    assert f"{victim.name} cannot be used: " in line
    assert "weights_only" not in line  # torch's advice to load it unsafely


@pytest.mark.parametrize("name", ["flat-*.pt", "base-*.pt"])
def test_a_damaged_file_is_named(name, out):
    victim = only(out, name)
    for case in damaged(victim.read_bytes()):
        victim.write_bytes(case)
        check_named(victim, out)


@pytest.mark.parametrize("name", ["flat-*.pt", "base-*.pt"])
def test_a_file_with_wrong_content_is_named(name, out):
    victim = only(out, name)
    content = train_gpt2.load(victim)
    for wrong in ({}, None, {"x": torch.ones(1)}):
        torch.save(content | {"trained": wrong}, victim)
        check_named(victim, out)
    torch.save(content | {"log": {}}, victim)
    check_named(victim, out)


class Hostile:
    """A pickle that would make a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("it ran",)


@pytest.mark.parametrize("name", ["flat-*.pt", "base-*.pt"])
def test_a_file_that_would_run_code_does_not(name, out, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    victim = only(out, name)
    torch.save({"base": Hostile()}, victim)
    line = ending(out, *LONG)
    assert f"{victim.name} cannot be used: " in line
    assert "it is damaged, or holds more than tensors" in line
    assert not Path("it ran").exists()
    torch.load(victim, weights_only=False)
    assert Path("it ran").exists()  # so the file was what it is meant to be
