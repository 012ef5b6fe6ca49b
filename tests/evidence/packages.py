"""A small GPT-2 learns the source code of a Python package. A new seed is another package and another base.

Of a package up to 100 kB are used: of every file three fifths to train, one for validation, one for the test. The base
is trained here on the Python language reference, and kept in out/evidence.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import OUT, Batch, Data, Setting, fingerprint, flatlora, train_gpt2

NAMES = ("asyncio", "unittest", "multiprocessing", "importlib", "http")
NAMES += ("urllib", "logging", "json", "wsgiref", "concurrent.futures")
TUNING_NAMES = ("email", "xml.dom")
BLOCK = 64  # tokens, which are bytes, per window
PRETRAINING = 600  # steps, of 16 windows
STEPS = 200  # of 8 windows
MODEL = [train_gpt2.GPT, train_gpt2.Block, train_gpt2.CausalSelfAttention, train_gpt2.MLP]
USED = [*MODEL, train_gpt2.package_sources, train_gpt2.split, train_gpt2.get_batch]  # of the script


class Packages:
    samples = 4

    def __init__(self, first_base: int = 0) -> None:
        self.first_base = first_base  # another number gives every seed another base

    def adapted(self, seed: int, setting: Setting) -> nn.Module:
        base = trained_base(self.first_base + seed)
        model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        return flatlora.inject_lora(model, setting.r or 16, 32, setting.dropout, targets=train_gpt2.TARGETS)

    def data(self, seed: int, tuning: bool) -> Data:
        names = TUNING_NAMES if tuning else NAMES
        own = package(names[seed % len(names)])
        other = package(names[(seed + 1) % len(names)])
        tests = {
            "test": windows_of(own["val" if tuning else "test"], 400),
            "val": windows_of(own["val"], 400),
            "other": windows_of(other["test"], 200),
            "old": windows_of(english(), 100),
        }

        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(own["train"]) - BLOCK, (STEPS, 8), generator=generator)
        steps = [windows_at(own["train"], at) for at in starts]
        return Data(steps, windows_of(own["train"], 200), windows_of(own["train"], 32), tests, tests["test"])


# ---- The base ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def trained_base(seed: int) -> nn.Module:
    """A GPT-2 of 0.8 million weights, with initial weights and windows of its own."""
    code = fingerprint(map(inspect.getsource, [pretrain, train_gpt2.learning_rate, *MODEL]))
    path = OUT / f"base-{seed}-{code}.pt"
    torch.manual_seed(seed)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=BLOCK))
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        pretrain(model, seed)
        OUT.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")  # another process may do the same
        torch.save(model.state_dict(), temporary)
        os.replace(temporary, path)
    return model.eval().requires_grad_(False)


def pretrain(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(english()) - BLOCK, (PRETRAINING, 16), generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step, at in enumerate(starts):
        optimizer.param_groups[0]["lr"] = train_gpt2.learning_rate(step, PRETRAINING, 3e-3)
        x, y = windows_at(english(), at)
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


# ---- The texts -----------------------------------------------------------------------------------------------


@functools.cache
def english() -> Tensor:
    topics = importlib.import_module("pydoc_data.topics").topics
    return tokens("\n\n".join(topics[key] for key in sorted(topics)).encode())


def tokens(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.int32)


@functools.cache
def package(name: str) -> dict[str, Tensor]:
    """The tokens of "train", "val" and "test": as much of each file as makes 100 kB."""
    size = 0
    files: list[bytes] = []
    while sum(map(len, files)) < 100_000 and size < 40_000:
        size += 500
        files = train_gpt2.package_sources(name, size)
    return {split: tokens(text) for split, text in train_gpt2.split(files).items()}


def windows_at(data: Tensor, starts: Tensor) -> Batch:
    return train_gpt2.get_batch(data, starts.numpy(), BLOCK, torch.device("cpu"))


def windows_of(data: Tensor, limit: int) -> list[Batch]:
    """Up to `limit` windows without overlap, evenly spread."""
    starts = torch.arange(0, len(data) - BLOCK, BLOCK)
    every = -(-len(starts) // limit)
    return [windows_at(data, at) for at in starts[::every].split(64)]
