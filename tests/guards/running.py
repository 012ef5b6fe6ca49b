"""Shared by the tests of train_gpt2.py: tiny runs of it in this process."""

import json
import sys
from pathlib import Path

import pytest
import torch

import train_gpt2

TINY = ["--n-layer=1", "--n-embd=16", "--block-size=16", "--batch-size=2", "--r=2", "--eval-windows=4", "--lr=0.05"]
TINY += ["--pretrain-steps=10", "--steps=3", "--seeds=1", "--methods"]


def run(out, *words):
    """Run the script. Returns the number of its steps of pre-training and fine-tuning."""
    steps = []
    original = train_gpt2.learning_rate

    def counted(step, *rest):
        steps.append(step)
        return original(step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt2, "learning_rate", counted)
        patch.setattr(train_gpt2, "SAMPLE_LENGTH", 20)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(sys, "argv", ["train_gpt2.py", "--out", str(out), *map(str, words)])
        train_gpt2.main()
    return len(steps)


def ending(out, *words):
    """The one-line error message of a run that fails."""
    with pytest.raises(SystemExit) as end:
        run(out, *words)
    line = str(end.value).removeprefix("\n")
    assert line.startswith("train_gpt2.py: ")
    assert "\n" not in line
    return line


def only(out, pattern):
    (path,) = Path(out).glob(pattern)
    return path


def results(out, methods="*"):
    return json.loads(only(out, f"results-{methods}-*.json").read_text())
