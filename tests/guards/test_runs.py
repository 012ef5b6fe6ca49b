"""Runs of train_gpt2.py that are stopped, killed, started twice or split over two ranks end as if they had not been.

Finished runs are kept. On a full disk or with bad files nothing is lost, and one line says what is wrong.
"""

import argparse
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from running import TINY, base_of, ending, only, results, run

import flatlora
import train_gpt2

LONG = [*TINY, "lora", "dropout", "flat", "sam", "--grad-accum=2", "--pretrain-steps=8", "--steps=8"]
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has neither SIGKILL nor limits on a process")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train_gpt2.__file__).parent)}


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
    assert len(run(out, *LONG)) == 5 * 8
    names = sorted(path.name.partition("-")[0] for path in out.iterdir())
    assert names == ["base", "dropout", "flat", "lora", "results", "sam"]
    return out


# ---- Stopped and killed --------------------------------------------------------------------------------------
CUT = """
import os, pathlib, signal, sys, threading, train_gpt2
place, number, count, delay = sys.argv[1], signal.Signals[sys.argv[2]], int(sys.argv[3]), float(sys.argv[4])
owner, name = (pathlib.Path, "write_bytes") if place == "inside" else (os, "replace")
real, calls = getattr(owner, name), []
def cut(first, second):
    calls.append(1)
    if len(calls) == count and place == "inside":
        real(first, bytes(second)[: len(second) // 2])
        os.kill(os.getpid(), number)
    elif len(calls) == count:
        threading.Timer(delay, os.kill, (os.getpid(), number)).start()
    return real(first, second)
setattr(owner, name, cut)
sys.argv[1:5], train_gpt2.CHECKPOINT_SECONDS = [], 0
train_gpt2.main()
"""


def cut(folder, place, number, count):
    """LONG in a process that a signal cuts inside a write, or soon after one: the steps that it saved."""
    words = [sys.executable, "-c", CUT, place, number, str(count), str(random.uniform(0, 0.02)), *LONG]
    done = subprocess.run(words, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    if number == "SIGINT":
        assert (done.returncode, done.stderr.split("\n")[-2]) == (1, "train_gpt2.py: stopped; the same command goes on")
    else:
        assert done.returncode == -signal.Signals[number], done.stderr
    assert not list((folder / "out").glob("results-*"))  # so it was cut
    return sum(len(train_gpt2.load(path)["log"]["loss"]) for path in (folder / "out").glob("*-0-*.pt"))


CUTS = [("inside", "SIGKILL", 4), ("inside", "SIGKILL", 45), ("after", "SIGKILL", 14)]  # the 45th is the results
CUTS += [("after", "SIGINT", 19), ("after", "SIGTERM", 38)]


@POSIX
@pytest.mark.parametrize("place, number, count", CUTS)
def test_the_same_command_goes_on_bit_for_bit(place, number, count, whole, tmp_path, capsys):
    saved = cut(tmp_path, place, number, count)
    out = tmp_path / "out"
    torn = {path.name for path in out.glob(".writing-*")}
    assert len(torn) == 1 or place == "after"
    assert count - 6 < saved <= 5 * 8  # up to four writes are of finished runs

    capsys.readouterr()
    assert len(run(out, *LONG)) == 5 * 8 - saved  # no step is taken twice
    partly = saved % 8
    assert (f"goes on from step {partly}\n" in capsys.readouterr().err) == (partly > 0)
    *same, names = outcome(out)
    expected = outcome(whole)
    assert (*same, names - torn) == expected


def test_ctrl_c_during_the_imports_ends_without_a_traceback():
    code = "import os, signal, sys, types\n"
    code += "class Finder:\n"
    code += "    def find_spec(self, name, *rest):\n"
    code += "        name == 'torch' and os.kill(os.getpid(), signal.SIGINT)\n"
    code += (
        f"sys.meta_path.insert(0, Finder())\nimport runpy\nrunpy.run_path({train_gpt2.__file__!r}, None, '__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert done.stderr == ""
    assert done.returncode == -signal.SIGINT


# ---- Kept ----------------------------------------------------------------------------------------------------
def test_more_seeds_and_methods_only_add(tmp_path, capsys):
    run(tmp_path, *TINY, "lora", "flat")
    before = {path: path.read_bytes() for path in tmp_path.glob("*-0-*.pt")}
    first = results(tmp_path)["runs"]
    steps = run(tmp_path, *TINY, "lora", "flat", "sam", "--seeds=2")
    assert len(steps) == 3 + 3 * 3  # sam's seed 0 and all of seed 1
    after = results(tmp_path, 2)["runs"]
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
    for change in ("--batch-size=3", "--pretrain-steps=4"):  # with another base
        assert len(run(tmp_path, *words, change)) in (5, 7)
    assert {path: path.read_bytes() for path in kept} == kept  # nothing is overwritten
    assert len(run(tmp_path, *words)) == 0


def test_the_name_of_a_run_depends_on_the_base(tmp_path):
    torch.manual_seed(0)
    recipe = train_gpt2.Recipe()
    data = {"train": torch.arange(100)}
    names = set()
    for _ in range(2):
        base = train_gpt2.GPT(train_gpt2.GPTConfig(1, 1, 16, 16))
        names.add(train_gpt2.run_file(tmp_path, base, "lora", data, recipe, 0))
    assert len(names) == 2


TWICE = """
import os, pathlib, time, train_gpt2
pathlib.Path(f"ready-{os.getpid()}").touch()
while len([*pathlib.Path().glob("ready-*")]) < 2:
    time.sleep(0.001)
train_gpt2.CHECKPOINT_SECONDS = 0
train_gpt2.main()
"""


def test_the_same_command_twice_at_the_same_time(whole, tmp_path):
    words = [sys.executable, "-c", TWICE, *LONG]
    pair = [subprocess.Popen(words, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE) for _ in range(2)]
    try:
        errors = [process.communicate(timeout=100)[1] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], errors
    assert outcome(tmp_path / "out") == outcome(whole)


def test_two_ranks_are_one_process_with_both_noises_and_batches(tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    words += [train_gpt2.__file__, *TINY, "lora", "flat", "--grad-accum=2", "--lr=0.0015"]
    for _ in range(2):  # gloo's threads may abort a process that ends, https://github.com/pytorch/pytorch/issues/179291
        done = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.stdout.count("Means over the seeds") == done.stdout.count("Numbers: out") == 1, done.stderr  # of rank 0

    out = tmp_path / "out"
    args = argparse.Namespace(data=None, text=None, ood=None, block_size=16)
    model = base_of(out).train()
    data = train_gpt2.load_data(args, model.config, None)["train"]
    torch.manual_seed(0)
    parameters = flatlora.lora_parameters(flatlora.inject_lora(model, 2, 32, targets=train_gpt2.TARGETS))
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = train_gpt2.learning_rate(step, 3, 0.0015)
        optimizer.zero_grad()
        for rank in (0, 1):
            with flatlora.perturbed(model, flatlora.sigma_at(step, 3, 0.2), (0, step, rank)):
                for text in drawn(data, step, rank):
                    (F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()) / 4).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    saved = train_gpt2.load(only(out, "flat-0-*.pt"))["trained"]
    torch.testing.assert_close(saved, train_gpt2.trained(model), rtol=1e-3, atol=2e-6)  # Adam enlarges rounding


def drawn(data, step, rank):
    """The two micro-batches of two windows, each (2, 17)."""
    import numpy as np

    starts = np.random.default_rng([0, step, rank]).integers(len(data) - 16, size=(2, 2))
    return [torch.stack([data[i : i + 17] for i in places]).long() for places in starts]


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


@pytest.mark.parametrize("name", ["flat-*.pt", "base-*.pt"])
def test_a_damaged_file_is_named(name, out):
    victim = only(out, name)
    content = victim.read_bytes()
    rng = random.Random(0)
    cases = [content[: rng.randrange(len(content))] for _ in range(10)] + [rng.randbytes(n * n) for n in range(10)]
    for change in ({"trained": {}}, {"trained": None}, {"trained": {"x": torch.ones(1)}}):
        torch.save(train_gpt2.load(only(out, name)) | change, out / "other")
        cases.append((out / "other").read_bytes())
    for case in [*cases, *map(pickle.dumps, (None, {}, {"base": 1}, [1, 2]))]:
        victim.write_bytes(case)
        line = ending(out, *LONG)
        assert f"{victim.name} cannot be used: " in line
        assert "weights_only" not in line  # torch's advice to load it unsafely
        victim.write_bytes(content)


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
