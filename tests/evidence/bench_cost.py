"""What flatness costs: a step of LoRA, Flat-LoRA, the authors' add-and-subtract procedure and SAM, side by side.

    python tests/evidence/bench_cost.py                  # a block of GPT-2: 2 minutes on 2 CPU cores
    python tests/evidence/bench_cost.py --device cuda    # blocks of Llama-7B's width in bfloat16; 140 GB of memory

Time: in each round every method takes one step, in an order that changes. Its time is divided by LoRA's in the same
round, so that what slows the machine for a while slows both. Memory: each method runs alone, and what it needs beside
the model is counted in full, such as the table of normals of Flat-LoRA.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tables import METHODS, Found, cost_table
from torch import Tensor, nn
from tqdm import tqdm
from training import ROOT, flatlora, train_gpt2

SIGMA = 0.05
RHO = 0.05
FILE = Path(__file__).with_name("cost.json")


# ---- Models --------------------------------------------------------------------------------------------------


class LlamaBlock(nn.Module):
    """A block of Llama's shape. Positions are not rotated, which takes next to no time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = width * 43 // 16  # 11,008 for 4,096
        self.heads = max(1, width // 128)
        self.norm_1 = nn.LayerNorm(width, bias=False)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.norm_2 = nn.LayerNorm(width, bias=False)
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm_1(x)  # (B, T, C)
        q = self.split_heads(self.q_proj(normed))  # (B, nh, T, hs)
        k = self.split_heads(self.k_proj(normed))
        v = self.split_heads(self.v_proj(normed))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.transpose(1, 2).flatten(2)  # (B, T, C)
        x = x + self.o_proj(mixed)

        normed = self.norm_2(x)
        gated = F.silu(self.gate_proj(normed)) * self.up_proj(normed)  # (B, T, hidden)
        return x + self.down_proj(gated)  # (B, T, C)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, nh, T, hs)


def gpt2_block(width: int) -> nn.Module:
    config = train_gpt2.GPTConfig(n_layer=1, n_head=width // 64, n_embd=width, block_size=256)
    return train_gpt2.Block(config)


@dataclass(frozen=True)
class Cell:
    """What is measured: the model, and how much goes through it per step."""

    block: Callable[[int], nn.Module]
    width: int
    batch: int = 1
    context: int = 256
    micro_batches: int = 1
    depth: int = 1
    r: int = 16
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


gpt2_cell = partial(Cell, gpt2_block, width=768)
llama_cell = partial(Cell, LlamaBlock, width=4096, depth=4, dtype=torch.bfloat16, device="cuda")
GPT2_CELLS = {
    "1, 2 x 256": gpt2_cell(batch=2),
    "1, 8 x 256": gpt2_cell(batch=8),
    "1, 8 micro-batches of 2 x 256": gpt2_cell(batch=2, micro_batches=8),
}
LLAMA_CELLS = {
    "4, 1 x 1,024": llama_cell(batch=1, context=1024),
    "4, 8 x 2,048": llama_cell(batch=8, context=2048),
    "32, 4 x 1,024": llama_cell(batch=4, context=1024, depth=32),
    "32, 8 micro-batches of 1 x 1,024": llama_cell(batch=1, context=1024, micro_batches=8, depth=32),
}


class Setup(NamedTuple):
    model: nn.Module
    batches: list[Tensor]
    optimizer: torch.optim.Optimizer


def build(cell: Cell) -> Setup:
    """The same for all methods."""
    torch.manual_seed(0)
    with torch.device(cell.device):
        blocks = [cell.block(cell.width) for _ in range(cell.depth)]
        inputs = torch.randn(cell.micro_batches, cell.batch, cell.context, cell.width)  # (micro-batches, B, T, C)
    model = flatlora.inject_lora(nn.Sequential(*blocks).to(cell.dtype), cell.r, 2 * cell.r, targets=".*")
    optimizer = torch.optim.AdamW(flatlora.lora_parameters(model), lr=1e-4)
    return Setup(model, list(inputs.to(cell.dtype)), optimizer)


# ---- Steps ---------------------------------------------------------------------------------------------------


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
        out = model(batch)  # (B, T, C)
    return out.float().square().mean()


def step(method: str, setup: Setup, seed: int) -> None:
    model, batches, optimizer = setup
    if method == "sam":
        flatlora.sam_step(model, mean_square, batches, optimizer, RHO)
    elif method == "add":
        with noise_added(model, seed):  # also during the update, which does not look at W
            flatlora.flat_lora_step(model, mean_square, batches, optimizer, 0.0, seed)
    else:
        sigma = SIGMA if method == "flat" else 0.0
        flatlora.flat_lora_step(model, mean_square, batches, optimizer, sigma, seed)


@contextmanager
def noise_added(model: nn.Module, seed: int) -> Iterator[None]:
    """The authors' procedure, as described: noise is added to the stored weights, drawn again later and subtracted.

    It comes from the global generator, seeded twice. Merged weight, std and noise of each layer are full matrices.
    """
    norms = {layer: row_norms(layer) for layer in flatlora.lora_layers(model).values()}
    add_noise(norms, seed, sign=1)
    yield
    add_noise(norms, seed, sign=-1)


def add_noise(norms: Mapping[flatlora.LoRALinear, Tensor], seed: int, sign: int) -> None:
    torch.manual_seed(seed)
    for layer, norm in norms.items():
        add_noise_to(layer, norm, sign)


# Functions of their own, so that no name keeps a matrix alive for longer than it is needed.
def row_norms(layer: flatlora.LoRALinear) -> Tensor:
    merged = layer.weight.detach().float()
    return merged.norm(dim=1, keepdim=True)  # (m, 1)


def add_noise_to(layer: flatlora.LoRALinear, norm: Tensor, sign: int) -> None:
    weight = layer.frozen_weight.data
    n = layer.in_features
    std = (SIGMA / math.sqrt(n) * norm).repeat(1, n)  # (m, n)
    noise = torch.normal(0.0, std).to(weight.dtype)
    weight += sign * noise


# ---- Time ----------------------------------------------------------------------------------------------------


def times_of_steps(cell: Cell, seconds: float, title: str) -> Found:
    """Steps of all methods in turn for so many seconds, but at least four rounds, of which the first warms up.

    Returns the milliseconds of LoRA (median), and for each method its time as a multiple of LoRA's: lower quartile,
    median and upper quartile. Of Flat-LoRA also each round.
    """
    setups = {method: build(cell) for method in METHODS}
    times = []
    end = time.perf_counter() + seconds
    with tqdm(desc=title, unit="round", leave=False) as progress:
        while len(times) < 4 or time.perf_counter() < end:
            times.append(one_round(setups, seed=len(times)))
            progress.update()

    times = times[1:]
    ratio = {}
    for method in METHODS:
        ratios = [took[method] / took["lora"] for took in times]
        ratio[method] = statistics.quantiles(ratios, n=4, method="inclusive")
    median = statistics.median(took["lora"] for took in times)
    flat = [round(took["flat"] / took["lora"], 4) for took in times]
    return {"rounds": len(times), "ms": 1000 * median, "ratio": ratio, "flat": flat}


def one_round(setups: Mapping[str, Setup], seed: int) -> dict[str, float]:
    """The seconds of each method's step."""
    names = list(setups)
    first = seed % len(names)
    took = {}
    for name in names[first:] + names[:first]:  # nobody is always first
        start = time.perf_counter()
        step(name, setups[name], seed)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took[name] = time.perf_counter() - start
    return took


# ---- Memory and drift ----------------------------------------------------------------------------------------


def peaks_of_processes(cell: Cell) -> dict[str, int]:
    """Bytes: the peak of a new process per method. To be called while this process is small: they count its peak."""
    # With this, glibc gives freed memory back at once, so that their peak is that of what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    found = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for method in tqdm(METHODS, desc="memory", leave=False):
            found[method] = pool.apply(peak_of, (method, cell))
    return found


def peak_of(method: str, cell: Cell) -> int:
    setup = build(cell)
    for seed in range(3):
        step(method, setup, seed)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peaks_on_card(cell: Cell) -> dict[str, int]:
    """Bytes: the most that torch has allocated in the third step of each method."""
    found = {}
    for method in METHODS:
        flatlora.normal_table.cache_clear()
        setup = build(cell)
        gc.collect()  # the model of the method before
        for seed in range(3):
            torch.cuda.reset_peak_memory_stats()
            step(method, setup, seed)
        found[method] = torch.cuda.max_memory_allocated()
    return found


def drift_of_adding(steps: int) -> float:
    """How far the authors' procedure moves frozen weights in bfloat16, in per cent of |W|, on a small model."""
    setup = build(Cell(gpt2_block, width=64, context=16, r=4, dtype=torch.bfloat16))
    layers = flatlora.lora_layers(setup.model).values()
    before = torch.cat([layer.frozen_weight.double().flatten() for layer in layers])
    for seed in range(steps):
        step("add", setup, seed)
    after = torch.cat([layer.frozen_weight.double().flatten() for layer in layers])
    return 100 * ((after - before).norm() / before.norm()).item()


# ---- All together --------------------------------------------------------------------------------------------


def measure_cpu(seconds: float) -> Found:
    first = next(iter(GPT2_CELLS))
    peaks = peaks_of_processes(GPT2_CELLS[first])
    found: Found = {"machine": f"{os.cpu_count()} CPU cores, torch {torch.__version__}, commit {commit()}"}
    found["drift of adding, %, after 100 steps"] = drift_of_adding(steps=100)
    found["cells"] = {title: times_of_steps(cell, seconds, title) for title, cell in GPT2_CELLS.items()}
    found["cells"][first]["peaks"] = peaks
    return found


def measure_cuda(seconds: float) -> Found:
    name = torch.cuda.get_device_name()
    found: Found = {"machine": f"{name}, torch {torch.__version__}, commit {commit()}", "cells": {}}
    for title, cell in LLAMA_CELLS.items():
        peaks = peaks_on_card(cell)
        found["cells"][title] = {**times_of_steps(cell, seconds, title), "peaks": peaks}
    return found


def commit() -> str:
    return subprocess.check_output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], text=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="GPT-2's block, or Llama's (cpu)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of rounds per row (20)")
    parser.add_argument("--out", type=Path, nargs="?", const=FILE, help="JSON file to write into (cost.json here)")
    args = parser.parse_args()

    measured = measure_cpu(args.seconds) if args.device == "cpu" else measure_cuda(args.seconds)
    print(cost_table(measured))
    if args.out:
        found: Found = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
        found[args.device] = measured  # the other device's part stays
        args.out.write_text(json.dumps(found, indent=1), "utf-8")


if __name__ == "__main__":
    main()
