"""A run of train_gpt2.py that is stopped, killed, started twice or split over two ranks ends as if it had not been, and
on a full disk or with bad files it loses nothing and says in one line what is wrong."""

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
from running import TINY, base_of, ending, results, run

import flatlora
import train_gpt2

LONG = [*TINY, "lora", "dropout", "flat", "sam", "full", "--grad-accum=2", "--pretrain-steps=8", "--steps=8"]
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has neither SIGKILL nor limits on a process")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train_gpt2.__file__).parent)}


def outcome(out):
    """All that a run leaves, apart from times: the numbers, the adapters as bytes, and the names of its files."""
    numbers = [{key: value for key, value in run.items() if key != "ms"} for run in results(out)["runs"]]
    adapters = {p.name: p.read_bytes() for p in out.glob("*.pt") if not p.name.startswith("base-")}
    return numbers, adapters, {p.name for p in out.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder that LONG leaves when nothing disturbs it."""
    out = tmp_path_factory.mktemp("whole")
    assert len(run(out, *LONG)) == 6 * 8
    names = sorted(name.partition("-")[0] for name in outcome(out)[2])
    assert names == ["base", "dropout.pt", "flat.pt", "lora.pt", "results.json", "sam.pt"]
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
    assert not (folder / "out" / "results.json").exists()  # so it was cut
    return sum(train_gpt2.torch_load(path)["step"] for path in (folder / "out").glob("*-0-*.pt"))


CUTS = [("inside", "SIGKILL", 4), ("inside", "SIGKILL", 53), ("after", "SIGKILL", 14)]  # the 53rd is results.json
CUTS += [("after", "SIGINT", 19), ("after", "SIGTERM", 36)]


@POSIX
@pytest.mark.parametrize("place, number, count", CUTS)
def test_the_same_command_goes_on_bit_for_bit(place, number, count, whole, tmp_path):
    saved, out = cut(tmp_path, place, number, count), tmp_path / "out"
    torn = {path.name for path in out.glob(".writing-*")}
    assert len(torn) == 1 or place == "after"
    assert count - 6 < saved <= 6 * 8  # up to four writes are of adapters
    assert len(run(out, *LONG)) == 6 * 8 - saved  # no step is taken twice
    *same, names = outcome(out)
    assert (*same, names - torn) == outcome(whole)


def test_a_run_goes_on_from_nothing_but_an_equal_run(tmp_path):
    def sam_step(*_, **__):
        signal.raise_signal(signal.SIGINT)

    (tmp_path / "text").write_bytes(bytes(range(256)) * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flatlora, "sam_step", sam_step)
        assert ending(tmp_path, *TINY, "lora", "sam") == "train_gpt2.py: stopped; the same command goes on"
    left = {path.name for path in tmp_path.iterdir()}
    for change in ("--lr=0.1", "--sigma=0.1", "--weight-decay=1", "--batch-size=3", f"--text={tmp_path / 'text'}"):
        assert len(run(tmp_path, *TINY, "lora", "sam", change)) == 6 + 2 * ("batch" in change)  # and the base
        assert left <= {path.name for path in tmp_path.iterdir()}
    assert [len(run(tmp_path, *TINY, "lora", "sam")) for _ in range(2)] == [3, 6]


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
    assert done.stdout.count("Nats per token") == done.stdout.count("Numbers: out") == 1, done.stderr  # of rank 0
    out = tmp_path / "out"
    assert len(names := outcome(out)[2]) == 4 and names > {"lora.pt", "flat.pt", "results.json"}
    args, model = argparse.Namespace(init=None, data=None, text=None, ood=None, block_size=16), base_of(out).train()
    data = train_gpt2.load_data(args, model.config)["train"]
    torch.manual_seed(0)
    parameters = flatlora.lora_parameters(flatlora.inject_lora(model, 2, 32, targets=train_gpt2.TARGETS))
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0)
    starts = torch.randint(len(data) - 16, (3, 2, 2, 2), generator=torch.Generator().manual_seed(0))
    for step in range(3):  # step, rank, micro-batch, window
        optimizer.param_groups[0]["lr"] = train_gpt2.learning_rate(step, 3, 0.0015)
        optimizer.zero_grad()
        for rank in (0, 1):
            with flatlora.perturbed(model, flatlora.sigma_at(step, 3, 0.2), (0, step, rank)):
                for places in starts[step, rank]:
                    text = torch.stack([data[i : i + 17] for i in places]).long()  # (B, T + 1)
                    (F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()) / 4).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    saved = train_gpt2.torch_load(out / "flat.pt")["adapters"]
    torch.testing.assert_close(saved, flatlora.lora_state_dict(model), rtol=1e-3, atol=2e-6)  # Adam enlarges rounding


# ---- Full disks and bad files --------------------------------------------------------------------------------
@pytest.fixture
def out(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "out")


@POSIX
def test_a_full_disk_loses_no_earlier_result(out):
    import resource

    before, limits = {p: p.read_bytes() for p in out.iterdir()}, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # a longer file fails as on a full disk
    try:
        assert ending(out, *LONG, "--sigma=0.1").endswith("File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p: p.read_bytes() for p in out.iterdir()} == before


WRONG = [{"base": 5}, {"base": "nowhere.pt"}, {"r": "2"}, {"r": 0}, {"r": 3}, {"alpha": float("nan")}, {"config": {}}]
WRONG += [{"adapters": {}}, {"adapters": None}, {"adapters": {"x": torch.ones(1)}}]


@pytest.mark.parametrize("name", ["flat.pt", "base-*.pt"])
def test_a_damaged_file_is_named(name, out):
    (victim,) = out.glob(name)
    content, rng = victim.read_bytes(), random.Random(0)
    cases = [content[: rng.randrange(len(content))] for _ in range(20)] + [rng.randbytes(n * n) for n in range(20)]
    for change in WRONG:
        torch.save(torch.load(out / "flat.pt", weights_only=True) | change, out / "other")
        cases += [(out / "other").read_bytes()] * (name == "flat.pt")
    for case in [*cases, *map(pickle.dumps, (None, {}, {"base": 1}, [1, 2]))]:
        victim.write_bytes(case)
        assert "flat.pt cannot be used: " in ending(out, "--sample", out / "flat.pt")


class Hostile:
    """A pickle that would make a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("it ran",)


@pytest.mark.parametrize("name", ["flat.pt", "base-*.pt", "flat-0-*.pt"])
def test_a_file_that_would_run_code_does_not(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "report", lambda runs: signal.raise_signal(signal.SIGINT))  # the checkpoint stays
        ending(tmp_path, *TINY, "flat")
    (victim,) = tmp_path.glob(name)
    torch.save({"base": Hostile()}, victim)
    line = ending(tmp_path, *(["--sample", victim] if name == "flat.pt" else [*TINY, "flat"]))
    assert f"{victim.name} cannot be used: " in line and "eights" in line and not Path("it ran").exists()
    torch.load(victim, weights_only=False)
    assert Path("it ran").exists()  # so the file was what it is meant to be
