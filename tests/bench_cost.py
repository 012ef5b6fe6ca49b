"""What flatness costs: a step of LoRA, Flat-LoRA, its add-and-subtract form, and
SAM in both spaces, side by side.

    python tests/bench_cost.py            # under two minutes on 2 CPU cores
    python tests/bench_cost.py --full     # every axis, under twenty
    python tests/bench_cost.py --device cuda --autocast --depth 12 \\
        --context 1024 --tokens 8192 --axes

The model is a stack of GPT-2 blocks, a copy with the same weights, adapters and
data for each method. A round times one step of each in turn; shown is the
median over rounds of the ratio to LoRA's step in the same round. Memory is that
of a process of its own for each method (on CUDA the allocator's), less LoRA's.
Everything goes to out/cost.json too.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

from flatlora import LoRALinear, flat_lora_step, inject_lora, lora_parameters, sam_step
from train_gpt2 import TARGETS, Block, GPTConfig
from train_toy import environment, table, write_json

SIGMA, RHO = 0.05, 0.05
METHODS = {
    "lora": "LoRA",
    "flat": "Flat-LoRA",
    "keep": "Flat-LoRA, keep=True",
    "peer": "add and subtract",
    "sam": "SAM on (A, B)",
    "sam-full": "SAM on W'",
}
AXES = {  # each with the others at the values of the command line
    "tokens": (512, 2048, 8192),  # a micro-batch
    "micro_batches": (1, 4, 16),
    "width": (128, 768, 1600),
    "depth": (1, 4, 12),
    "threads": (1, 2),
    "r": (4, 16, 64),
}
QUICK = {"tokens": (512, 2048), "micro_batches": (1, 4)}

# ---- What is compared ----------------------------------------------------------------------------------------


def build(args: argparse.Namespace, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    heads = max(1, args.width // 64)
    config = GPTConfig(args.depth, heads, args.width, args.context)
    model = nn.Sequential(*(Block(config) for _ in range(args.depth)))
    return inject_lora(model.to(args.device, dtype), args.r, 2 * args.r, targets=TARGETS)


def data(args: argparse.Namespace, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (max(1, args.tokens // args.context), min(args.tokens, args.context), args.width)  # (B, T, C)
    return [torch.randn(shape, generator=generator).to(args.device, dtype) for _ in range(args.micro_batches)]


def make_loss_fn(args: argparse.Namespace) -> Any:
    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.autocast):
            return model(batch).float().square().mean()

    return loss_fn


class Peer:
    """Noise added to the stored weight and later subtracted, as the authors' code is described: from the global
    generator, seeded twice a step, with the merged weight, the std and the noise of each layer as full matrices."""

    def __init__(self) -> None:
        self.norms: list[Tensor] = []

    @torch.no_grad()
    def move(self, model: nn.Module, seed: int, sign: int) -> None:
        torch.manual_seed(seed)
        layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
        if sign > 0:
            self.norms = [(x.weight + x.scaling * (x.lora_B @ x.lora_A)).float().norm(dim=1) for x in layers]  # (m,)
        for layer, norm in zip(layers, self.norms):
            std = (SIGMA / math.sqrt(layer.in_features) * norm)[:, None].repeat(1, layer.in_features)  # (m, n)
            layer.weight.data += sign * torch.normal(0.0, std).to(layer.weight.dtype)

    def step(self, model: nn.Module, loss_fn: Any, batches: Sequence[Tensor], optimizer: Any, seed: int) -> None:
        optimizer.zero_grad()
        self.move(model, seed, +1)
        for batch in batches:
            (loss_fn(model, batch) / len(batches)).backward()
        self.move(model, seed, -1)
        nn.utils.clip_grad_norm_(lora_parameters(model), math.inf)  # the other steps take the norm as well
        optimizer.step()


PEER = Peer()


def step(method: str, model: nn.Module, loss_fn: Any, batches: list[Tensor], optimizer: Any, seed: int) -> None:
    if method == "peer":
        PEER.step(model, loss_fn, batches, optimizer, seed)
    elif method.startswith("sam"):
        sam_step(model, loss_fn, batches, optimizer, RHO, "full" if method == "sam-full" else "lora")
    else:
        sigma = 0.0 if method == "lora" else SIGMA
        flat_lora_step(model, loss_fn, batches, optimizer, sigma, seed, keep=method == "keep")


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(lora_parameters(model), lr=1e-4)


# ---- The measurements ----------------------------------------------------------------------------------------


def times(args: argparse.Namespace, title: str) -> dict[str, Any]:
    """Median and quartiles of each method's time against LoRA's, over rounds for about args.seconds."""
    torch.set_num_threads(args.threads)
    base, batches, loss_fn = build(args), data(args), make_loss_fn(args)
    models = {method: copy.deepcopy(base) for method in METHODS}
    optimizers = {method: adamw(model) for method, model in models.items()}
    rounds: list[dict[str, float]] = []
    begin = time.perf_counter()
    with tqdm(total=args.seconds, desc=title, leave=False, bar_format="{l_bar}{bar}|") as bar:
        while len(rounds) < (8 if args.full else 6) or (
            time.perf_counter() - begin < args.seconds and len(rounds) < 100
        ):
            turn = len(rounds) % len(METHODS)  # nobody is always first
            seconds = {}
            for method in [*METHODS][turn:] + [*METHODS][:turn]:
                start = time.perf_counter()
                step(method, models[method], loss_fn, batches, optimizers[method], seed=len(rounds))
                if args.device == "cuda":
                    torch.cuda.synchronize()
                seconds[method] = time.perf_counter() - start
            rounds.append(seconds)
            bar.n = min(args.seconds, time.perf_counter() - begin)
            bar.refresh()
    rounds = rounds[1:]  # the first one warms up
    result: dict[str, Any] = {"rounds": len(rounds), "lora_ms": 1000 * statistics.median(r["lora"] for r in rounds)}
    for method in METHODS:
        ratios = [seconds[method] / seconds["lora"] for seconds in rounds]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        result[method] = {"median": median, "quartiles": [low, high]}
    return result


def stored(method: str, args: argparse.Namespace) -> int:
    """Bytes that live from a forward to its backward: saved by autograd or held by the method, parameters excluded."""
    model, batches, plain = build(args), data(args)[:1], make_loss_fn(args)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    most = 0

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal most
        held = [*PEER.norms, *(p.data for p in model.parameters())]
        for layer in model.modules():
            noise = getattr(layer, "_noise", None)
            held += [noise] if isinstance(noise, Tensor) else noise[:1] if noise else []
        with saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
            loss = plain(model, batch)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        most = max(most, sum(size for pointer, size in storages.items() if pointer not in own))
        return loss

    step(method, model, loss_fn, batches, adamw(model), seed=0)
    return most


def peak(method: str, args: argparse.Namespace) -> int:
    """Peak bytes of this process over three steps."""
    model, batches, loss_fn = build(args), data(args), make_loss_fn(args)
    optimizer = adamw(model)
    for seed in range(3):
        step(method, model, loss_fn, batches, optimizer, seed)
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory(args: argparse.Namespace, depth: int) -> dict[str, dict[str, int]]:
    """For each method: bytes at the peak and stored for the backward, each less LoRA's."""
    sizes: dict[str, dict[str, int]] = {}
    for method in tqdm(METHODS, desc=f"memory, {depth} block(s)", leave=False):
        options = [f"--{name}={getattr(args, name)}" for name in ("device", "width", "r", "threads")]
        options += [f"--depth={depth}", "--tokens=256", "--context=256", f"--memory-of={method}"]
        # With this threshold glibc gives memory back at once, so that the peak is that of what is in use.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, *options]
        sizes[method] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
    return {m: {key: value - sizes["lora"][key] for key, value in by.items()} for m, by in sizes.items()}


def drift(method: str, dtype: torch.dtype, steps: int) -> float:
    """|W_after - W_before| / |W_before| over all adapted weights, after that many steps."""
    args = argparse.Namespace(width=64, depth=1, context=16, tokens=16, micro_batches=1, r=4, device="cpu")
    args.autocast = False
    model, batches, loss_fn = build(args, dtype), data(args, dtype), make_loss_fn(args)
    weights = [module.weight for module in model.modules() if isinstance(module, LoRALinear)]
    before = torch.cat([w.detach().double().flatten() for w in weights])
    optimizer = adamw(model)
    for seed in tqdm(range(steps), desc=f"drift, {METHODS[method]}, {dtype}", leave=False):
        step(method, model, loss_fn, batches, optimizer, seed)
    after = torch.cat([w.detach().double().flatten() for w in weights])
    return float((after - before).norm() / before.norm())


# ---- Tables and the command line -----------------------------------------------------------------------------


def memory_table(found: dict[str, Any]) -> str:
    largest = 4 * 4 * int(found["options"]["width"]) ** 2
    head = ["", *(f"{key}, depth {depth}" for depth in found["memory"] for key in ("peak", "stored"))]
    rows = [
        [name]
        + [f"{by[m][key] / largest:.2f}" for by in found["memory"].values() for key in ("peak", "stored")]
        + [f"{value:.0e}" if value else "0" for value in found["drift"][m].values()]
        for m, name in METHODS.items()
    ]
    return (
        "Memory above LoRA's at the peak, and stored from forward to backward, with the\n"
        f"largest adapted weight, {largest / 2**20:.1f} MiB, as 1. "
        f"Relative drift of W after {found['drift_steps']} steps.\n\n"
    ) + table([*head, "drift, fp32", "drift, bf16"], rows)


def time_table(found: dict[str, Any], axis: str) -> str:
    cells = found["time"][axis]
    rows = [["LoRA, ms", *(f"{cell['lora_ms']:.0f}" for cell in cells.values())]]
    rows += [[METHODS[m], *(f"{cell[m]['median']:.2f}" for cell in cells.values())] for m in METHODS]
    return f"Time of a step / LoRA's\n\n{table([axis.replace('_', '-'), *map(str, cells)], rows)}"


def main() -> None:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__, formatter_class=shape)
    add = parser.add_argument
    add("--full", action="store_true", help="every axis, and more rounds")
    add("--axes", nargs="*", choices=AXES, help="only these axes, in full; none: only the values below")
    add("--seconds", type=float, help="rounds go on so long for each cell (5, with --full 30)")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--autocast", action="store_true", help="bfloat16 autocast")
    add("--width", type=int, default=768, help="(768)")
    add("--depth", type=int, default=1, help="blocks (1)")
    add("--context", type=int, default=256, help="tokens a sequence (256)")
    add("--tokens", type=int, default=512, help="a micro-batch (512)")
    add("--micro-batches", type=int, default=1, help="a step (1)")
    add("--r", type=int, default=16, help="rank (16)")
    add("--threads", type=int, default=torch.get_num_threads(), help="(all cores)")
    add("--out", type=Path, default=Path("out"), help="folder for cost.json (out)")
    add("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        torch.set_num_threads(args.threads)
        print(json.dumps({"peak": peak(args.memory_of, args), "stored": stored(args.memory_of, args)}))
        return
    args.seconds = args.seconds or (30 if args.full else 5)
    axes = AXES if args.full else QUICK
    if args.axes is not None:
        axes = {axis: AXES[axis] for axis in args.axes} or {"tokens": (args.tokens,)}
    options = {key: str(value) for key, value in vars(args).items()}
    steps = 1000 if args.full else 100
    found: dict[str, Any] = {"environment": environment(), "options": options, "drift_steps": steps, "time": {}}

    # First, while this process is small: a new one counts the memory of the one it comes from.
    found["memory"] = {depth: memory(args, depth) for depth in ((1, 4) if args.full else (1,))}
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    found["drift"] = {m: {name: drift(m, dtype, steps) for name, dtype in dtypes.items()} for m in METHODS}
    print(f"\n{memory_table(found)}")

    done: dict[str, Any] = {}  # the axes cross in one cell
    for axis, values in axes.items():
        for value in values:
            cell = argparse.Namespace(**{**vars(args), axis: value})
            if str(cell) not in done:
                done[str(cell)] = times(cell, f"{axis.replace('_', '-')} {value}")
            found["time"].setdefault(axis, {})[value] = done[str(cell)]
        print(f"\n{time_table(found, axis)}")
    write_json(args.out / "cost.json", found)
    print(f"\nAll numbers: {args.out / 'cost.json'}")


if __name__ == "__main__":
    main()
