"""Runs that can be left alone: stopped and killed ones go on bit for bit, processes agree, bad input ends clearly."""

import gc
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from reference import adapted_mlp, batch, frozen_bytes, layers, loss_fn, small_mlp
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import train_gpt2
import train_toy
from flatlora import (
    LoRALinear,
    filter_std,
    flat_lora_step,
    inject_lora,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    perturbed,
    sam_step,
    sharpness,
    sigma_at,
)

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "train_gpt2.py")
TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--pretrain-steps", "20"]
TINY += ["--batch-size", "2", "--grad-accum", "2", "--r", "2", "--eval-windows", "8", "--sharpness-samples", "1"]
TINY += ["--length", "4"]
LONG = [*TINY, "--steps", "40", "--methods", "lora", "flat", "sam", "full", "--checkpoint-every", "1"]
LONG += ["--dropout", "0.1", "--lora-dropout", "0.1"]  # so that the global generators count too
LONG += ["--eval-interval", "10"]


def sgd(model, lr=0.1):
    return torch.optim.SGD(lora_parameters(model), lr=lr)


def start(folder, *options, code=None):
    command = [sys.executable, *(["-c", code] if code else [SCRIPT]), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def finish(folder, *options):
    process = start(folder, *options)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return printed


def outcome(folder):
    """All that a run leaves, apart from times."""
    out = folder / "out"
    left = sorted(path.name for path in out.iterdir() if not path.name.startswith("base-"))
    assert left == ["flat.pt", "lora.pt", "results.json", "sam.pt"]  # no checkpoint, no temporary file
    results = json.loads((out / "results.json").read_text())
    runs = [{k: v for k, v in run.items() if k not in ("ms", "time")} for run in results["runs"]]
    assert all(run["best_val_step"] in (10, 20, 30, 40) for run in runs if run["method"] != "base")
    adapters = [torch.load(out / f"{m}.pt", weights_only=True)["adapters"] for m in ("lora", "flat", "sam")]
    return runs, results["samples"], [(k, v.tolist()) for state in adapters for k, v in state.items()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(folder, *LONG)
    return folder, outcome(folder)


# ---- Resume --------------------------------------------------------------------------------------------------


def stop_in_flat(folder, number):
    """Send the signal while the second method trains."""
    process = start(folder, *LONG)
    while not (folder / "out" / "checkpoint-flat-0.pt").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(number)
    return process.communicate(timeout=60)[1], process.returncode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, uninterrupted, number):
    errors, code = stop_in_flat(tmp_path, number)
    assert code == 130 and errors.splitlines()[-1] == ("train_gpt2.py: stopped; the same command with --resume goes on")
    state = torch.load(tmp_path / "out" / "checkpoint-flat-0.pt", weights_only=True)
    assert 1 <= state["step"] < 40 and all(".lora_" in name for name in state["trained"])  # no base weights
    assert f"flat, seed 0: goes on after step {state['step']} of 40" in finish(tmp_path, *LONG, "--resume")
    assert outcome(tmp_path) == uninterrupted[1]


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path, monkeypatch, capsys):
    stop_in_flat(tmp_path, signal.SIGTERM)
    (tmp_path / "text").write_bytes(bytes(range(256)) * 8)
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for options, words in (
        (["--lr", "0.01"], "peak-lr was 0.0015, is 0.01"),
        (["--sigma", "0.3", "--clip", "2"], "clip was 1.0, is 2.0; sigma was 0.2, is 0.3"),
        (["--steps", "41"], "steps was 40, is 41"),
        (["--text", "text"], "training data was"),
        (["--pretrain-lr", "0.1"], "base and first adapters was"),
    ):
        monkeypatch.setattr(sys, "argv", ["script", *LONG, "--resume", *options])
        with pytest.raises(SystemExit, match=re.escape(words)) as error:
            train_gpt2.main()
        assert "checkpoint-lora-0.pt is of another run" in str(error.value) and "\n" not in str(error.value)
    assert all(path.read_bytes() == content for path, content in before.items())  # nothing was lost over it


# ---- Kill ----------------------------------------------------------------------------------------------------

KILLED_IN_A_WRITE = """
import os, signal, sys
import train_gpt2
calls, real = 0, os.{0}
def deadly(*arguments):
    global calls
    calls += 1
    if calls == {1}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
os.{0} = deadly
train_gpt2.main()
"""


@pytest.mark.parametrize(("function", "call"), [("fsync", 10), pytest.param("replace", 80, marks=pytest.mark.slow)])
def test_a_kill_within_a_write_loses_nothing(tmp_path, uninterrupted, function, call):
    process = start(tmp_path, *LONG, code=KILLED_IN_A_WRITE.format(function, call))
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert list((tmp_path / "out").glob("*.tmp"))  # it was in the middle of one
    finish(tmp_path, *LONG, "--resume")
    assert outcome(tmp_path) == uninterrupted[1]


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(tmp_path, uninterrupted, kills=25):
    moments, folder = random.Random(0), tmp_path
    shutil.copytree(
        uninterrupted[0] / "out", folder / "out", ignore=lambda _, names: [n for n in names if n[:4] != "base"]
    )
    survived = 0
    while survived < kills:
        process = start(folder, *LONG, "--resume")
        time.sleep(moments.uniform(1.5, 5))
        process.kill()
        process.communicate()
        if process.returncode == 0:  # it was through before: compare, and begin again
            assert outcome(folder) == uninterrupted[1]
            shutil.rmtree(folder / "out")
        else:
            survived += 1
    finish(folder, *LONG, "--resume")
    assert outcome(folder) == uninterrupted[1]


# ---- Half precision and the scaler ---------------------------------------------------------------------------


def test_a_scaled_loss_takes_the_same_step():
    plain, scaled = adapted_mlp(), adapted_mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(5):  # a power of two changes no bit; clipped, so the order of unscaling and clipping shows
        data = [batch(seed=step), batch(seed=step + 10)]
        flat_lora_step(plain, loss_fn, data, sgd(plain), 0.3, (0, step), max_grad_norm=0.05)
        flat_lora_step(scaled, loss_fn, data, sgd(scaled), 0.3, (0, step), max_grad_norm=0.05, scaler=scaler)
    assert all(torch.equal(a, b) for a, b in zip(lora_parameters(plain), lora_parameters(scaled)))


def test_an_overflow_skips_its_update_and_no_later_noise():
    skipping, plain = adapted_mlp(), adapted_mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(6):

        def overflowing_loss_fn(model, data, overflow=step == 2):
            loss = loss_fn(model, data)
            if overflow:
                loss.register_hook(lambda grad: grad * math.inf)
            return loss

        flat_lora_step(skipping, overflowing_loss_fn, [batch()], sgd(skipping), 0.3, (0, step), scaler=scaler)
        if step != 2:
            flat_lora_step(plain, loss_fn, [batch()], sgd(plain), 0.3, (0, step))
        assert scaler.get_scale() == 2.0 ** (10 if step < 2 else 9)
    assert all(torch.equal(a, b) for a, b in zip(lora_parameters(plain), lora_parameters(skipping)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_scaler_trains_as_float32_does_and_leaves_the_base_alone(dtype):
    models = [adapted_mlp(torch.float32), adapted_mlp(torch.float32)]
    scaler, before = torch.amp.GradScaler("cpu", init_scale=2.0**10), frozen_bytes(models[0])

    def autocast_loss_fn(model, data):
        with torch.autocast("cpu", dtype):
            return loss_fn(model, data)

    data = batch(64, torch.float32)
    for step in range(50):
        flat_lora_step(models[0], loss_fn, [data], sgd(models[0]), 0.1, (0, step))
        flat_lora_step(models[1], autocast_loss_fn, [data], sgd(models[1]), 0.1, (0, step), scaler=scaler)
    exact, half = (torch.cat([p.detach().flatten() for p in lora_parameters(model)]) for model in models)
    assert 0 < (half - exact).norm() / exact.norm() < 0.05
    assert frozen_bytes(models[1]) == before


# ---- Several processes ---------------------------------------------------------------------------------------

STEPS = {
    "flat": lambda net, data, optimizer, seed: flat_lora_step(net, loss_fn, data, optimizer, 0.3, seed, 0.2),
    "sam": lambda net, data, optimizer, seed: sam_step(net, loss_fn, data, optimizer, 0.1, "lora", 0.2),
    "sam-full": lambda net, data, optimizer, seed: sam_step(net, loss_fn, data, optimizer, 0.1, "full", 0.2),
}


def micro_batches(step, rank):
    return [batch(seed=100 * step + 10 * rank + i) for i in range(3)]


def one_rank(folder, name):
    """What each process of the test below does, for one method."""
    model, rank = adapted_mlp(), dist.get_rank()
    net, optimizer = DistributedDataParallel(model), torch.optim.AdamW(lora_parameters(model), lr=0.01)
    for step in range(5):
        STEPS[name](net, micro_batches(step, rank), optimizer, (0, step, rank))
    torch.save(lora_state_dict(model), Path(folder) / f"{name}-{rank}.pt")


def torchrun(folder, *command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29731", "--"]
    for _ in range(2):  # gloo's threads can abort a process that is ending (pytorch/pytorch#179291): once more, then
        done = subprocess.run(
            [*launcher, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
        )
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_ranks_take_the_step_of_one_process_with_both_noises_and_batches(tmp_path):
    torchrun(tmp_path, __file__, str(tmp_path))
    ends = {path.stem: torch.load(path, weights_only=True) for path in tmp_path.glob("*.pt")}
    for name in STEPS:
        assert all(torch.equal(p, ends[f"{name}-1"][key]) for key, p in ends[f"{name}-0"].items())
    model = adapted_mlp()
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.01)
    for step in range(5):
        optimizer.zero_grad()
        for rank in (0, 1):
            with perturbed(model, 0.3, (0, step, rank)):
                for data in micro_batches(step, rank):
                    (loss_fn(model, data) / 6).backward()
        nn.utils.clip_grad_norm_(lora_parameters(model), 0.2)
        optimizer.step()
    torch.testing.assert_close(ends["flat-0"], lora_state_dict(model))


def test_gradients_are_exchanged_once_a_step():
    class Counting(nn.Module):
        waiting, entered = False, 0

        def __init__(self):
            super().__init__()
            self.model = adapted_mlp()

        def forward(self, x):
            self.entered += self.waiting
            return self.model(x)

        def no_sync(self):
            return self  # a context manager that notes whether the forward lies inside of it

        def __enter__(self):
            self.waiting = True

        def __exit__(self, *_):
            self.waiting = False

    model = Counting()
    flat_lora_step(model, loss_fn, [batch()] * 4, sgd(model), 0.3, 0)
    assert model.entered == 3


def test_the_script_gives_each_process_its_batches_and_its_noise(tmp_path, monkeypatch):
    options = [*TINY, "--steps", "3", "--methods", "flat"]
    torchrun(tmp_path, SCRIPT, *options)
    seen = []
    monkeypatch.setattr(train_gpt2, "compare", lambda args, own: seen.append(own["flat"]))
    monkeypatch.setattr(sys, "argv", ["script", *options])
    train_gpt2.main()
    args, data = seen[0], train_gpt2.load_data(seen[0])["train"]
    model = train_gpt2.load_base(next((tmp_path / "out").glob("base-*.pt")), args.device)
    torch.manual_seed(0)
    inject_lora(model, args.r, args.alpha, targets=train_gpt2.TARGETS).train()
    optimizer = torch.optim.AdamW(lora_parameters(model), betas=(0.9, 0.95), weight_decay=0)
    shape = (3, 2, args.grad_accum, args.batch_size)  # step, rank, micro-batch, window
    starts = torch.randint(len(data) - 16, shape, generator=torch.Generator().manual_seed(0))
    for step in range(3):
        optimizer.param_groups[0]["lr"] = train_gpt2.learning_rate(step, 3, args.lr, args.warmup)
        optimizer.zero_grad()
        for rank in (0, 1):
            with perturbed(model, sigma_at(step, 3, args.sigma), (0, step, rank)):
                for places in starts[step, rank]:
                    x, y = train_gpt2.windows(data, places, 16, args.device)
                    (nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()) / 4).backward()
        nn.utils.clip_grad_norm_(lora_parameters(model), args.clip)
        optimizer.step()
    saved = torch.load(tmp_path / "out" / "flat.pt", weights_only=True)["adapters"]
    torch.testing.assert_close(saved, lora_state_dict(model), rtol=1e-3, atol=1e-6)  # Adam enlarges rounding


TWO = [SCRIPT, *TINY, "--steps", "6", "--methods", "lora", "flat", "--lora-dropout", "0.1"]


def test_of_two_processes_one_speaks_and_writes(tmp_path):
    printed = torchrun(tmp_path, *TWO)
    assert printed.count("Results") == printed.count("base: out") == 1
    assert json.loads((tmp_path / "out" / "results.json").read_text())["config"]["world"] == "2"


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step_and_go_on(tmp_path):
    torchrun(tmp_path, *TWO)
    whole = torch.load(tmp_path / "out" / "flat.pt", weights_only=True)["adapters"]
    # The second process alone is told to stop, in the third step of the second method.
    code = "import sys\nimport train_gpt2\nreal, steps = train_gpt2.any_process, iter(range(100))\n"
    code += "def told(noted, args):\n    return real([1] if next(steps) == 8 and args.rank else [], args)\n"
    code += "train_gpt2.any_process = told\ntrain_gpt2.main()\n"
    (tmp_path / "stopping.py").write_text(code)
    with pytest.raises(AssertionError, match="stopped; the same command with --resume goes on"):
        torchrun(tmp_path, "stopping.py", *TWO[1:])
    assert "flat, seed 0: goes on after step 3 of 6" in torchrun(tmp_path, *TWO, "--resume")
    again = torch.load(tmp_path / "out" / "flat.pt", weights_only=True)["adapters"]
    assert all(torch.equal(p, again[key]) for key, p in whole.items())


# ---- Threads -------------------------------------------------------------------------------------------------


def test_the_number_of_threads_changes_a_run_by_rounding_only():
    ends, threads = [], torch.get_num_threads()
    tokens = torch.randint(256, (8, 65), generator=torch.Generator().manual_seed(0))
    for count in (1, 2):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        model = inject_lora(train_gpt2.GPT(train_gpt2.GPTConfig(2, 4, 128, 64)), 4, targets=train_gpt2.TARGETS)
        for step in range(5):
            data = [(tokens[:, :-1], tokens[:, 1:])]
            fn = lambda m, b: nn.functional.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten())  # noqa: E731
            flat_lora_step(model, fn, data, sgd(model), 0.2, (0, step))
        ends.append(torch.cat([p.detach().flatten() for p in lora_parameters(model)]))
    torch.set_num_threads(threads)
    assert (ends[0] - ends[1]).norm() / ends[0].norm() < 1e-5


# ---- Bad input -----------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
NUMBERS = [-1, -0.1, NAN, INF, -INF, "0.1", "", None, [], {}, b"1", 1j]  # none of them a finite number from 0 up
NOT_A_MODEL = [None, 3, "model", nn.Linear(2, 2), nn.Sequential()]
NOT_A_SEED = [-1, 0.5, NAN, None, "a", (1, None), (1, -1), {"a": 1}]
NOT_BATCHES = [None, 3, [], (), iter([batch()]), {}]
NOT_A_LOSS = [lambda m, b: None, lambda m, b: 1.0, lambda m, b: torch.ones(2), lambda m, b: "loss"]
NOT_FINITE = [lambda m, b, v=v: loss_fn(m, b) * v for v in (NAN, INF, -INF)]


def state_with(change):
    state = lora_state_dict(adapted_mlp())
    first = next(iter(state))
    return {
        "missing": {k: v for k, v in state.items() if k != first},
        "extra": {**state, "9.lora_A": state[first]},
        **{name: {**state, first: value} for name, value in [
            ("shape", state[first].T), ("nan", state[first] * NAN), ("inf", state[first] * INF),
            ("int", state[first].long()), ("none", None), ("list", [1.0]), ("scalar", torch.tensor(1.0)),
        ]},
    }[change]  # fmt: skip


STATES = ["missing", "extra", "shape", "nan", "inf", "int", "none", "list", "scalar"]
CALLS = {  # function -> (a call that is right but for one argument, the values that are wrong for each argument)
    "inject_lora": (
        lambda own, **k: inject_lora(**{"model": small_mlp(), **k}),
        {
            "model": [None, 3, nn.Sequential(), nn.ReLU()],
            "r": [0, -1, 1.5, "2", None, NAN, 5, 10**9],
            "alpha": [0, *NUMBERS],
            "dropout": [1, 2, *NUMBERS],
            "targets": ["[", "", "nothing", "0.bias", [], [""], ["0", "nothing"], None, 3, [3], {}],
        },
    ),
    "filter_std": (lambda own, **k: filter_std(own[0].weight, **k), {"sigma": NUMBERS}),
    "sigma_at": (
        lambda own, **k: sigma_at(**{"step": 0, "total_steps": 10, "sigma": 0.1, **k}),
        {
            "step": [-1, 11, NAN, INF],
            "total_steps": [0, -1, NAN],
            "sigma": NUMBERS,
            "schedule": ["", "Cosine", None, 3, "cos"],
        },
    ),
    "perturbed": (
        lambda own, **k: perturbed(**{"model": own, "sigma": 0.1, "seed": 0, **k}).__enter__(),
        {"model": NOT_A_MODEL, "sigma": NUMBERS, "seed": NOT_A_SEED},
    ),
    "flat_lora_step": (
        lambda own, **k: flat_lora_step(
            **{
                "model": own,
                "loss_fn": loss_fn,
                "batches": [batch()],
                "optimizer": sgd(own),
                "sigma": 0.1,
                "seed": 0,
            }
            | k
        ),
        {
            "model": [None, 3, nn.Sequential()],
            "loss_fn": [*NOT_A_LOSS, *NOT_FINITE, None, 3],
            "batches": NOT_BATCHES,
            "optimizer": [None, 3],
            "sigma": NUMBERS,
            "seed": NOT_A_SEED,
            "max_grad_norm": [0, -1, NAN, "1", []],
        },
    ),
    "sam_step": (
        lambda own, **k: sam_step(
            **{"model": own, "loss_fn": loss_fn, "batches": [batch()], "optimizer": sgd(own), "rho": 0.1} | k
        ),
        {
            "model": NOT_A_MODEL,
            "loss_fn": [*NOT_A_LOSS, *NOT_FINITE, None, 3],
            "batches": NOT_BATCHES,
            "rho": NUMBERS,
            "space": ["", "merged", None, 3],
            "max_grad_norm": [0, -1, NAN, "1", []],
        },
    ),
    "sharpness": (
        lambda own, **k: sharpness(
            **{"model": own, "loss_fn": loss_fn, "batches": [batch()], "sigma": 0.1, "samples": 2, "seed": 0} | k
        ),
        {
            "model": NOT_A_MODEL,
            "loss_fn": [*NOT_A_LOSS, *NOT_FINITE, None],
            "batches": NOT_BATCHES,
            "sigma": NUMBERS,
            "samples": [0, -1, NAN, 1.5, "2", None],
            "seed": NOT_A_SEED,
            "space": ["", "merged", None, 3],
        },
    ),
    "load_lora_state_dict": (
        lambda own, **k: load_lora_state_dict(**{"model": own, "state": state_with("missing"), **k}),
        {
            "model": NOT_A_MODEL,
            "state": [None, 3, {}, *map(state_with, STATES)],
        },
    ),
    "merge_lora": (lambda own, **k: merge_lora(**k), {"model": NOT_A_MODEL}),
}
FUZZ = [(f, a, v) for f, (_, wrong) in CALLS.items() for a, values in wrong.items() for v in values]


@pytest.mark.parametrize(("function", "argument", "value"), FUZZ, ids=lambda v: str(v)[:12])
def test_a_wrong_argument_is_an_error_that_changes_nothing(function, argument, value):
    model = adapted_mlp()
    adapters, base = lora_state_dict(model), frozen_bytes(model)
    # ValueError for a wrong value, Python's own TypeError or AttributeError for what is no model, loss or optimizer.
    with pytest.raises((ValueError, FloatingPointError, TypeError, AttributeError)) as error:
        CALLS[function][0](model, **{argument: value})
    assert str(error.value)
    if isinstance(value, (int, float, str)) and argument not in ("loss_fn", "optimizer", "batches", "state", "targets"):
        assert isinstance(error.value, ValueError)
    assert frozen_bytes(model) == base and all(layer._noise is None for layer in layers(model).values())
    assert all(torch.equal(p, adapters[k]) for k, p in lora_state_dict(model).items())


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_named_before_they_spread(value, dtype):
    plain, model = small_mlp(dtype), adapted_mlp(dtype)
    with torch.no_grad():
        plain[2].weight[0, 0] = value
        model[4].weight[0, 0] = value  # later, that is
    with pytest.raises(ValueError, match="2: the weight must be finite"):
        inject_lora(plain, r=2)
    before = lora_state_dict(model)
    for take in STEPS.values():
        with pytest.raises(FloatingPointError, match="not finite"):
            take(model, [batch(dtype=dtype)], sgd(model), 0)
    with pytest.raises(FloatingPointError, match="the merged weight is not finite"):
        merge_lora(model)
    assert all(torch.equal(p, before[k]) for k, p in lora_state_dict(model).items())
    assert isinstance(plain[0], nn.Linear) and isinstance(model[0], LoRALinear)


COUNTS = ["seeds", "steps", "batch-size", "r"]
GPT2_COUNTS = [*COUNTS, "eval-windows", "n-layer", "n-head", "n-embd", "block-size", "pretrain-steps", "grad-accum"]
GPT2_COUNTS += ["length", "top-k", "train-bytes", "checkpoint-every"]
GPT2_NATURAL = ["warmup", "eval-interval", "sharpness-samples"]
GPT2_FLOATS = ["lr", "full-lr", "pretrain-lr", "alpha", "clip", "temperature", "dropout", "lora-dropout", "sigma"]
GPT2_FLOATS += ["rho", "rho-full", "weight-decay", "sharpness-sigma"]
NOT_COUNTS, NOT_FLOATS = ["-1", "1.5", "x", "", "nan", "1e3", "٣x"], ["-1", "nan", "inf", "-inf", "x", ""]
CLI = [("gpt2", o, v) for o in GPT2_COUNTS for v in ["0", *NOT_COUNTS]]
CLI += [("gpt2", o, v) for o in GPT2_NATURAL for v in NOT_COUNTS] + [
    ("gpt2", o, v) for o in GPT2_FLOATS for v in NOT_FLOATS
]
CLI += [("gpt2", o, v) for o in ("device", "dtype", "schedule", "methods") for v in ("", "x", "-1", "CUDA0")]
CLI += [("gpt2", o, v) for o in ("text", "ood", "pretrain-text", "data", "init") for v in ("", "nowhere", "empty", "/")]
CLI += [("toy", o, v) for o in [*COUNTS, "samples", "train-size", "pretrain-steps"] for v in ["0", *NOT_COUNTS]]
CLI += [("toy", o, v) for o in ("alpha", "sigma", "lr", "label-noise", "rho") for v in NOT_FLOATS]


@pytest.mark.parametrize(("script", "option", "value"), CLI)
def test_a_wrong_option_ends_in_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, script, option, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    base = TINY if script == "gpt2" else ["--seeds", "1", "--steps", "2", "--pretrain-steps", "2", "--samples", "1"]
    monkeypatch.setattr(sys, "argv", ["script", *base, f"--{option}={value}"])
    with pytest.raises(SystemExit) as error:
        (train_gpt2 if script == "gpt2" else train_toy).main()
    printed = capsys.readouterr()
    line = error.value.code if isinstance(error.value.code, str) else printed.err.strip().splitlines()[-1]
    assert error.value.code and line and "\n" not in line and printed.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


# ---- Bad files and full disks --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    finish(folder, *TINY, "--steps", "3", "--methods", "flat")
    return folder / "out"


def sample_from(path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "--sample", "--adapter", str(path), "--prompt", "a", "--length", "2"])
    with pytest.raises(SystemExit) as error:
        train_gpt2.main()
    line = str(error.value)
    assert line.startswith("train_gpt2.py: ") and "\n" not in line
    return line


def damaged(content, rng):
    """Truncated, overwritten and random files."""
    yield from (content[: rng.randrange(len(content))] for _ in range(20))
    yield from (
        content[: (at := rng.randrange(len(content) - 64))] + rng.randbytes(64) + content[at + 64 :] for _ in range(20)
    )
    yield from (rng.randbytes(rng.randrange(2000)) for _ in range(20))
    yield from (pickle.dumps(value) for value in (None, {}, {"base": 1}, [1, 2]))


@pytest.mark.parametrize("name", ["flat.pt", "base"])
def test_a_damaged_file_is_named(trained, tmp_path, monkeypatch, name):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    victim = next(tmp_path.glob(f"{name}*"))
    content, cases = victim.read_bytes(), 0
    for broken in damaged(content, random.Random(0)):
        victim.write_bytes(broken)
        monkeypatch.setattr(sys, "argv", ["script", "--sample", "--adapter", str(tmp_path / "flat.pt")])
        sys.argv += ["--prompt", "a", "--length", "2"]
        try:
            train_gpt2.main()  # what was overwritten may be padding
        except SystemExit as error:
            cases += 1
            assert str(victim) in str(error) and "\n" not in str(error)
    assert cases > 50


@pytest.mark.parametrize(
    "change",
    [
        {"base": 5}, {"base": "nowhere.pt"}, {"base": "../../etc/passwd"}, {"r": "2"}, {"r": 0}, {"r": 10**6},
        {"r": None}, {"alpha": math.nan}, {"alpha": "x"}, {"adapters": {}}, {"adapters": None}, {"adapters": {"x": 3}},
        {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_file_with_wrong_content_is_named(trained, tmp_path, monkeypatch, change):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    content = torch.load(tmp_path / "flat.pt", weights_only=True)
    torch.save({**content, **change}, tmp_path / "flat.pt")
    assert (
        "flat.pt" in (line := sample_from(tmp_path / "flat.pt", monkeypatch)) or "nowhere" in line or "passwd" in line
    )


@pytest.mark.parametrize("name", ["flat.pt", "base", "checkpoint-flat-0.pt"])
def test_a_file_that_would_run_code_is_refused_and_does_not(trained, tmp_path, monkeypatch, name):
    shutil.copytree(trained, tmp_path / "out")
    marker = tmp_path / "it ran"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    victim = next((tmp_path / "out").glob(f"{name}*"), tmp_path / "out" / name)
    torch.save({"base": Hostile()}, victim)
    monkeypatch.chdir(tmp_path)
    if name == "checkpoint-flat-0.pt":
        monkeypatch.setattr(sys, "argv", ["script", *TINY, "--steps", "3", "--methods", "flat", "--resume"])
        with pytest.raises(SystemExit, match=f"{name} is not a checkpoint of this script"):
            train_gpt2.main()
    else:
        assert f"{victim.name} is not a checkpoint of this script" in sample_from("out/flat.pt", monkeypatch)
    assert not marker.exists()


def test_a_full_disk_loses_no_earlier_result(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script", *TINY, "--steps", "3", "--methods", "flat"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # a longer file fails as on a full disk
    try:
        with pytest.raises(SystemExit, match="File too large"):
            train_gpt2.main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("script", [train_gpt2, train_toy])
def test_an_output_folder_that_is_none_ends_in_one_line(tmp_path, monkeypatch, script):
    (tmp_path / "file").write_text("kept")
    base = TINY if script is train_gpt2 else ["--seeds", "1", "--steps", "2", "--pretrain-steps", "2", "--samples", "1"]
    monkeypatch.setattr(sys, "argv", ["script", *base, "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="file"):
        script.main()
    assert (tmp_path / "file").read_text() == "kept"


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for method in STEPS:
        one_rank(sys.argv[1], method)
    gc.collect()  # as in train_gpt2.py
    dist.barrier()
    dist.destroy_process_group()
