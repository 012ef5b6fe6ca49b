"""What flatness costs: one step of LoRA, Flat-LoRA, its add-and-subtract form and SAM in both spaces, side by side.

    python tests/evidence/bench_cost.py           # 2 minutes on 2 CPU cores
    python tests/evidence/bench_cost.py --full    # 15 minutes: more shapes, more rounds
    python tests/evidence/bench_cost.py --device cuda --depth 12 --tokens 8192    # under bfloat16 autocast

The model is a stack of GPT-2 blocks; where CUDA is there, also four blocks of Llama-7B's width in bfloat16. Times: in
each round every method takes one step, in an order that changes, and its time is divided by LoRA's in the same round.
Memory: each method runs in a process of its own.
"""

import argparse
import gc
import importlib.util
import json
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import flatlora
import train_gpt2
import train_toy

# Imported here, so that its modules are in the memory of every method.
peft = None
if importlib.util.find_spec("peft") and torch.__version__ >= "2.6":  # which transformers asks for
    peft = importlib.import_module("peft")
METHODS = {"lora": "LoRA", "peft": "PEFT's LoRA", "flat": "Flat-LoRA", "add": "add and subtract"}
METHODS |= {"sam": "SAM on (A, B)", "sam-full": "SAM on W'"}
PRESENT = [method for method in METHODS if peft or method != "peft"]
SIGMA, RHO, CONTEXT, DTYPES = 0.05, 0.05, 256, {"fp32": torch.float32, "bf16": torch.bfloat16}
SPAWN = multiprocessing.get_context("spawn")  # new processes, which share nothing with this one


@dataclass(frozen=True)
class Cell:
    tokens: int = field(default=512, metadata={"help": "per micro-batch (512)"})
    micro_batches: int = field(default=1, metadata={"help": "per step (1)"})
    width: int = field(default=768, metadata={"help": "of the blocks (768)"})
    depth: int = field(default=1, metadata={"help": "blocks (1)"})
    r: int = field(default=16, metadata={"help": "rank of the adapters (16)"})
    threads: int = field(default=2, metadata={"help": "(2)"})
    device: str = field(default="cpu", metadata={"choices": ["cpu", *["cuda"] * torch.cuda.is_available()]})


# ---- What is compared ----------------------------------------------------------------------------------------
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
        q, k, v = (self.split_heads(project(normed)) for project in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))  # (B, T, C)
        normed = self.norm_2(x)
        return x + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))  # (B, T, C)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, nh, T, hs)


@dataclass(frozen=True)
class LlamaCell:
    batch: int
    context: int
    micro_batches: int = 1
    width: int = 4096
    depth: int = 4
    r: int = 16
    threads: int = 2
    device: str = "cuda"


LLAMA_CELLS = {
    "1 x 1,024": LlamaCell(1, 1024),
    "2 x 1,024": LlamaCell(2, 1024),
    "8 x 2,048": LlamaCell(8, 2048),
    "8 micro-batches of 1 x 1,024": LlamaCell(1, 1024, micro_batches=8),
}


def build_llama(cell: LlamaCell) -> tuple[nn.Module, list[Tensor], Any]:
    """Model in bfloat16 with adapters in float32 on all seven projections, micro-batches and optimizer."""
    torch.manual_seed(0)
    with torch.device(cell.device):
        model = nn.Sequential(*(LlamaBlock(cell.width) for _ in range(cell.depth))).to(torch.bfloat16)
        shape = (cell.batch, cell.context, cell.width)  # (B, T, C)
        batches = [torch.randn(shape, dtype=torch.bfloat16) for _ in range(cell.micro_batches)]
    flatlora.inject_lora(model, cell.r, 2 * cell.r)
    return model, batches, torch.optim.AdamW(flatlora.lora_parameters(model), lr=1e-4)


def llama_times(cell: LlamaCell, seconds: float, title: str) -> dict[str, Any]:
    actions = {method: partial(step, method, *build_llama(cell)) for method in ("lora", "flat", "add", "sam")}
    return rounds(actions, cell, seconds, title)


def llama_parts(cell: LlamaCell, seconds: float) -> dict[str, Any]:
    """What Flat-LoRA adds, against a plain copy of every adapted W: entering `perturbed`, and W + eps."""
    model, _, _ = build_llama(cell)
    layers = flatlora.lora_layers(model).values()

    def copy_weights(seed: int) -> None:
        for layer in layers:
            layer.base.weight.clone()

    def enter(seed: int) -> None:
        with flatlora.perturbed(model, SIGMA, seed):
            pass

    with flatlora.perturbed(model, SIGMA, seed=0):
        noises = [layer.noise for layer in layers]

    def add_noise(seed: int) -> None:
        for layer, noise in zip(layers, noises):
            noise.added_to(layer.base.weight)

    actions = {"copy of W": copy_weights, "W + eps": add_noise, "entering": enter}
    with torch.no_grad():
        return rounds(actions, cell, seconds, "parts")


def build(method: str, cell: Cell, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Tensor], Any]:
    """Model, micro-batches and optimizer, equal for all methods."""
    torch.manual_seed(0)
    config = train_gpt2.GPTConfig(cell.depth, cell.width // math.gcd(cell.width, 64), cell.width, CONTEXT)
    model = nn.Sequential(*(train_gpt2.Block(config) for _ in range(cell.depth))).to(cell.device, dtype)
    if method == "peft":
        adapters = peft.LoraConfig(r=cell.r, lora_alpha=2 * cell.r, target_modules=train_gpt2.TARGETS)
        model = peft.inject_adapter_in_model(adapters, model)
    else:
        flatlora.inject_lora(model, cell.r, 2 * cell.r, targets=train_gpt2.TARGETS)
    shape = (max(1, cell.tokens // CONTEXT), min(cell.tokens, CONTEXT), cell.width)  # (B, T, C)
    batches = [torch.randn(shape).to(cell.device, dtype) for _ in range(cell.micro_batches)]
    return model, batches, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
        return model(batch).float().square().mean()


@contextmanager
def added(model: nn.Module, seed: int) -> Iterator[None]:
    """The authors' procedure, as described: add the noise to the stored weights, draw it again later and subtract it.
    From the global generator, seeded twice; merged weight, std and noise of each layer are full matrices."""
    layers = flatlora.lora_layers(model).values()
    norms = [layer.weight.detach().float().norm(dim=1, keepdim=True) for layer in layers]  # (m, 1) each

    def add(sign: int) -> None:
        torch.manual_seed(seed)
        for layer, norm in zip(layers, norms):
            std = (SIGMA / math.sqrt(layer.in_features) * norm).repeat(1, layer.in_features)  # (m, n)
            layer.base.weight.data += sign * torch.normal(0.0, std).to(layer.base.weight.dtype)

    add(+1)
    yield
    add(-1)


def step(method: str, model: nn.Module, batches: Sequence, optimizer: Any, seed: int, loss: Callable = loss_fn) -> None:
    if method == "sam":
        flatlora.sam_step(model, loss, batches, optimizer, RHO)
    elif method == "sam-full":
        train_toy.sam_on_merged_step(model, loss, batches, optimizer, RHO)
    elif method == "peft":  # flat_lora_step with sigma = 0, which takes no model of PEFT's
        optimizer.zero_grad()
        flatlora._backward(model, loss, batches, scaler=None)
        flatlora._update(optimizer, math.inf, scaler=None)
    else:
        with added(model, seed) if method == "add" else nullcontext():  # W may wait: the update is of A and B only
            flatlora.flat_lora_step(model, loss, batches, optimizer, SIGMA if method == "flat" else 0.0, seed)


# ---- Time ----------------------------------------------------------------------------------------------------
def rounds(actions: Mapping[str, Callable], cell: Cell | LlamaCell, seconds: float, title: str) -> dict[str, Any]:
    """Do each action in turn, for `seconds` but at least four rounds, of which the first warms up. Milliseconds of the
    first action (median); lower quartile, median and upper quartile of each one's time as a multiple of it."""
    torch.set_num_threads(cell.threads)
    found: list[dict[str, float]] = []
    begin = time.perf_counter()
    with tqdm(total=seconds, desc=title, leave=False, bar_format="{l_bar}{bar}| {elapsed}") as bar:
        while len(found) < 4 or time.perf_counter() - begin < seconds:
            turn, took = len(found) % len(actions), {}
            for name in [*actions][turn:] + [*actions][:turn]:  # nobody is always first
                start = time.perf_counter()
                actions[name](seed=len(found))
                if cell.device == "cuda":
                    torch.cuda.synchronize()
                took[name] = time.perf_counter() - start
            found.append(took)
            bar.update(min(seconds, time.perf_counter() - begin) - bar.n)
    found, first = found[1:], next(iter(actions))
    ratios = {name: [took[name] / took[first] for took in found] for name in actions}
    quartiles = {name: statistics.quantiles(values, n=4, method="inclusive") for name, values in ratios.items()}
    return {"rounds": len(found), "ms": 1000 * statistics.median(took[first] for took in found), "ratio": quartiles}


@torch.no_grad()
def forward_times(cell: Cell, seconds: float) -> dict[str, Any]:
    """The forward of four layers with 4 x width outputs: plain, perturbed, between add and subtract; then once more
    while another process multiplies matrices."""
    layers = nn.ModuleList(nn.Linear(cell.width, 4 * cell.width) for _ in range(4))
    model, x = flatlora.inject_lora(layers, cell.r, 2 * cell.r), torch.randn(cell.tokens, cell.width)  # (N, C)

    def forward(method: str, seed: int) -> None:
        noise = {"lora": nullcontext(), "flat": flatlora.perturbed(model, SIGMA, seed), "add": added(model, seed)}
        with noise[method]:
            for layer in model:
                layer(x)  # (N, 4C)

    actions = {method: partial(forward, method) for method in ("lora", "flat", "add")}
    found, started = {"alone": rounds(actions, cell, seconds, "forward, alone")}, SPAWN.Event()
    process = SPAWN.Process(target=multiply, args=(cell.threads, started))
    process.start()
    try:
        started.wait()
        return found | {"busy": rounds(actions, cell, seconds, "forward, busy")}
    finally:
        process.kill()
        process.join()


def multiply(threads: int, started: Any) -> None:
    torch.set_num_threads(threads)
    a = torch.randn(1024, 1024)
    started.set()
    while multiprocessing.parent_process().is_alive():
        a @ a


# ---- Memory and drift ----------------------------------------------------------------------------------------
def memory_of(method: str, cell: Cell) -> dict[str, int]:
    """Bytes: the peak of this process in three steps, what lives between a forward and its backward, and the table of
    normals, which every method's process makes first, so that it is in no difference."""
    table = flatlora._real_table(torch.float32, torch.device(cell.device))
    (model, batches, optimizer), stored = build(method, cell), []
    for seed in range(3):
        step(method, model, batches, optimizer, seed)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated() if cell.device == "cuda" else peak

    def counting(model: nn.Module, batch: Tensor) -> Tensor:
        held: list[Tensor] = []
        with saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
            loss = loss_fn(model, batch)
        reused = [id(x) for x in flatlora._memory.by_dtype.values()]  # one matrix for all layers: the peak counts it
        held += [x for x in gc.get_objects() if issubclass(type(x), Tensor) and id(x) not in reused]
        held += [x.grad for x in held if x.is_leaf and x.grad is not None]
        stored.append(sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}.values()))
        return loss

    step(method, model, batches, optimizer, seed=3, loss=counting)
    return {"peak": peak, "stored": max(stored), "table": table.nbytes}


def drift(method: str, dtype: torch.dtype, steps: int) -> float:
    """|W_after - W_before| / |W_before| over all frozen matrices of a small model, after that many steps."""
    model, batches, optimizer = build(method, Cell(tokens=16, width=64, r=4), dtype)
    frozen = [p for p in model.parameters() if p.dim() == 2 and not p.requires_grad]
    before = torch.cat([p.double().flatten() for p in frozen])
    for seed in tqdm(range(steps), desc=f"drift, {METHODS[method]}, {dtype}", leave=False):
        step(method, model, batches, optimizer, seed)
    return float((torch.cat([p.double().flatten() for p in frozen]) - before).norm() / before.norm())


# ---- Tables and the command line -----------------------------------------------------------------------------
def table(rows: Sequence[Sequence[str]]) -> str:
    width = [max(map(len, column)) for column in zip(*rows)]
    lines = [rows[0], ["-" * w for w in width], *rows[1:]]
    return "\n".join("  ".join([line[0].ljust(width[0]), *map(str.rjust, line[1:], width[1:])]) for line in lines)


def time_table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    columns = []
    for title, cell in cells.items():
        shown = [f"{median:.2f} ({low:.2f}-{high:.2f})" for low, median, high in cell["ratio"].values()]
        flat, add = (cell["ratio"][method][1] - 1 for method in ("flat", "add"))
        share = f"{flat / add:.2f}" if add > 0 else "-"
        columns.append([title, f"{cell['ms']:.0f}", *shown[1:], share])
    names = [METHODS[method] for method in cell["ratio"]]
    return table([*zip(["", "LoRA, ms", *names[1:], "overhead, Flat / add"], *columns)])


def drift_cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0e}" if value else "0"


def parts_table(found: Mapping[str, Any]) -> str:
    medians = [f"{median:.2f}" for _, median, _ in found["ratio"].values()]
    return table([["", *found["ratio"]], [f"times a copy, {found['ms']:.2f} ms", *medians]])


def report(found: Mapping[str, Any]) -> str:
    """All tables, from what the JSON file holds."""
    cells, rows, largest = [*found["time"].items()], [], 16 * found["cell"]["width"] ** 2  # (4 width, width), float32
    parts = [found["machine"], "Time of a step as a multiple of LoRA's: median (quartiles)"]
    parts += [time_table(dict(cells[i : i + 3])) for i in range(0, len(cells), 3)]
    if found["forward"]:
        parts += ["The same of a forward of four layers, alone and beside a busy process"]
        parts += [time_table(found["forward"])]
    if found.get("llama"):
        parts += ["Four blocks of Llama-7B's width in bfloat16: the same by tokens of a pass, then the parts"]
        parts += [time_table(found["llama"]), parts_table(found["llama_parts"])]
    for method in found["drift"]:
        above = [by[method][key] - by["lora"][key] for by in found["memory"].values() for key in ("peak", "stored")]
        drifts = [drift_cell(found["drift"][method].get(name)) for name in DTYPES]
        rows.append([METHODS[method], *(f"{value / largest:.2f}" for value in above), *drifts])
    head = [f"{key}, {depth} bl." for depth in found["memory"] for key in ("peak", "stored")]
    size = next(iter(found["memory"].values()))["flat"]["table"] / 2**20
    parts += [
        f"Memory above LoRA's, at the peak and stored from forward to backward, with the\n"
        f"largest adapted weight, {largest / 2**20:.1f} MiB, as 1; not in it is the table of normals, {size:.0f} MiB.\n"
        f"Drift of W after {found['steps']} steps."
    ]
    return "\n\n".join([*parts, table([["", *head, *(f"drift, {name}" for name in DTYPES)], *rows])])


def main() -> None:
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--full", action="store_true", help="more shapes, more rounds, longer drift")
    parser.add_argument("--seconds", type=float, help="of rounds per cell (20, with --full 45)")
    parser.add_argument(
        "--out", type=Path, nargs="?", const=Path(__file__).with_name("cost.json"), help="write JSON (cost.json here)"
    )
    for f in fields(Cell):
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=f.type, default=f.default, **f.metadata)
    args = parser.parse_args()
    cell = Cell(**{f.name: getattr(args, f.name) for f in fields(Cell)})
    if min(value for value in asdict(cell).values() if value != cell.device) < 1:
        parser.error(f"numbers must be at least 1, got {cell}")
    t, steps, seconds = cell.tokens, 1000 if args.full else 100, args.seconds or (45 if args.full else 20)
    shapes = {f"{t:,} tokens": {}, f"{4 * t:,} tokens": {"tokens": 4 * t}, f"8 x {t:,} tokens": {"micro_batches": 8}}
    if args.full:
        shapes |= {f"{16 * t:,} tokens": {"tokens": 16 * t}, "1 thread": {"threads": 1}, "4 blocks": {"depth": 4}}
        shapes |= {"width 128": {"width": 128}, "width 1600": {"width": 1600}, "r 64": {"r": 64}}
    card = torch.cuda.get_device_name() if cell.device == "cuda" else f"{os.cpu_count()} CPU cores"
    found = {"machine": f"torch {torch.__version__}, {card}, {cell.threads} threads", "cell": asdict(cell)}
    found |= {"steps": steps, "time": {}, "memory": {}, "drift": {}}
    # First, while this process is small: a new one counts the memory of the one it comes from. The threshold is for
    # the new ones: with it glibc gives memory back at once, so that the peak is that of what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with SPAWN.Pool(1, maxtasksperchild=1) as pool:
        for depth in (1, 4) if args.full else (cell.depth,):
            small = replace(cell, tokens=256, micro_batches=1, depth=depth)
            found["memory"][depth] = {m: pool.apply(memory_of, (m, small)) for m in tqdm(PRESENT, desc="memory")}
    for method in PRESENT:
        dtypes = {"fp32": torch.float32} if method == "sam-full" else DTYPES  # it refuses half precision
        found["drift"][method] = {name: drift(method, dtype, steps) for name, dtype in dtypes.items()}
    for title, shape in shapes.items():
        here = replace(cell, **shape)
        actions = {method: partial(step, method, *build(method, here)) for method in PRESENT}
        found["time"][title] = rounds(actions, here, seconds, title)
    found["forward"] = forward_times(cell, seconds / 2) if cell.device == "cpu" else {}
    if torch.cuda.is_available():
        found["llama"] = {title: llama_times(here, seconds, title) for title, here in LLAMA_CELLS.items()}
        found["llama_parts"] = llama_parts(LLAMA_CELLS["1 x 1,024"], seconds)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(report(found))


if __name__ == "__main__":
    main()
