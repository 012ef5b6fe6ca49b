"""The network of train_toy.py. A new seed is another target task.

300 samples, a tenth of them labelled at random; the other domain has shifted and wider inputs.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from training import Data, Setting, flatlora, train_toy

USED = [train_toy.source_task, train_toy.target_task]  # of the script


class Toy:
    samples = 10

    def __init__(self) -> None:
        self.teacher, self.student = train_toy.source_task()

    def adapted(self, seed: int, setting: Setting) -> nn.Module:
        return flatlora.inject_lora(copy.deepcopy(self.student), setting.r or 4, 8, setting.dropout, targets=".*")

    def data(self, seed: int, tuning: bool) -> Data:
        splits = train_toy.target_task(self.teacher, 1000 + seed if tuning else seed)
        x, y = splits["train"]
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(len(x), (300, 64), generator=generator)
        steps = [(x[pick], y[pick]) for pick in picks]
        tests = {"test": [splits["test"]], "other": [splits["shifted"]]}
        return Data(steps, [splits["train"]], [splits["train"]], tests, tests["test"])
