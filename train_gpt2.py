"""Fine-tune a GPT-2 with LoRA, Flat-LoRA and SAM, side by side.

    python train_gpt2.py                            # no network, no file needed
    python train_gpt2.py --text my.txt              # your own text
    python train_gpt2.py --init gpt2 --text my.txt  # OpenAI's GPT-2
    torchrun --nproc-per-node 2 -- train_gpt2.py    # several processes

The bare command pre-trains a small GPT-2 (https://github.com/karpathy/nanoGPT)
on the text of Python's help(), once, and fine-tunes it on the package email by
each method under three seeds. A stopped run goes on by the same command, and a
finished one is kept: more seeds, one more method or another --prompt only add.

For your own scripts: save_peft, load_peft and perturbed_peft.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends without a traceback
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)

import copy
import gc
import hashlib
import importlib
import io
import json
import math
import os
import re
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean, stdev
from textwrap import fill, indent
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

import flatlora

METHODS = ["lora", "flat", "sam"]
TARGETS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
RANK = int(os.environ.get("RANK", 0))  # set by torchrun, like the next
WORLD = int(os.environ.get("WORLD_SIZE", 1))
CHECKPOINT_SECONDS = 30.0

Batch = tuple[Tensor, Tensor]  # inputs and targets, (B, T) each
Tensors = Mapping[str, Tensor]


# ---- Model ---------------------------------------------------------------------------------------------------
@dataclass
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int  # the longest context, in tokens
    vocab_size: int = 256


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        n = config.n_embd
        self.n_head = config.n_head
        self.ln_1 = nn.LayerNorm(n)
        self.attn = nn.ModuleDict()
        self.attn["c_attn"] = nn.Linear(n, 3 * n)
        self.attn["c_proj"] = nn.Linear(n, n)
        self.ln_2 = nn.LayerNorm(n)
        self.mlp = nn.ModuleDict()
        self.mlp["c_fc"] = nn.Linear(n, 4 * n)
        self.mlp["c_proj"] = nn.Linear(4 * n, n)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x))  # (B, T, 3C)
        heads = qkv.view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)
        x = x + self.attn["c_proj"](y)  # (B, T, C)

        y = self.mlp["c_fc"](self.ln_2(x))  # (B, T, 4C)
        y = F.gelu(y, approximate="tanh")  # OpenAI's form of GELU, not erf
        return x + self.mlp["c_proj"](y)  # (B, T, C)


class GPT(nn.Module):
    """GPT-2 with Hugging Face's names, so that adapters fit both."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        n = config.n_embd
        self.transformer = nn.ModuleDict()
        self.transformer["wte"] = nn.Embedding(config.vocab_size, n)
        self.transformer["wpe"] = nn.Embedding(config.block_size, n)
        self.transformer["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer["ln_f"] = nn.LayerNorm(n)
        self.lm_head = nn.Linear(n, config.vocab_size, bias=False)
        self.tie()
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "c_proj" in name:  # each block adds to the residual stream twice, hence smaller
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def tie(self) -> None:
        self.lm_head.weight = self.transformer["wte"].weight

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T, vocab_size)."""
        places = torch.arange(tokens.shape[1], device=tokens.device)  # (T,)
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](places)  # (B, T, C)
        for block in self.transformer["h"]:
            x = block(x)  # (B, T, C)
        return self.lm_head(self.transformer["ln_f"](x))  # (B, T, vocab_size)


@torch.no_grad()
def generate(model: GPT, prompt: Sequence[int], length: int) -> list[int]:
    """The prompt and `length` tokens more, drawn with a generator of their own."""
    generator = torch.Generator().manual_seed(0)
    tokens = list(prompt)
    for _ in range(length):
        context = torch.tensor([tokens[-model.config.block_size :]])  # (1, T)
        logits = model(context.to(model.device))[0, -1]  # (vocab_size,)
        chances = (logits.float().cpu() / 0.7).softmax(0)  # 0.7, a temperature below 1, plays safe
        choice = torch.multinomial(chances, 1, generator=generator)
        tokens.append(int(choice))
    return tokens


# ---- Files and libraries -------------------------------------------------------------------------------------
def extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # under a torch that is too old, transformers raises a NameError
        reason = f"{type(error).__name__}: {error}"
        raise ImportError(f'{name} is needed ({reason}): pip install -e ".[gpt2]", with torch 2.6 or later') from None


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Whatever is wrong with a file, truncated, of another kind or made to harm: a ValueError in one line."""
    try:
        yield
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if "weights_only" in words:  # torch's advice to load it unsafely
            words = "it is damaged, or holds more than tensors"
        raise ValueError(f"{path} cannot be used: {words}") from None


def load(path: Path) -> Any:
    """What `save` wrote. No code of the file is run."""
    with reading(path):
        return torch.load(path, map_location="cpu", weights_only=True)


def save(path: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)  # not to the file, where a full disk would be a RuntimeError
    write(path, buffer.getvalue())


def write(path: Path, content: bytes) -> None:
    """By the first process. A kill or a full disk at any moment leaves the earlier file or the new one."""
    if RANK > 0:
        return
    temporary = path.with_name(f".writing-{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- OpenAI's GPT-2, through transformers --------------------------------------------------------------------
def load_gpt2(init: str) -> tuple[GPT, Any]:
    """The weights in our `GPT`, and the tokenizer. ValueError: the model is not GPT-2, or lacks a weight."""
    transformers = extra("transformers")
    with reading(init):
        options = {"dtype": torch.float32, "output_loading_info": True}
        theirs, info = transformers.GPT2LMHeadModel.from_pretrained(init, **options)
        if any(info.values()):
            raise ValueError(f"its weights are not those of GPT-2: {info}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(init, model_max_length=10**9)

        c = theirs.config
        with torch.device("meta"):
            model = GPT(GPTConfig(c.n_layer, c.n_head, c.n_embd, c.n_positions, c.vocab_size))
        state = theirs.state_dict()
        for name, weight in state.items():
            if name.endswith(tuple(f"{target}.weight" for target in TARGETS)):
                state[name] = weight.t().contiguous()  # Hugging Face's Conv1D holds it transposed

        model.load_state_dict(state, assign=True)
        model.tie()
        check_same_function(model, theirs)
    return model.eval(), tokenizer


@torch.no_grad()
def check_same_function(ours: GPT, theirs: nn.Module) -> None:
    """ValueError: settings by which Hugging Face's model computes something else than `GPT`."""
    tokens = torch.arange(min(16, ours.config.block_size))[None]  # (1, T)
    expected = theirs(tokens).logits  # (1, T, vocab_size)
    gap = (ours(tokens) - expected).abs().max()
    largest = expected.abs().max()
    if not gap < 1e-4 * largest:
        raise ValueError(f"its settings are not those of GPT-2: logits of {largest:.3g} are off by {gap:.1e}")


def encode(tokenizer: Any, text: bytes) -> Tensor:
    """Token ids (N,), by a tokenizer of transformers. Without one, a token is a byte."""
    if tokenizer:
        whole = text.decode("utf-8", "ignore")  # without half a character at a cut
        ids = tokenizer.encode(whole, add_special_tokens=False)
    else:
        ids = list(text)
    return torch.tensor(ids, dtype=torch.int32)


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    if tokenizer:
        return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    return bytes(tokens).decode(errors="replace")


# ---- Data ----------------------------------------------------------------------------------------------------
def package_sources(name: str, size: int = 1000) -> list[bytes]:
    """Source code of a standard-library package.

    Of each file `size` bytes at most, since else one module of email would be a third of the text, and not the first
    2,000, which are licence and imports.
    """
    folder = Path(importlib.import_module(name).__path__[0])
    return [path.read_bytes()[2000 : 2000 + size] for path in sorted(folder.glob("*.py"))]


def read_files(paths: Sequence[Path]) -> list[bytes]:
    """Texts in UTF-8. ValueError: another encoding."""
    files = []
    for path in paths:
        with reading(path):
            content = path.read_bytes()
            content.decode()  # raises, and says where
            files.append(content)
    return files


def split(files: Sequence[bytes]) -> dict[str, bytes]:
    """Of each file, so that every split covers all, three fifths to train, one for validation, one for the test."""
    parts: dict[str, bytes] = {"train": b"", "val": b"", "test": b""}
    for content in files:
        cut = 3 * len(content) // 5
        last = 4 * len(content) // 5
        parts["train"] += content[:cut]
        parts["val"] += content[cut:last]
        parts["test"] += content[last:]
    return parts


def load_tokens(folder: Path) -> dict[str, Tensor]:
    """nanoGPT's files of GPT-2's tokens, which are looked through, but not loaded. The halves of val: val and test."""
    if Path(folder, "meta.pkl").exists():
        raise ValueError(f"{folder} has a meta.pkl, so its tokens are characters: give their text by --text")
    data = {}
    for name in ("train", "val"):
        path = folder / f"{name}.bin"
        with reading(path):
            ids = np.memmap(path, np.uint16, "c")  # c: nothing is written to the file
            if ids.max() < 256:
                raise ValueError("its tokens look like characters, not like GPT-2's")
            if ids[1 : 10**6 : 2].max() < 2:
                raise ValueError("every second number is 0 or 1, as in uint32: its tokens must be uint16")
            data[name] = torch.from_numpy(ids)
    data["val"], data["test"] = data["val"].tensor_split(2)
    return data


def load_data(args: Namespace, config: GPTConfig, tokenizer: Any) -> dict[str, Tensor]:
    """Token ids (N,) of the text to train on, "train", "val" and "test", and of another one, "ood"."""
    if args.data:
        data = load_tokens(args.data)
    else:
        files = read_files(args.text) if args.text else package_sources("email")
        data = {name: encode(tokenizer, part) for name, part in split(files).items()}
    others = read_files(args.ood) if args.ood else package_sources("asyncio")
    data["ood"] = encode(tokenizer, b"".join(others))

    if args.block_size > config.block_size:
        raise ValueError(f"--block-size must be at most {config.block_size} for this model, got {args.block_size}")
    for name, ids in data.items():
        if len(ids) <= args.block_size:
            raise ValueError(f"the {name} text has {len(ids)} tokens, and --block-size {args.block_size} asks for more")
        largest = ids.numpy().max()
        if largest >= config.vocab_size:
            raise ValueError(f"the {name} text has the token {largest}, the model only {config.vocab_size} of them")
    return data


def windows(data: Tensor, starts: Any, block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and next-token targets from the given places: (B, T), (B, T). By numpy: torch cannot index uint16."""
    at = np.asarray(starts)[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    tokens = torch.from_numpy(data.numpy()[at].astype(np.int64)).to(device)  # (B, T + 1)
    return tokens[:, :-1], tokens[:, 1:]


# ---- Training ------------------------------------------------------------------------------------------------
def option(default: Any, words: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": f"{words} (%(default)s)", **more})


@dataclass
class Recipe:
    """What shapes a run, beside method, model, data and seed: the options of that group in -h."""

    steps: int = option(180, "optimizer steps")
    lr: float = option(1.5e-3, "peak learning rate")
    batch_size: int = option(8, "windows per micro-batch")
    grad_accum: int = option(1, "micro-batches per step")
    block_size: int = option(64, "tokens per window")
    dtype: str = option("float32", "bfloat16 is autocast: parameters stay float32", choices=["float32", "bfloat16"])
    r: int = option(16, "rank of the adapters")
    alpha: float = option(32.0, "their scaling is alpha / r")
    lora_dropout: float = option(0.0, "dropout on the input of the adapters")
    sigma: float = option(0.2, "flat: noise at the end; 0.05 to 0.1 on a real model")
    rho: float = option(0.2, "sam: radius")
    eval_windows: int = option(200, "windows of each text in an evaluation")


def loss_fn(model: nn.Module, batch: Batch, dtype: str = "float32") -> Tensor:
    """Mean cross-entropy in nats per token."""
    tokens, targets = batch
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(tokens)  # (B, T, vocab_size)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the steps, at most 100, then a cosine down to a tenth of the peak."""
    warmup = min(100, steps // 10)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


def plain_step(model: nn.Module, loss_of: flatlora.LossFn, batches: list, optimizer: Optimizer) -> float:
    """One step of a model that trains whole. Returns the loss."""
    optimizer.zero_grad()
    total = 0.0
    for batch in batches:
        loss = loss_of(model, batch) / len(batches)
        loss.backward()
        total += loss.item()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not math.isfinite(total + norm):
        raise FloatingPointError(f"the loss or its gradient is not finite: {total}")
    optimizer.step()
    return total


def model_for(base: GPT, method: str, recipe: Recipe) -> GPT:
    """For "full" the base itself. Else a copy with adapters around the base's own weights, which are never written."""
    if method == "full":
        return base
    shared = {id(p): p for p in base.parameters()}  # by id, what deepcopy does not copy
    model = copy.deepcopy(base, shared)
    return flatlora.inject_lora(model, recipe.r, recipe.alpha, recipe.lora_dropout, TARGETS)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def restore(model: nn.Module, state: Tensors) -> None:
    """Copy in what `trained_state` gave."""
    if state.keys() != trained_state(model).keys():
        raise ValueError("it is of another model")
    model.load_state_dict(state, strict=False)  # strict would ask for the frozen weights


def train(base: GPT, method: str, data: Tensor, recipe: Recipe, seed: int, file: Path) -> tuple[GPT, dict[str, Any]]:
    """A trained copy of the base in evaluation mode, and its log: the loss of each step, and seconds.

    Goes on from `file`, which is kept up to date. All that a step draws follows from (seed, step, rank), so the
    result is that of a run which never stopped.
    """
    torch.manual_seed(seed)  # the same adapters for every method
    model = model_for(base, method, recipe)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(parameters, recipe.lr, (0.9, 0.95), weight_decay=0.0)

    log = resume(file, model, optimizer)
    first = len(log["loss"])
    if 0 < first < recipe.steps:
        say(f"{file.stem} goes on from step {first}")

    net = model.train()
    if WORLD > 1:
        net = nn.parallel.DistributedDataParallel(model)
    saved_at = time.monotonic()
    steps = range(first, recipe.steps)
    bar = tqdm(steps, desc=file.stem, initial=first, total=recipe.steps, leave=False, disable=RANK > 0)
    for step in bar:
        draw = np.random.default_rng([seed, step, RANK])  # which no method can disturb
        starts = draw.integers(len(data) - recipe.block_size, size=(recipe.grad_accum, recipe.batch_size))
        torch.manual_seed(int(draw.integers(2**63)))  # for dropout
        batches = [windows(data, places, recipe.block_size, base.device) for places in starts]
        optimizer.param_groups[0]["lr"] = learning_rate(step, recipe.steps, recipe.lr)

        begin = time.perf_counter()
        loss = take_step(net, method, batches, optimizer, recipe, seed, step)
        log["seconds"] += time.perf_counter() - begin
        log["loss"].append(loss)
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

        due = step + 1 == recipe.steps or time.monotonic() > saved_at + CHECKPOINT_SECONDS
        if due:
            save(file, {"trained": trained_state(model), "log": log, "optimizer": optimizer.state_dict()})
            saved_at = time.monotonic()
    return model.eval(), log


def resume(file: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Copy in what the file of the run holds, if it is there. Returns the log."""
    if not file.exists():
        return {"loss": [], "seconds": 0.0}
    content = load(file)
    with reading(file):
        restore(model, content["trained"])
        if "optimizer" in content:  # else the run is finished
            optimizer.load_state_dict(content["optimizer"])
        log = content["log"]
        if not log.keys() >= {"loss", "seconds"}:
            raise ValueError("it has no log of a run")
    return log


def take_step(
    net: nn.Module, method: str, batches: list, optimizer: Optimizer, recipe: Recipe, seed: int, step: int
) -> float:
    """One step, with gradients clipped at the norm 1. Returns the loss."""
    loss_of = partial(loss_fn, dtype=recipe.dtype)
    if method == "full":
        return plain_step(net, loss_of, batches, optimizer)
    if method == "sam":
        return flatlora.sam_step(net, loss_of, batches, optimizer, recipe.rho, 1.0)
    sigma = 0.0  # the plain step of LoRA
    if method == "flat":
        sigma = flatlora.sigma_at(step, recipe.steps, recipe.sigma)
    return flatlora.flat_lora_step(net, loss_of, batches, optimizer, sigma, (seed, step, RANK), 1.0)


def say(line: str) -> None:
    """A line above the progress bar."""
    if RANK == 0:
        tqdm.write(line, file=sys.stderr)


def mark_of(base: GPT, data: Tensors, recipe: Recipe) -> str:
    """A digest of all that shapes a run beside method and seed. In the names of files, it keeps unlike runs apart.

    Of a tensor 2^16 numbers count.
    """
    digest = hashlib.sha256(f"{base.config} {recipe} {WORLD}".encode())
    for tensor in [*data.values(), *base.parameters()]:
        stride = 1 + tensor.numel() // 2**16
        numbers = tensor.detach().flatten()[::stride].cpu().numpy()
        digest.update(f"{tensor.shape}".encode() + numbers.tobytes())
    return digest.hexdigest()[:8]


# ---- Evaluation ----------------------------------------------------------------------------------------------
def spread(model: GPT, data: Tensor, recipe: Recipe, limit: int) -> list[Batch]:
    """At most `limit` windows, evenly spread, without overlap, in equal batches."""
    starts = np.arange(0, len(data) - recipe.block_size, recipe.block_size)  # (N,)
    starts = starts[:: math.ceil(len(starts) / limit)]
    size = min(recipe.batch_size, len(starts))
    whole = len(starts) // size * size
    parts = starts[:whole].reshape(-1, size)
    return [windows(data, part, recipe.block_size, model.device) for part in parts]


@torch.no_grad()
def losses(model: GPT, data: Tensors, recipe: Recipe) -> dict[str, float]:
    found = {}
    for name in ("val", "test", "ood"):
        batches = spread(model, data[name], recipe, recipe.eval_windows)
        values = [loss_fn(model, batch, recipe.dtype).item() for batch in batches]
        found[f"{name}_loss"] = fmean(values)
    return found


def sharpness(model: GPT, data: Tensors, recipe: Recipe) -> float:
    """The rise of the training loss under noise of sigma 0.1 on the merged weights."""
    loss_of = partial(loss_fn, dtype=recipe.dtype)
    batches = spread(model, data["train"], recipe, min(recipe.eval_windows, 64))
    return flatlora.sharpness(model, loss_of, batches, sigma=0.1, samples=4, seed=0)


# 97.5 % points of Student's t for 1 to 15 degrees of freedom. From 17 seeds on the last is used, up to 9 % too large.
T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval."""
    n = len(values)
    t = T975[min(n - 2, 14)]
    return fmean(values), t * stdev(values) / math.sqrt(n)


# ---- What is printed -----------------------------------------------------------------------------------------
HEADINGS = {"val_loss": "validation", "test_loss": "test", "ood_loss": "other text", "sharpness": "sharpness"}
Runs = Sequence[Mapping[str, Any]]


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the heading. 76 columns wide; a long cell takes more."""
    lines = []
    for first, *cells in rows:
        lines.append(f"{first:4}" + "".join(f"  {cell:>16}" for cell in cells))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def difference(key: str, runs: Runs, others: Runs) -> tuple[float, float]:
    """Mean and half the width of the interval, paired by seed."""
    pairs = zip(runs, others, strict=True)
    return interval([run[key] - other[key] for run, other in pairs])


def plus_minus(mean: float, half: float) -> str:
    """With four digits, or as many as the width needs not to be rounded to zero."""
    if mean == half == 0:
        return "equal"
    digits = 4
    while digits < 9 and round(half or mean, digits) == 0:
        digits += 1
    return f"{mean:+.{digits}f} +-{half:.{digits}f}"


def verdict(mean: float, half: float) -> str:
    """Undecided: an edge of the interval is so near zero, within a fifth of the mean, that more seeds may cross it."""
    if mean == half == 0:
        return "equal"
    if abs(abs(mean) - half) <= abs(mean) / 5:
        word = "undecided"
    elif abs(mean) < half:
        word = "not shown to differ"
    else:
        word = "lower" if mean < 0 else "higher"
    return f"{word} ({plus_minus(mean, half)})"


def row(method: str, runs: Runs, lora: Runs | None) -> list[str]:
    """The means of the runs, or their differences to LoRA's."""
    cells = [method]
    for key in HEADINGS:
        if key not in runs[0]:
            cell = "-"  # the sharpness of the base
        elif lora:
            cell = plus_minus(*difference(key, runs, lora))
        else:
            cell = f"{fmean(run[key] for run in runs):.4f}"
        cells.append(cell)
    return cells


def report(runs: Runs, task: str) -> str:
    """A table that explains itself, in 80 columns, and what it says of the test loss."""
    by = defaultdict(list)
    for run in runs:
        by[run["method"]].append(run)
    n = len(by[runs[-1]["method"]])
    note = f"Means over the seeds. {task} Nats per token; n = {n}: seeds 0 to {n - 1}, methods untuned. "
    note += "Sharpness: how much noise of sigma 0.1 on the merged weights raises the training loss."
    if "sam" in by:
        note += " SAM takes two passes per step, the others one."

    rows = [["", *HEADINGS.values()]]
    words = []
    for method, own in by.items():
        lora = None
        if n > 1 and method not in ("base", "lora"):
            lora = by.get("lora")
        rows.append(row(method, own, lora))
        if lora:
            gap = difference("test_loss", own, lora)
            words.append(f"{method} {verdict(*gap)}")

    if words:
        note += " With +-: differences to lora's, paired by seed, and their 95 % intervals."
        last = f"Test loss against lora's: {'; '.join(words)}."
    else:
        last = "No intervals: they need lora, another method and two --seeds. Finished runs are reused."
    return f"{fill(note, 79)}\n{table(rows)}\n\n{fill(last, 79)}"


def curve(losses: Sequence[float]) -> str:
    """The loss as it falls, a character per twentieth of the steps."""
    shades = "▁▂▃▄▅▆▇█" if "utf" in (sys.stderr.encoding or "").lower() else "01234567"
    parts = np.array_split(losses, min(20, len(losses)))
    means = np.array([part.mean() for part in parts])
    levels = np.interp(means, (means.min(), means.max()), (0, 7))
    return "".join(shades[round(level)] for level in levels)


# ---- PEFT's files and models ---------------------------------------------------------------------------------
PREFIX = "base_model.model."  # before the names of PEFT's modules
FREE = """task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r lora_alpha lora_dropout
target_modules exclude_modules layers_to_transform layers_pattern rank_pattern alpha_pattern use_rslora modules_to_save
fan_in_fan_out"""  # settings of an adapter that may have any value


def save_peft(
    model: nn.Module, folder: str | Path, base_model: str, fan_in_fan_out: bool = False, task_type: str | None = None
) -> None:
    """Write all that trains as an adapter that PEFT loads.

    `base_model` names the model on which PEFT is to load it, `fan_in_fan_out` is for one that holds the layers as
    Conv1D, as GPT-2 does, `task_type` such as "CAUSAL_LM" for AutoPeftModel. ValueError, before a file is written:
    something that trains would be lost, or PEFT would not find a layer again.
    """
    held = set(flatlora.lora_parameters(model))
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p not in held]
    if lost:
        raise ValueError(f"{lost} train beside adapters and modules_to_save, and would be lost")

    layers = flatlora.lora_layers(model)
    state = flatlora.lora_state_dict(model)
    for name in layers:
        del state[f"{name}.alpha"]  # which goes into the configuration
    whole = {name.rpartition(".")[0] for name in state} - layers.keys()
    tensors = {}
    for name, tensor in state.items():
        key = re.sub(r"(lora_[AB])$", r"\1.weight", name)
        tensors[PREFIX + key] = tensor.contiguous()

    first = next(iter(layers.values()))
    config = extra("peft").LoraConfig(
        base_model_name_or_path=str(base_model),
        task_type=task_type,
        inference_mode=True,
        r=first.r,
        lora_alpha=first.alpha,
        target_modules=either(layers),  # of a list, PEFT would take "1" for the end of "3.1" too
        modules_to_save=sorted(whole) or None,
        fan_in_fan_out=fan_in_fan_out,
    )
    for name, layer in layers.items():
        pattern = f"^{re.escape(name)}"  # without ^ "0" would fit "1.0" too
        if layer.r != first.r:
            config.rank_pattern[pattern] = layer.r
        if layer.alpha != first.alpha:
            config.alpha_pattern[pattern] = layer.alpha
    with reading("the adapter, tried in PEFT,"):
        loaded_by_peft(model, config, tensors)

    config.save_pretrained(folder)
    extra("safetensors.torch").save_file(tensors, Path(folder, "adapter_model.safetensors"), {"format": "pt"})


def loaded_by_peft(model: nn.Module, config: Any, tensors: Tensors) -> dict[str, Any]:
    """The layers of a copy, by name, into which PEFT has loaded the adapter.

    ValueError: PEFT, which finds layers by rules of its own, has no place for a tensor, or does more than plain LoRA.
    """
    peft = extra("peft")
    config = copy.deepcopy(config)
    config.fan_in_fan_out = False  # the copy has nn.Linear

    theirs = peft.PeftModel(skeleton(model), config, low_cpu_mem_usage=True)
    result = peft.set_peft_model_state_dict(theirs, dict(tensors), low_cpu_mem_usage=True)
    if result.unexpected_keys:
        raise ValueError(f"PEFT has no place for {result.unexpected_keys[:3]}")
    return plain_peft_layers(theirs)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy without numbers (on the meta device), without adapters and without a wrapper around the model."""
    memo: dict[int, Any] = {}  # by id, what deepcopy puts in the place of an object instead of copying it
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.to("meta"), requires_grad=False)
    for module in model.modules():
        if isinstance(module, flatlora.LoRALinear):
            memo[id(module)] = copy.deepcopy(module.base, memo)

    inner = next(iter(flatlora.module_names(model)))
    return copy.deepcopy(inner, memo)


def load_peft(model: nn.Module, folder: str | Path) -> nn.Module:
    """`inject_lora` from an adapter of PEFT's: its layers, rank, scaling and weights. Returns the model.

    ValueError, before anything is changed: damaged files, more than plain LoRA, or the model has adapters.
    """
    peft = extra("peft")
    if any(isinstance(module, flatlora.LoRALinear) for module in model.modules()):
        raise ValueError("the model has adapters already: load_peft takes a plain one")
    with reading(folder):
        check_plain_lora(json.loads(Path(folder, "adapter_config.json").read_text("utf-8")))
        config = peft.LoraConfig.from_pretrained(str(folder))
        tensors = peft.utils.load_peft_weights(str(folder), device="cpu")
        layers = loaded_by_peft(model, config, tensors)

        state = {}
        for key, tensor in tensors.items():
            name = re.sub(r"(lora_[AB])\.weight$", r"\1", key.removeprefix(PREFIX))
            state[name] = tensor
        whole = {name.rpartition(".")[0] for name in state} - layers.keys()

        rehearsal = skeleton(model)
        inject_like(layers, whole, rehearsal)
        trains = {name for name, p in rehearsal.named_parameters(remove_duplicate=False) if p.requires_grad}
        unlike = trains ^ (state.keys() - dict(rehearsal.named_buffers()))
        if unlike:
            raise ValueError(f"tensors are missing or left over, as of a tied weight: {unlike}")
    inject_like(layers, whole, model)
    flatlora.load_lora_state_dict(model, state)
    return model


def inject_like(layers: Mapping[str, Any], whole: set[str], model: nn.Module) -> None:
    """One `inject_lora` for each rank and scaling of PEFT's layers."""
    groups = defaultdict(list)
    for name, layer in layers.items():
        groups[layer.r["default"], layer.scaling["default"]].append(name)
    for (r, scaling), names in groups.items():
        flatlora.inject_lora(model, r, r * scaling, 0.0, either(names), either(whole) or ())


def either(names: Iterable[str]) -> str:
    """A regular expression for these names."""
    return "|".join(map(re.escape, names))


def check_plain_lora(given: Mapping[str, Any]) -> None:
    """ValueError: a setting by which PEFT computes something else, even one that this version does not know."""
    plain = extra("peft").LoraConfig().to_dict()
    free = FREE.split()
    for key, value in given.items():
        leaves_the_base = key == "init_lora_weights" and value in ("gaussian", "orthogonal")
        if value and key not in free and value != plain.get(key) and not leaves_the_base:
            raise ValueError(f"{key}={value!r} is more than plain LoRA, or may have changed the base")


@contextmanager
def perturbed_peft(model: nn.Module, sigma: float, seed: Any) -> Iterator[None]:
    """`flatlora.perturbed` for a model of PEFT's: inside, its LoRA layers compute with W' + eps.

    eps is what a `LoRALinear` of that name gets, without PEFT's "base_model.model.". All the rest stays PEFT's own.
    Layers are nn.Linear or GPT-2's Conv1D. ValueError, before anything is changed: more than plain LoRA.
    """
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must be a finite number >= 0, got {sigma!r}")
    layers = plain_peft_layers(model)

    try:
        if sigma > 0:
            for name, layer in layers.items():
                linear = as_linear(layer.base_layer)
                noise = flatlora.draw_noise(merged_weight(layer, linear), sigma, seed, name)
                layer.base_layer.forward = partial(flatlora.noisy_linear, linear=linear, noise=noise)
        yield
    finally:
        for layer in layers.values():
            vars(layer.base_layer).pop("forward", None)
        torch.clear_autocast_cache()  # as in flatlora.perturbed


def plain_peft_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's LoRA layers by name. ValueError: one does more than W x + b + s B A x, or there are none."""
    lora = extra("peft").tuners.lora
    layers = {}
    for layer, name in flatlora.module_names(model).items():
        if not isinstance(layer, lora.LoraLayer):
            continue

        base = layer.base_layer
        active = layer.active_adapters
        is_linear = type(base) is nn.Linear or type(base).__name__ == "Conv1D"
        if type(layer) is not lora.Linear or layer.lora_variant or not is_linear:
            raise ValueError(f"{name} is more than plain LoRA on an nn.Linear or Conv1D: {layer}")
        if layer.merged or layer.disable_adapters or len(active) != 1 or active[0] not in layer.lora_A:
            raise ValueError(f"{name} must have one active adapter, not merged and not disabled, got {active}")
        if "forward" in vars(base):
            raise ValueError(f"{name} has its own forward: perturbations do not nest, nor fit accelerate's offloading")
        flatlora.check_numbers(f"{name}.weight", base.weight)
        layers[name.removeprefix(PREFIX)] = layer
    if not layers:
        raise ValueError("the model has no LoRA layer of PEFT's: call get_peft_model first")
    return layers


def as_linear(base: Any) -> nn.Linear:
    """The layer itself, or an nn.Linear with the weight of a Conv1D, which holds it transposed."""
    if isinstance(base, nn.Linear):
        return base
    linear = nn.Linear(*base.weight.shape, device="meta")
    linear.weight = nn.Parameter(base.weight.t(), base.weight.requires_grad)  # (m, n)
    linear.bias = base.bias
    return linear


@torch.no_grad()
def merged_weight(layer: Any, linear: nn.Linear) -> Tensor:
    """W' (m, n), as `LoRALinear.merged_weight` computes it."""
    (adapter,) = layer.active_adapters
    weight = linear.weight.clone()
    A = layer.lora_A[adapter].weight.to(weight.dtype)
    B = layer.lora_B[adapter].weight.to(weight.dtype)
    return weight.addmm_(B, A, alpha=layer.scaling[adapter])


# ---- Command line --------------------------------------------------------------------------------------------
def compare(args: Namespace) -> None:
    """Fine-tune with each method and seed, measure, write the results, then print."""
    tokenizer = None
    if args.init:
        base, tokenizer = load_gpt2(args.init)
    else:
        base = small_gpt(args)
    base.to(args.device)
    data = load_data(args, base.config, tokenizer)  # before minutes of pre-training, since it may be wrong
    if not args.init:
        base = pretrain(base, args)

    recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
    mark = mark_of(base, data, recipe)
    models = {"base": base}  # of the first seed, to write a text
    runs = [{"method": "base", "seed": 0, **losses(base, data, recipe)}]
    for seed in range(args.seeds):
        for method in args.methods:
            file = args.out / f"{method}-{seed}-{mark}.pt"
            model, log = run_once(base, method, data, recipe, seed, file)
            say(summary(log))
            if args.peft and RANK == 0:
                save_peft(model, file.with_suffix(""), args.init, fan_in_fan_out=True, task_type="CAUSAL_LM")
            runs.append(log["result"])
            models.setdefault(method, model)

    if RANK > 0:
        return

    sources = args.text or [args.data or "Python's package email"]
    text = report(runs, f"GPT-2 fine-tuned on {', '.join(map(str, sources))}.")
    results = args.out / f"results-{'-'.join(args.methods)}-{args.seeds}-{mark}.json"
    content = {"torch": torch.__version__, "options": vars(args), "runs": runs, "report": text}
    write(results, json.dumps(content, indent=1, default=str).encode())
    print(f"{text}\n\nNumbers: {results}\nAdapters: the .pt files beside it")

    prompt = encode(tokenizer, (args.prompt or "\n").encode()).tolist()
    shown = "flat" if "flat" in models else args.methods[-1]
    for name in ("base", shown):
        words = decode(tokenizer, generate(models[name], prompt, 200))
        print(f"\n{name} writes:\n\n{indent(words, '    ')}")


def small_gpt(args: Namespace) -> GPT:
    torch.manual_seed(0)
    heads = args.n_embd // math.gcd(args.n_embd, 32)
    return GPT(GPTConfig(args.n_layer, heads, args.n_embd, args.block_size))


def pretrain(base: GPT, args: Namespace) -> GPT:
    """The small GPT-2 after training on the text of Python's help()."""
    text = "\n\n".join(topics[key] for key in sorted(topics))
    data = encode(None, text.encode())
    recipe = Recipe(args.pretrain_steps, 3e-3, args.batch_size, block_size=args.block_size, dtype=args.dtype)
    file = args.out / f"base-0-{mark_of(base, {'train': data}, recipe)}.pt"
    base, _ = train(base, "full", data, recipe, 0, file)
    return base


def run_once(
    base: GPT, method: str, data: Tensors, recipe: Recipe, seed: int, file: Path
) -> tuple[GPT, dict[str, Any]]:
    """The trained model and its log with the result, which are read from the file of a finished run."""
    model, log = train(base, method, data["train"], recipe, seed, file)
    if "result" not in log:
        result = {"method": method, "seed": seed, **losses(model, data, recipe)}
        result["sharpness"] = sharpness(model, data, recipe)
        log["result"] = result
        save(file, {"trained": trained_state(model), "log": log})
    return model, log


def summary(log: Mapping[str, Any]) -> str:
    result = log["result"]
    name = f"{result['method']}, seed {result['seed']}:"
    fall = f"loss {curve(log['loss'])} {log['loss'][-1]:.2f}"
    return f"{name:17}{fall}, test loss {result['test_loss']:.3f}, {log['seconds']:.0f} s"


def parsed() -> Namespace:
    parser = ArgumentParser(usage="%(prog)s [options]", description=__doc__, allow_abbrev=False)
    parser.formatter_class = RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help="of %(choices)s")
    add("--seeds", type=int, default=3, help="runs of each method, from two on with intervals (%(default)s)")
    add("--out", type=Path, default=Path("out"), help="folder for base, runs and results (%(default)s)")
    add("--prompt", default="def ", help="what the texts continue (%(default)r)")
    add("--text", type=Path, nargs="+", metavar="FILE", help="fine-tune on these (sources of the package email)")
    add("--ood", type=Path, nargs="+", metavar="FILE", help="the other text (sources of asyncio)")

    add("--init", metavar="MODEL", help="gpt2 to gpt2-xl or a folder; changes the defaults, see --init MODEL -h")
    add("--data", type=Path, metavar="DIR", help="with --init: nanoGPT's train.bin and val.bin instead of --text")
    add("--peft", action="store_true", help="with --init: also write each adapter for PEFT, in a folder beside it")
    add("--n-layer", type=int, default=4, help="without --init: blocks of the GPT-2 pre-trained here (%(default)s)")
    add("--n-embd", type=int, default=128, help="its width; heads are of 32, if that divides it (%(default)s)")
    add("--pretrain-steps", type=int, default=1100, help="its optimizer steps (%(default)s)")

    add = parser.add_argument_group("fine-tuning").add_argument
    for f in fields(Recipe):
        add(f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default, **f.metadata)

    if any(word.startswith("--init") for word in sys.argv):
        parser.set_defaults(methods=["lora", "flat"], seeds=1, eval_windows=32)
        parser.set_defaults(lr=2e-4, batch_size=4, grad_accum=4, block_size=256)
        parser.set_defaults(r=8, alpha=16.0, sigma=0.05, rho=0.05)
    args = parser.parse_args()

    args.methods = list(dict.fromkeys(args.methods))  # each once
    args.device = torch.device("cpu")
    if torch.cuda.is_available():
        args.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if args.init and Path(args.init).is_dir():
        args.init = str(Path(args.init).resolve())  # for PEFT, wherever it is called
    return args


def check(args: Namespace) -> None:
    """ValueError or OSError for what would end a run after minutes."""
    for name, value in vars(args).items():
        low = 1 if type(value) is int else 0
        if type(value) in (int, float) and not low <= value <= 10**6:
            raise ValueError(f"--{name.replace('_', '-')} must be from {low} to 1000000, got {value}")
    if args.alpha == 0 or args.lora_dropout >= 1:
        raise ValueError("--alpha must be above 0, --lora-dropout below 1")
    if args.peft and not args.init:
        raise ValueError("--peft needs --init: PEFT loads adapters onto a model that it can find")
    if args.data and not args.init:
        raise ValueError("--data needs --init: nanoGPT's files hold the tokens of GPT-2")
    if args.data and args.text:
        raise ValueError("--data takes the place of --text: give one of them")

    gpus = torch.cuda.device_count()
    if args.device.type == "cuda" and args.device.index >= gpus:
        raise ValueError(f"--nproc-per-node must be at most {gpus}, the number of GPUs here")
    if args.peft:
        extra("peft")
    args.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # not in Jupyter
        sys.stdout.reconfigure(errors="replace")  # what an ASCII terminal cannot show must not end a run
    args = parsed()
    try:
        check(args)
        if WORLD > 1:
            distributed.init_process_group()
        compare(args)
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        raise SystemExit(f"train_gpt2.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("\ntrain_gpt2.py: stopped; the same command goes on") from None
    finally:
        if distributed.is_initialized():
            gc.collect()  # a DistributedDataParallel still alive keeps gloo's threads, which must not outlive Python
            distributed.destroy_process_group()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_interrupt)
    main()
