"""A run of train_gpt2.py that is stopped, killed, started twice or split over two ranks ends as if it had not been, and
on a full disk or with bad files it loses nothing and says in one line what is wrong."""

import argparse
import dataclasses
import errno
import json
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

import flatlora
import train_gpt2

TINY = ["--n-layer=1", "--n-embd=16", "--block-size=16", "--batch-size=2", "--grad-accum=2", "--r=2", "--seeds=1"]
TINY += ["--eval-windows=4"]
LONG = [*TINY, "--pretrain-steps=8", "--steps=8", "--methods", "lora", "dropout", "flat", "sam", "full"]
SHORT = [*TINY, "--pretrain-steps=2", "--steps=2", "--methods", "flat"]
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has neither SIGKILL nor limits on a process")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train_gpt2.__file__).parent)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():  # as in the processes that are started here, since more of them round differently
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(out, *words):
    """The script in this process; the number of optimizer steps that it took."""
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("flat_lora_step", "sam_step"):
            own = getattr(flatlora, name)
            patch.setattr(flatlora, name, lambda *a, own=own, **k: (taken.append(1), own(*a, **k))[1])
        patch.setattr(sys, "argv", ["train_gpt2.py", "--out", str(out), *map(str, words)])
        train_gpt2.main()
    return len(taken)


def ending(out, *words):
    """The one line in which the run ends."""
    with pytest.raises(SystemExit) as end:
        run(out, *words)
    line = str(end.value).removeprefix("\n")
    assert line.startswith("train_gpt2.py: ") and "\n" not in line
    return line


def outcome(out):
    """All that a run leaves, apart from times: the numbers, the adapters as bytes, and the names of its files."""
    runs = json.loads((out / "results.json").read_text())["runs"]
    numbers = [{key: value for key, value in run.items() if key != "ms"} for run in runs]
    adapters = {p.name: p.read_bytes() for p in out.glob("*.pt") if not p.name.startswith("base-")}
    return numbers, adapters, {p.name for p in out.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the commands LONG and SHORT leave when nothing disturbs them."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder / "long", *LONG) == 6 * 8 and run(folder / "short", *SHORT) == 4
    names = sorted(name.partition("-")[0] for name in outcome(folder / "long")[2])
    assert names == ["base", "dropout.pt", "flat.pt", "lora.pt", "results.json", "sam.pt"]
    return folder


# ---- Stopped and killed --------------------------------------------------------------------------------------
CUT = """
import os, pathlib, signal, sys, threading
import train_gpt2
place, number, count, delay = sys.argv[1], signal.Signals[sys.argv[2]], int(sys.argv[3]), float(sys.argv[4])
del sys.argv[1:5]
train_gpt2.CHECKPOINT_SECONDS = 0
owner, name = {"save": (train_gpt2, "save"), "replace": (os, "replace"), "write": (pathlib.Path, "write_bytes")}[place]
real, calls = getattr(owner, name), []
def cut(*arguments):
    calls.append(1)
    if len(calls) == count and place == "save":
        threading.Timer(delay, os.kill, (os.getpid(), number)).start()
    elif len(calls) == count:
        if place == "write":
            real(arguments[0], bytes(arguments[1])[:len(arguments[1]) // 2])
        os.kill(os.getpid(), number)
    return real(*arguments)
setattr(owner, name, cut)
train_gpt2.main()
"""
CUTS = [("write", "SIGKILL", 4), ("replace", "SIGKILL", 31), ("save", "SIGKILL", 14), ("save", "SIGINT", 22)]
CUTS += [("save", "SIGTERM", 36)]


def cut(folder, place, number, count):
    """LONG in a process that is cut within a write or replacement or, "save", soon after one; the steps it saved."""
    command = [sys.executable, "-c", CUT, place, number, str(count), str(random.uniform(0, 0.02)), *LONG]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    if number == "SIGINT":
        assert (done.returncode, done.stderr.split("\n")[-2]) == (1, "train_gpt2.py: stopped; the same command goes on")
    else:
        assert done.returncode == -getattr(signal, number), done.stderr
    assert not (folder / "out" / "results.json").exists()  # so work was left to do
    return sum(train_gpt2.torch_load(path)["step"] for path in (folder / "out").glob("*-0-*.pt"))


@POSIX
@pytest.mark.parametrize("place, number, count", CUTS)
def test_the_same_command_goes_on_bit_for_bit(place, number, count, whole, tmp_path):
    saved = cut(tmp_path, place, number, count)
    torn = {path.name for path in (tmp_path / "out").glob(".writing-*")}
    assert len(torn) == 1 or place == "save"
    assert count - 6 < saved < 6 * 8  # up to four saves are of adapters
    assert run(tmp_path / "out", *LONG) == 6 * 8 - saved  # no step is taken twice
    *results, names = outcome(tmp_path / "out")
    assert (*results, names - torn) == outcome(whole / "long")


@POSIX
@pytest.mark.slow
def test_killed_again_and_again_it_ends_as_if_it_had_not_been(whole, tmp_path):
    saved = 0
    while saved < 40:
        before, saved = saved, cut(tmp_path, "save", "SIGKILL", 4)
        assert saved > before
    assert run(tmp_path / "out", *LONG) == 6 * 8 - saved
    assert outcome(tmp_path / "out")[:2] == outcome(whole / "long")[:2]


def test_a_run_goes_on_from_nothing_but_an_equal_run(monkeypatch, tmp_path):
    words, out = [*TINY, "--pretrain-steps=3", "--steps=3", "--methods", "lora", "sam"], tmp_path / "out"
    (tmp_path / "text").write_bytes(bytes(range(256)) * 4)
    with monkeypatch.context() as patch:
        patch.setattr(flatlora, "sam_step", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        assert ending(out, *words) == "train_gpt2.py: stopped; the same command goes on"
    left = {path.name for path in out.iterdir()}
    for change in (["--lr=0.1"], ["--sigma=0.1"], ["--weight-decay=1"], ["--text", tmp_path / "text"]):
        assert run(out, *words, *change) == 6 and left <= {path.name for path in out.iterdir()}
    assert run(out, *words, "--pretrain-steps=2") == 8
    assert run(out, *words) == 3 and run(out, *words) == 6


def test_each_setting_gives_a_run_a_file_of_its_own(monkeypatch, tmp_path):
    base, other, wide = (train_gpt2.GPT(train_gpt2.GPTConfig(1, 1, n, 8)) for n in (8, 8, 16))
    recipe, data = train_gpt2.Recipe(), torch.arange(100)
    runs = [(base, "flat", data, recipe, 0), (other, "flat", data, recipe, 0), (wide, "flat", data, recipe, 0)]
    runs += [(base, "lora", data, recipe, 0), (base, "flat", data, recipe, 1), (base, "flat", data[1:], recipe, 0)]
    for field in dataclasses.fields(recipe):
        changed = {"schedule": "linear", "dtype": "bfloat16"}.get(field.name) or field.default + 1
        runs.append((base, "flat", data, dataclasses.replace(recipe, **{field.name: changed}), 0))
    files = [train_gpt2.run_file(tmp_path, *run) for run in runs]
    assert train_gpt2.run_file(tmp_path, *runs[0]) == files[0]
    monkeypatch.setattr(train_gpt2, "WORLD", 2)
    assert len({*files, train_gpt2.run_file(tmp_path, *runs[0])}) == len(runs) + 1


TWICE = """
import os, pathlib, time
import train_gpt2
train_gpt2.CHECKPOINT_SECONDS = 0
pathlib.Path(f"ready-{os.getpid()}").touch()
while len([*pathlib.Path().glob("ready-*")]) < 2:
    time.sleep(0.001)
train_gpt2.main()
"""


def test_the_same_command_twice_at_the_same_time(whole, tmp_path):
    command, pipes = [sys.executable, "-c", TWICE, *LONG], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    pair = [subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, **pipes) for _ in range(2)]
    try:
        ends = [process.communicate(timeout=100) for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], ends
    assert outcome(tmp_path / "out") == outcome(whole / "long")


# ---- Two ranks -----------------------------------------------------------------------------------------------
RANKS = [*TINY, "--pretrain-steps=3", "--steps=4", "--methods", "lora", "flat"]


def torchrun(folder, *command, fails=False):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--", *command]
    for _ in range(2):  # gloo's threads may abort a process that ends, https://github.com/pytorch/pytorch/issues/179291
        done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=150)
        if "terminate called without an active exception" not in done.stderr:
            break
    assert (done.returncode != 0) is fails, done.stderr
    return done.stdout


def test_two_ranks_are_one_process_with_both_noises_and_batches(tmp_path):
    printed = torchrun(tmp_path, train_gpt2.__file__, *RANKS)
    assert printed.count("Nats per token") == printed.count("Numbers: out") == 1  # only rank 0 speaks and writes
    (file,) = (tmp_path / "out").glob("base-*.pt")
    assert outcome(tmp_path / "out")[2] == {file.name, "lora.pt", "flat.pt", "results.json"}
    model = train_gpt2.GPT(train_gpt2.GPTConfig(1, 1, 16, 16))
    model.load_state_dict(train_gpt2.torch_load(file)["trained"], strict=False)  # lm_head is wte
    args = argparse.Namespace(init=None, data=None, text=None, ood=None, block_size=16)
    data = train_gpt2.load_data(args, model.config)["train"]
    torch.manual_seed(0)
    parameters = flatlora.lora_parameters(flatlora.inject_lora(model, 2, 32, targets=train_gpt2.TARGETS))
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0)
    starts = torch.randint(len(data) - 16, (4, 2, 2, 2), generator=torch.Generator().manual_seed(0))
    for step in range(4):  # step, rank, micro-batch, window
        optimizer.param_groups[0]["lr"] = train_gpt2.learning_rate(step, 4, 1.5e-3)
        optimizer.zero_grad()
        for rank in (0, 1):
            with flatlora.perturbed(model, flatlora.sigma_at(step, 4, 0.2), (0, step, rank)):
                for places in starts[step, rank]:
                    text = torch.stack([data[i : i + 17] for i in places]).long()  # (B, T + 1)
                    (F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()) / 4).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    saved = train_gpt2.torch_load(tmp_path / "out" / "flat.pt")["adapters"]
    torch.testing.assert_close(saved, flatlora.lora_state_dict(model), rtol=1e-3, atol=2e-6)  # Adam enlarges rounding


@POSIX
@pytest.mark.slow
def test_two_ranks_killed_go_on_bit_for_bit(tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    torchrun(tmp_path / "whole", train_gpt2.__file__, *RANKS)
    (tmp_path / "cut.py").write_text(CUT)  # rank 0 alone saves, and is killed at its tenth replacement
    torchrun(tmp_path / "killed", "../cut.py", "replace", "SIGKILL", "10", "0", *RANKS, fails=True)
    steps = [train_gpt2.torch_load(p)["step"] for p in sorted((tmp_path / "killed" / "out").glob("*-0-*.pt"))]
    assert steps == [3, 1, 4]  # base, flat, lora; between the last two, lora.pt
    torchrun(tmp_path / "killed", train_gpt2.__file__, *RANKS)
    assert outcome(tmp_path / "killed" / "out")[:2] == outcome(tmp_path / "whole" / "out")[:2]


# ---- Full disks and bad files --------------------------------------------------------------------------------
@pytest.fixture
def out(whole, tmp_path):
    """The folder of a finished run SHORT."""
    return shutil.copytree(whole / "short", tmp_path / "out")


@POSIX
def test_a_full_disk_loses_no_earlier_result(out):
    import resource

    before, limits = {p: p.read_bytes() for p in out.iterdir()}, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # a longer file fails as on a full disk
    try:
        assert ending(out, *SHORT, "--sigma=0.1").endswith("File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize("count", [1, 2, 3])  # the checkpoint, the adapter, the results
def test_a_disk_that_fills_at_any_write_leaves_whole_files(count, out, monkeypatch):
    before, write, calls = (out / "results.json").read_bytes(), Path.write_bytes, []

    def filled(path, content):
        calls.append(path)
        if len(calls) == count:
            write(path, bytes(content)[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", filled)
    assert "No space left on device" in ending(out, *SHORT, "--sigma=0.1")
    assert (out / "results.json").read_bytes() == before and not [*out.glob(".writing-*")]
    assert run(out, *SHORT, "--sigma=0.1") == (2 if count == 1 else 0)


@pytest.mark.parametrize("below", ["", "below"])
def test_an_output_folder_that_is_none_ends_before_any_step(below, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(flatlora, "flat_lora_step", lambda *_: pytest.fail("a step was taken"))
    assert "file" in ending(tmp_path / "file" / below, *SHORT) and (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("name", ["flat", "base"])
def test_a_damaged_file_is_named(name, out):
    (victim,) = out.glob(f"{name}*.pt")
    content, rng = victim.read_bytes(), random.Random(0)
    broken = [content[: rng.randrange(len(content))] for _ in range(20)] + [rng.randbytes(n * n) for n in range(20)]
    for case in [*broken, *map(pickle.dumps, (None, {}, {"base": 1}, [1, 2]))]:
        victim.write_bytes(case)
        assert "flat.pt cannot be used: " in ending(out, "--sample", out / "flat.pt")


WRONG = [{"base": 5}, {"base": "nowhere.pt"}, {"r": "2"}, {"r": 0}, {"r": 3}, {"alpha": float("nan")}, {"config": {}}]
WRONG += [{"adapters": {}}, {"adapters": None}, {"adapters": {"x": torch.ones(1)}}]


def test_a_file_with_wrong_content_is_named(out):
    content = train_gpt2.torch_load(out / "flat.pt")
    for change in WRONG:
        torch.save(content | change, out / "flat.pt")
        assert "flat.pt cannot be used: " in ending(out, "--sample", out / "flat.pt")


class Hostile:
    """A pickle that would make a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("it ran",)


@pytest.mark.parametrize("name", ["flat.pt", "base-*.pt", "flat-0-*.pt"])
def test_a_file_that_would_run_code_does_not(name, out, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "report", lambda runs: signal.raise_signal(signal.SIGINT))  # the checkpoint stays
        ending(out, *SHORT)
    (victim,) = out.glob(name)
    torch.save({"base": Hostile()}, victim)
    line = ending(out, *(["--sample", victim] if name == "flat.pt" else SHORT))
    assert f"{victim.name} cannot be used: " in line and "eights" in line and not Path("it ran").exists()
    torch.load(victim, weights_only=False)
    assert Path("it ran").exists()  # so the file was what it is meant to be
