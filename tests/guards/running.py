"""What the tests of train_gpt2.py share: tiny runs of it in this process."""

import argparse
import json
import signal
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import flatlora
import train_gpt2

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells turn Ctrl-C off in background jobs

TINY = ["--n-layer=1", "--n-embd=16", "--block-size=16", "--batch-size=2", "--r=2", "--eval-windows=4", "--lr=0.05"]
TINY += ["--pretrain-steps=2", "--steps=3", "--seeds=1", "--methods"]
PRETRAINING = 2  # steps, which come first
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the runs
BARE = argparse.Namespace(data=None, text=None, ood=None, block_size=16)  # what TINY asks of `load_data`
STEPS = {"flat_lora_step": flatlora, "sam_step": flatlora, "plain_step": train_gpt2}


Step = namedtuple("Step", "function before batches settings")  # before: the trained parameters


def run(out, *words):
    """The steps that were taken."""
    steps = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that the tests start, since more of them round differently
    with pytest.MonkeyPatch.context() as patch:
        for name, module in STEPS.items():
            patch.setattr(module, name, recorded(getattr(module, name), steps))
        patch.setattr(sys, "argv", ["train_gpt2.py", "--out", str(out), *map(str, words)])
        try:
            train_gpt2.main()
        finally:
            torch.set_num_threads(threads)
    return steps


def recorded(own, steps):
    def step(model, loss_fn, batches, optimizer, *settings):
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        steps.append(Step(own.__name__, before, batches, settings))
        return own(model, loss_fn, batches, optimizer, *settings)

    return step


def ending(out, *words):
    """The one line in which the run ends."""
    with pytest.raises(SystemExit) as end:
        run(out, *words)
    line = str(end.value).removeprefix("\n")
    assert line.startswith("train_gpt2.py: ")
    assert "\n" not in line
    return line


def only(out, pattern):
    (path,) = Path(out).glob(pattern)
    return path


def results(out, seeds="*"):
    return json.loads(only(out, f"results-*-{seeds}-*.json").read_text())


def base_of(out):
    """The base that a run TINY pre-trained."""
    model = train_gpt2.GPT(train_gpt2.GPTConfig(1, 1, 16, 16))
    train_gpt2.restore(model, train_gpt2.load(only(out, "base-*.pt"))["trained"])
    return model.eval()
