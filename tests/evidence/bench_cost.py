"""What flatness costs: a step of LoRA, Flat-LoRA, its add-and-subtract form and two forms of SAM, side by side.

    python tests/evidence/bench_cost.py                  # a block of GPT-2: 3 minutes on 2 CPU cores
    python tests/evidence/bench_cost.py --device cuda    # blocks of Llama-7B's width in bfloat16; 140 GB of memory

Time: in each round every method takes one step, in an order that changes. Its time is divided by LoRA's in the same
round, so that what slows the machine for a while slows both. Memory: each method runs alone.
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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm
from training import flatlora, train_gpt2, train_toy

METHODS = {
    "lora": "LoRA",
    "peft": "PEFT's LoRA",
    "flat": "Flat-LoRA",
    "add": "add and subtract",
    "sam": "SAM on (A, B)",
    "sam-full": "SAM on W'",
}
SIGMA = 0.05
RHO = 0.05
DRIFT_STEPS = 100
FILE = Path(__file__).with_name("cost.json")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPAWN = multiprocessing.get_context("spawn")  # new processes, which share nothing with this one
Found = dict[str, Any]  # what was measured, as the JSON file holds it

PRESENT = list(METHODS)
if importlib.util.find_spec("peft") and torch.__version__ >= "2.6":  # its transformers asks for 2.6
    peft = importlib.import_module("peft")  # here, so that its modules are in the memory of every method
else:
    PRESENT.remove("peft")


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
SMALL = gpt2_cell()  # for memory: few activations hide it
GPT2_CELLS = {
    "512 tokens": gpt2_cell(batch=2),
    "2,048 tokens": gpt2_cell(batch=8),
    "8 x 512 tokens": gpt2_cell(batch=2, micro_batches=8),
}
LLAMA_METHODS = ("lora", "flat", "add", "sam")
LLAMA_CELLS = {
    "4 blocks, 1 x 1,024": llama_cell(batch=1, context=1024),
    "4 blocks, 8 x 2,048": llama_cell(batch=8, context=2048),
    "all 32, 4 x 1,024": llama_cell(batch=4, context=1024, depth=32),
    "all 32, 8 of 1 x 1,024": llama_cell(batch=1, context=1024, micro_batches=8, depth=32),
}


class Setup(NamedTuple):
    model: nn.Module
    batches: list[Tensor]
    optimizer: torch.optim.Optimizer


def build(method: str, cell: Cell) -> Setup:
    """Equal for all methods."""
    torch.manual_seed(0)
    with torch.device(cell.device):
        blocks = [cell.block(cell.width) for _ in range(cell.depth)]
        inputs = torch.randn(cell.micro_batches, cell.batch, cell.context, cell.width)  # (micro-batches, B, T, C)
    model = nn.Sequential(*blocks).to(cell.dtype)
    batches = list(inputs.to(cell.dtype))

    if method == "peft":
        config = peft.LoraConfig(r=cell.r, lora_alpha=2 * cell.r, target_modules=train_gpt2.TARGETS)
        model = peft.inject_adapter_in_model(config, model)
    else:
        model = flatlora.inject_lora(model, cell.r, 2 * cell.r)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Setup(model, batches, torch.optim.AdamW(trained, lr=1e-4))


# ---- Steps ---------------------------------------------------------------------------------------------------


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
        out = model(batch)  # (B, T, C)
    return out.float().square().mean()


def step(method: str, setup: Setup, seed: int, loss_fn: flatlora.LossFn = mean_square) -> None:
    model, batches, optimizer = setup
    if method == "lora":
        flatlora.flat_lora_step(model, loss_fn, batches, optimizer, 0.0, seed)
    elif method == "flat":
        flatlora.flat_lora_step(model, loss_fn, batches, optimizer, SIGMA, seed)
    elif method == "add":
        with noise_added(model, seed):  # also during the update, which does not look at W
            flatlora.flat_lora_step(model, loss_fn, batches, optimizer, 0.0, seed)
    elif method == "sam":
        flatlora.sam_step(model, loss_fn, batches, optimizer, RHO)
    elif method == "sam-full":
        train_toy.sam_on_merged_step(model, loss_fn, batches, optimizer, RHO)
    else:
        peft_step(setup, loss_fn)


def peft_step(setup: Setup, loss_fn: flatlora.LossFn) -> None:
    """What `flat_lora_step` does with sigma = 0. It takes no model of PEFT's itself."""
    model, batches, optimizer = setup
    optimizer.zero_grad()
    flatlora._backward(model, loss_fn, batches, scaler=None)
    flatlora._update(optimizer, math.inf, scaler=None)


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
    weight = layer.base.weight.data
    n = layer.in_features
    std = (SIGMA / math.sqrt(n) * norm).repeat(1, n)  # (m, n)
    noise = torch.normal(0.0, std).to(weight.dtype)
    weight += sign * noise


# ---- Time ----------------------------------------------------------------------------------------------------

Actions = Mapping[str, Callable[[int], None]]  # by method; each takes a seed


def times_of_steps(cell: Cell, methods: Sequence[str], seconds: float, title: str) -> Found:
    actions = {method: partial(step, method, build(method, cell)) for method in methods}
    return rounds(actions, seconds, title)


def rounds(actions: Actions, seconds: float, title: str) -> Found:
    """Do all actions in turn for so many seconds, but at least four rounds, of which the first warms up.

    Returns the milliseconds of LoRA (median), and for each action its time as a multiple of LoRA's: lower quartile,
    median and upper quartile. Of Flat-LoRA also each round.
    """
    times = []
    end = time.perf_counter() + seconds
    with tqdm(desc=title, unit="round", leave=False) as progress:
        while len(times) < 4 or time.perf_counter() < end:
            times.append(one_round(actions, seed=len(times)))
            progress.update()

    times = times[1:]
    ratio = {}
    for name in actions:
        ratios = [took[name] / took["lora"] for took in times]
        ratio[name] = statistics.quantiles(ratios, n=4, method="inclusive")
    median = statistics.median(took["lora"] for took in times)
    flat = [round(took["flat"] / took["lora"], 4) for took in times]
    return {"rounds": len(times), "ms": 1000 * median, "ratio": ratio, "flat": flat}


def one_round(actions: Actions, seed: int) -> dict[str, float]:
    """The seconds of each action."""
    names = list(actions)
    first = seed % len(names)
    took = {}
    for name in names[first:] + names[:first]:  # nobody is always first
        start = time.perf_counter()
        actions[name](seed)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took[name] = time.perf_counter() - start
    return took


@torch.no_grad()
def times_of_forward(seconds: float) -> Found:
    """Four layers with noise, without, and between add and subtract; then once more beside a busy process."""
    layers = [nn.Linear(768, 4 * 768) for _ in range(4)]
    model = flatlora.inject_lora(nn.ModuleList(layers), r=16, alpha=32)
    x = torch.randn(512, 768)  # (N, C)

    def forward(method: str, seed: int) -> None:
        noise = nullcontext()
        if method == "flat":
            noise = flatlora.perturbed(model, SIGMA, seed)
        elif method == "add":
            noise = noise_added(model, seed)
        with noise:
            for layer in model:
                layer(x)  # (N, 4C)

    actions = {method: partial(forward, method) for method in ("lora", "flat", "add")}
    alone = rounds(actions, seconds, "forward, alone")
    with busy_process():
        busy = rounds(actions, seconds, "forward, busy")
    return {"alone": alone, "busy": busy}


@contextmanager
def busy_process() -> Iterator[None]:
    started = SPAWN.Event()
    process = SPAWN.Process(target=multiply, args=(started,))
    process.start()
    try:
        started.wait()
        yield
    finally:
        process.kill()
        process.join()


def multiply(started: Any) -> None:
    a = torch.randn(1024, 1024)
    started.set()
    while multiprocessing.parent_process().is_alive():
        a @ a


# ---- Memory and drift ----------------------------------------------------------------------------------------


def memory_of_all() -> Found:
    """To be called while this process is small: a new process counts the peak of the one that it comes from."""
    # With this, glibc gives freed memory back at once in the new ones, so that their peak is that of what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    found = {}
    with SPAWN.Pool(1, maxtasksperchild=1) as pool:
        for method in tqdm(PRESENT, desc="memory", leave=False):
            found[method] = pool.apply(memory_of, (method,))
    return found


def memory_of(method: str) -> dict[str, int]:
    """Bytes: the peak of this process in three steps, what lives between a forward and its backward, and the table of
    normals, which every method's process makes first, so that it is in no difference."""
    table = flatlora._real_table(SMALL.dtype, torch.device(SMALL.device))
    setup = build(method, SMALL)
    for seed in range(3):
        step(method, setup, seed)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    stored = []

    def counting(model: nn.Module, batch: Tensor) -> Tensor:
        saved = []
        with saved_tensors_hooks(partial(kept, saved), lambda tensor: tensor):
            loss = mean_square(model, batch)
        stored.append(bytes_alive(saved))
        return loss

    step(method, setup, seed=3, loss_fn=counting)
    return {"peak": peak, "stored": max(stored), "table": table.nbytes}


def peaks_on_card(cell: Cell) -> dict[str, int]:
    """Bytes: the most that torch has allocated in the third step of each method, the table of normals made before."""
    flatlora._real_table(cell.dtype, torch.device(cell.device, 0))
    found = {}
    for method in LLAMA_METHODS:
        setup = build(method, cell)
        gc.collect()  # the model of the method before
        for seed in range(3):
            torch.cuda.reset_peak_memory_stats()
            step(method, setup, seed)
        found[method] = torch.cuda.max_memory_allocated()
    return found


def kept(saved: list[Tensor], tensor: Tensor) -> Tensor:
    saved.append(tensor)
    return tensor


def bytes_alive(saved: Sequence[Tensor]) -> int:
    """Of all tensors, memory that they share counted once. `saved` are autograd's, which the collector does not see."""
    tensors = list(saved)
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):  # isinstance would ask objects that answer with a warning
            tensors.append(thing)
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]

    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    for buffer in flatlora._memory.by_dtype.values():  # one matrix for all layers, which the peak counts
        sizes.pop(buffer.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def drifts_of(method: str) -> dict[str, float]:
    found = {}
    for name, dtype in DTYPES.items():
        if method != "sam-full" or dtype == torch.float32:  # it refuses half precision
            found[name] = drift(method, dtype)
    return found


def drift(method: str, dtype: torch.dtype) -> float:
    """|W_after - W_before| / |W_before| over all frozen matrices of a small model."""
    cell = Cell(gpt2_block, width=64, context=16, r=4, dtype=dtype)
    setup = build(method, cell)
    frozen = [p for p in setup.model.parameters() if p.dim() == 2 and not p.requires_grad]

    before = joined(frozen)
    for seed in range(DRIFT_STEPS):
        step(method, setup, seed)
    moved = joined(frozen) - before
    return (moved.norm() / before.norm()).item()


def joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])


# ---- All together --------------------------------------------------------------------------------------------


def measure_gpt2(seconds: float) -> Found:
    machine = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    found: Found = {"machine": f"torch {torch.__version__}, {machine}"}
    found["cell"] = {"width": SMALL.width}
    found["steps"] = DRIFT_STEPS
    found["memory"] = {str(SMALL.depth): memory_of_all()}
    found["drift"] = {}
    for method in tqdm(PRESENT, desc="drift", leave=False):
        found["drift"][method] = drifts_of(method)
    found["time"] = {}
    for title, cell in GPT2_CELLS.items():
        found["time"][title] = times_of_steps(cell, PRESENT, seconds, title)
    found["forward"] = times_of_forward(seconds / 2)
    return found


def measure_llama(seconds: float) -> Found:
    found: Found = {"card": f"torch {torch.__version__}, {torch.cuda.get_device_name()}"}
    found["llama"] = {}
    for title, cell in LLAMA_CELLS.items():
        peaks = peaks_on_card(cell)
        found["llama"][title] = {**times_of_steps(cell, LLAMA_METHODS, seconds, title), "peaks": peaks}
    return found


# ---- Tables --------------------------------------------------------------------------------------------------


def report(found: Found) -> str:
    """All tables, from what the JSON file holds."""
    parts = []
    if "time" in found:
        parts.append(found["machine"])
        parts.append("Time of a step as a multiple of LoRA's: median (quartiles)")
        parts.append(time_table(found["time"]))
        parts.append("The same of a forward of four layers, alone and beside a busy process")
        parts.append(time_table(found["forward"]))
        parts.append(memory_caption(found))
        parts.append(memory_table(found))
    if "llama" in found:
        parts.append(found["card"])
        parts.append("Llama-2-7B's shape in bfloat16: time of a step, by blocks and sequences x tokens")
        parts.append(time_table(found["llama"]))
        parts.append("Most memory allocated in a step: LoRA's in GB, the others' above it")
        parts.append(peaks_table(found["llama"]))
    return "\n\n".join(parts)


def time_table(cells: Mapping[str, Found]) -> str:
    columns = [cell["ratio"] for cell in cells.values()]
    milliseconds = [f"{cell['ms']:.0f}" for cell in cells.values()]
    rows = [["", *cells], ["LoRA, ms", *milliseconds]]
    for method in columns[0]:
        if method == "lora":
            continue
        row = [METHODS[method]]
        for ratio in columns:
            low, median, high = ratio[method]
            row.append(f"{median:.2f} ({low:.2f}-{high:.2f})")
        rows.append(row)

    rounds = [str(cell["rounds"]) for cell in cells.values()]
    rows.append(["rounds", *rounds])
    return table(rows)


def peaks_table(cells: Mapping[str, Found]) -> str:
    rows = [["", *cells]]
    for method in LLAMA_METHODS:
        row = [METHODS[method]]
        for cell in cells.values():
            peak = cell["peaks"][method] / 1e9
            above = (cell["peaks"][method] - cell["peaks"]["lora"]) / 1e9
            row.append(f"{peak:.2f}" if method == "lora" else f"{above:+.2f}")
        rows.append(row)
    return table(rows)


def largest_weight(found: Found) -> int:
    """The bytes of a matrix (4 width, width) in float32."""
    return 16 * found["cell"]["width"] ** 2


def memory_caption(found: Found) -> str:
    largest = largest_weight(found) / 2**20
    memory = next(iter(found["memory"].values()))
    normals = memory["flat"]["table"] / 2**20
    return (
        f"Memory above LoRA's, at the peak and stored from forward to backward, with the\n"
        f"largest adapted weight, {largest:.1f} MiB, as 1; not in it is the table of normals, {normals:.0f} MiB.\n"
        f"Drift of W after {found['steps']} steps."
    )


def memory_table(found: Found) -> str:
    depth, memory = next(iter(found["memory"].items()))
    drifts = [f"drift, {name}" for name in DTYPES]
    rows = [["", f"peak, {depth} bl.", f"stored, {depth} bl.", *drifts]]
    for method in found["drift"]:
        row = [METHODS[method]]
        for key in ("peak", "stored"):
            above = memory[method][key] - memory["lora"][key]
            row.append(f"{above / largest_weight(found):.2f}")
        for name in DTYPES:
            row.append(drift_text(found["drift"][method].get(name)))
        rows.append(row)
    return table(rows)


def drift_text(drift: float | None) -> str:
    if drift is None:
        return "-"
    return f"{drift:.0e}" if drift else "0"


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * width for width in widths]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        first = row[0].ljust(widths[0])
        others = map(str.rjust, row[1:], widths[1:])
        lines.append("  ".join([first, *others]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="GPT-2's block, or Llama's (cpu)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of rounds per column (20)")
    parser.add_argument("--out", type=Path, nargs="?", const=FILE, help="JSON file to write into (cost.json here)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is there")
    found: Found = {}
    if args.out and args.out.exists():
        found = json.loads(args.out.read_text("utf-8"))  # of which the part of the other device stays

    if args.device == "cpu":
        found |= measure_gpt2(args.seconds)
    else:
        found |= measure_llama(args.seconds)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1), "utf-8")
    print(report(found))


if __name__ == "__main__":
    main()
