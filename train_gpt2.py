"""Fine-tune a GPT-2 with LoRA, Flat-LoRA and SAM, side by side.

    python train_gpt2.py                       # no network, no file needed
    python train_gpt2.py --text my.txt         # your own text
    python train_gpt2.py --init gpt2 --text my.txt         # OpenAI's GPT-2
    python train_gpt2.py --sample out/flat-0-1a2b3c4d.pt --prompt "def "
    torchrun --nproc-per-node 2 -- train_gpt2.py     # several processes

The bare command pre-trains a small GPT-2 (https://github.com/karpathy/nanoGPT)
on the text of Python's help(), once, and fine-tunes it on the package email by
each method under three seeds. A stopped run goes on by the same command, and a
finished one is kept: more seeds or one more method only add to it.

For your own scripts: save_peft, load_peft and perturbed_peft.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends without a traceback
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import copy
import gc
import hashlib
import importlib
import io
import json
import math
import os
import re
import statistics
import sys
import tempfile
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from tqdm import tqdm

import flatlora

TARGETS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
METHODS = {"lora": 1, "dropout": 1, "flat": 1, "sam": 2, "full": 1}  # and the passes of each per batch
RANK = int(os.environ.get("RANK", 0))  # set by torchrun, like the next
WORLD = int(os.environ.get("WORLD_SIZE", 1))
CHECKPOINT_SECONDS = 30.0


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
def generate(model: GPT, prompt: Sequence[int], length: int, seed: int = 0, top_k: int = 40) -> list[int]:
    """`length` tokens after `prompt`, each among the `top_k` likeliest, drawn with a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(length):
        context = torch.tensor([tokens[-model.config.block_size :]])  # (1, T)
        logits = model(context.to(model.device))[0, -1]  # (vocab_size,)
        best, ids = logits.float().cpu().topk(min(top_k, len(logits)))  # (top_k,), (top_k,)
        chances = (best / 0.7).softmax(0)  # 0.7, a temperature below 1, plays safe
        tokens.append(int(ids[torch.multinomial(chances, 1, generator=generator)]))
    return tokens[len(prompt) :]


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
    """Written beside and renamed: a kill or a full disk at any moment leaves the earlier file or the new one."""
    buffer = io.BytesIO()
    if path.suffix == ".json":
        buffer.write(json.dumps(content, indent=1, default=str).encode())
    else:
        torch.save(content, buffer)

    temporary = path.with_name(f".writing-{os.getpid()}")
    try:
        temporary.write_bytes(buffer.getbuffer())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- OpenAI's GPT-2, through transformers --------------------------------------------------------------------
def load_gpt2(init: str, device: torch.device) -> tuple[GPT, Any]:
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
    return model.to(device).eval(), tokenizer


@torch.no_grad()
def check_same_function(ours: GPT, theirs: nn.Module) -> None:
    """ValueError: settings by which Hugging Face's model computes something else than `GPT`."""
    tokens = torch.arange(min(16, ours.config.block_size))[None]  # (1, T)
    expected = theirs(tokens).logits  # (1, T, vocab_size)
    gap = (ours(tokens) - expected).abs().max()
    largest = expected.abs().max()
    if not gap < 1e-4 * largest:
        raise ValueError(f"its settings are not those of GPT-2: logits of {largest:.3g} are off by {gap:.1e}")


Encode = Callable[[bytes], list[int]]
Decode = Callable[[Sequence[int]], str]


def encoding(tokenizer: Any) -> tuple[Encode, Decode]:
    """How a text becomes tokens, and back: by a tokenizer of transformers, or without one, a token is a byte."""
    if tokenizer is None:
        return list, lambda tokens: bytes(tokens).decode(errors="replace")

    def encode(text: bytes) -> list[int]:
        return tokenizer.encode(text.decode("utf-8", "ignore"), add_special_tokens=False)  # half a character at a cut

    def decode(tokens: Sequence[int]) -> str:
        return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    return encode, decode


# ---- Data ----------------------------------------------------------------------------------------------------
def package_sources(name: str, size: int = 1000) -> list[bytes]:
    """Source code of a standard-library package.

    Of each file `size` bytes at most, since else one module of email would be a third of the text, and not the first
    2,000, which are licence and imports.
    """
    folder = Path(importlib.import_module(name).__path__[0])
    return [path.read_bytes()[2000 : 2000 + size] for path in sorted(folder.glob("*.py"))]


def read_files(paths: Sequence[Path], utf8: Any = False) -> list[bytes]:
    """Without a byte-order mark. ValueError with `utf8`, which GPT-2's byte pairs need, for another encoding."""
    files = []
    for path in paths:
        with reading(path):
            content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
            if utf8 and "\0" in content.decode():
                raise ValueError(f"in UTF-8 its byte {content.index(0)} would not be zero")
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


def load_texts(args: argparse.Namespace) -> dict[str, bytes]:
    """The texts to encode: "train", "val", "test" without --data, perhaps "ood" and, without --init, "pretrain"."""
    texts = {}
    if not args.data:
        files = read_files(args.text, args.init) if args.text else package_sources("email")
        texts = split(files)
    if args.ood or not args.init:
        files = read_files(args.ood, args.init) if args.ood else package_sources("asyncio")
        texts["ood"] = b"".join(files)
    if not args.init:
        topics = importlib.import_module("pydoc_data.topics").topics
        texts["pretrain"] = "\n\n".join(topics[key] for key in sorted(topics)).encode()
    return texts


def load_tokens(folder: Path) -> dict[str, Tensor]:
    """nanoGPT's files, mapped into memory, not read into it. The halves of val are val and test."""
    if Path(folder, "meta.pkl").exists():
        raise ValueError(f"{folder} has a meta.pkl, so its tokens are characters: give their text by --text")
    data = {}
    for name in ("train", "val"):
        path = folder / f"{name}.bin"
        with reading(path):
            ids = np.memmap(path, np.uint16, "c")  # c: nothing is written to the file
            data[name] = torch.from_numpy(ids)
            if (ids[1 : 10**6 : 2] < 2).mean() > 0.5:
                raise ValueError("every second number is 0 or 1, as in uint32: its tokens must be uint16")
    data["val"], data["test"] = data["val"].tensor_split(2)
    return data


def load_data(args: argparse.Namespace, config: GPTConfig, tokenizer: Any) -> dict[str, Tensor]:
    """Token ids of "train", "val", "test", perhaps "ood" and "pretrain", each (N,)."""
    data = load_tokens(args.data) if args.data else {}
    encode, _ = encoding(tokenizer)
    for name, text in load_texts(args).items():
        data[name] = torch.tensor(encode(text), dtype=torch.int32)
    for name, ids in data.items():
        with reading(f"the {name} text"):
            check_ids(ids.numpy(), args, config)
    return data


def check_ids(ids: np.ndarray, args: argparse.Namespace, config: GPTConfig) -> None:
    longest = min(len(ids) - 1, config.block_size)
    if args.block_size > longest:
        raise ValueError(f"it has {len(ids)} tokens, the model {config.block_size} places: too few for --block-size")
    if ids.max() >= config.vocab_size:
        raise ValueError(f"it has the token {ids.max()}, the model only {config.vocab_size} of them")
    if args.data:
        strange = ids.max() < 256
        if not args.init:
            strange = (ids[: 10**6] < 9).mean() > 0.01  # as bytes, control characters
        if strange:
            raise ValueError("its tokens look like characters, not like those of the model")


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
    lr: float = option(1.5e-3, "peak learning rate; full wants a lower one")
    batch_size: int = option(8, "windows per micro-batch")
    grad_accum: int = option(1, "micro-batches per step")
    block_size: int = option(64, "tokens per window")
    weight_decay: float = option(0.0, "AdamW's")
    dtype: str = option("float32", "bfloat16 is autocast: parameters stay float32", choices=["float32", "bfloat16"])
    r: int = option(16, "rank of the adapters")
    alpha: float = option(32.0, "their scaling is alpha / r")
    lora_dropout: float = option(0.1, "dropout: rate, on the input of the adapters")
    sigma: float = option(0.2, "flat: noise at the end; 0.05 to 0.1 on a real model")
    schedule: str = option("cosine", "flat: how sigma grows", choices=["cosine", "constant"])
    rho: float = option(0.2, "sam: radius")
    eval_windows: int = option(200, "windows of each text in an evaluation")


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor], dtype: str = "float32") -> Tensor:
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


def plain_step(model: nn.Module, loss_fn: flatlora.LossFn, batches: list, optimizer: torch.optim.Optimizer) -> float:
    """One step of a model that trains whole. Returns the loss."""
    optimizer.zero_grad()
    total = 0.0
    for batch in batches:
        loss = loss_fn(model, batch) / len(batches)
        loss.backward()
        total += loss.item()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not math.isfinite(total + norm):
        raise FloatingPointError(f"the loss or its gradient is not finite: {total}")
    optimizer.step()
    return total


def trainable(base: GPT, method: str, recipe: Recipe) -> GPT:
    """A copy of the base that trains whole, or one with adapters on the base's own weights: these are never written."""
    if method == "full":
        return copy.deepcopy(base).requires_grad_(True)
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    dropout = recipe.lora_dropout if method == "dropout" else 0.0
    return flatlora.inject_lora(model, recipe.r, recipe.alpha, dropout, TARGETS)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy in what `trained` gave."""
    if state.keys() != trained(model).keys():
        raise ValueError("it is of another model")
    model.load_state_dict(state, strict=False)  # strict would ask for the frozen weights


def train(
    base: GPT, method: str, data: Tensor, recipe: Recipe, seed: int, file: Path, bar: tqdm
) -> tuple[GPT, dict[str, list[float]]]:
    """A trained copy of the base in evaluation mode, and loss and seconds of each step.

    Goes on from `file`, which is kept up to date. All that a step draws follows from (seed, step, rank), so the
    result is that of a run which never stopped.
    """
    torch.manual_seed(seed)  # the same adapters for every method
    model = trainable(base, method, recipe)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, recipe.lr, (0.9, 0.95), weight_decay=recipe.weight_decay)
    history: dict[str, list[float]] = {"loss": [], "seconds": []}
    if file.exists():
        with reading(file):
            saved = load(file)
            restore(model, saved["trained"])
            history = saved["history"]
            if len(history["loss"]) < recipe.steps:  # else the same command, run twice, has just finished it
                optimizer.load_state_dict(saved["optimizer"])
    first = len(history["loss"])
    bar.update(first)
    if 0 < first < recipe.steps:
        say(f"{method}, seed {seed}: goes on from step {first}")

    net = model.train()
    if WORLD > 1:
        net = nn.parallel.DistributedDataParallel(model)
    loss_of = partial(loss_fn, dtype=recipe.dtype)
    saved_at = time.monotonic()
    for step in range(first, recipe.steps):
        draw = np.random.default_rng([seed, step, RANK])  # which no method can disturb
        starts = draw.integers(len(data) - recipe.block_size, size=(recipe.grad_accum, recipe.batch_size))
        torch.manual_seed(int(draw.integers(2**63)))  # for dropout
        batches = [windows(data, places, recipe.block_size, base.device) for places in starts]
        optimizer.param_groups[0]["lr"] = learning_rate(step, recipe.steps, recipe.lr)

        begin = time.perf_counter()
        if method == "full":
            loss = plain_step(net, loss_of, batches, optimizer)
        elif method == "sam":
            loss = flatlora.sam_step(net, loss_of, batches, optimizer, recipe.rho, 1.0)
        else:
            end = recipe.sigma if method == "flat" else 0.0  # with 0 the plain step of LoRA
            sigma = flatlora.sigma_at(step, recipe.steps, end, recipe.schedule)
            loss = flatlora.flat_lora_step(net, loss_of, batches, optimizer, sigma, (seed, step, RANK), 1.0)
        history["seconds"].append(time.perf_counter() - begin)  # the loss is here, so a GPU is through
        history["loss"].append(loss)
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        bar.update()

        due = step + 1 == recipe.steps or time.monotonic() > saved_at + CHECKPOINT_SECONDS
        if due and RANK == 0:
            save(file, {"trained": trained(model), "optimizer": optimizer.state_dict(), "history": history})
            saved_at = time.monotonic()
    return model.eval(), history


def say(line: str) -> None:
    """A line above the progress bar."""
    if RANK == 0:
        tqdm.write(line, file=sys.stderr)


def run_file(folder: Path, base: GPT, method: str, data: Mapping[str, Tensor], recipe: Recipe, seed: int) -> Path:
    """Named by all that shapes a run and its results, so that only an equal one goes on from it.

    Of a tensor 2^16 numbers count. Runs that can be compared have the same last part.
    """
    digest = hashlib.sha256(f"{base.config} {recipe} {WORLD} {[*data]}".encode())
    for tensor in [*data.values(), *base.parameters()]:
        stride = 1 + tensor.numel() // 2**16
        numbers = tensor.detach().flatten()[::stride].cpu().numpy()
        digest.update(f"{tensor.shape}".encode() + numbers.tobytes())
    return folder / f"{method}-{seed}-{digest.hexdigest()[:8]}.pt"


# ---- Evaluation ----------------------------------------------------------------------------------------------
def spread(model: GPT, data: Tensor, recipe: Recipe, limit: int) -> list[tuple[Tensor, Tensor]]:
    """At most `limit` windows, evenly spread, without overlap, in equal batches."""
    starts = np.arange(0, len(data) - recipe.block_size, recipe.block_size)  # (N,)
    starts = starts[:: math.ceil(len(starts) / limit)]
    size = min(recipe.batch_size, len(starts))
    whole = len(starts) // size * size
    parts = starts[:whole].reshape(-1, size)
    return [windows(data, part, recipe.block_size, model.device) for part in parts]


@torch.no_grad()
def measure(model: GPT, data: Mapping[str, Tensor], recipe: Recipe) -> dict[str, float]:
    """The losses and, of a model with adapters, the rise of the training loss under noise of sigma 0.1 on W'."""
    loss_of = partial(loss_fn, dtype=recipe.dtype)
    found = {}
    for name in ("val", "test", "ood"):
        if name in data:
            batches = spread(model, data[name], recipe, recipe.eval_windows)
            found[f"{name}_loss"] = statistics.fmean(loss_of(model, batch).item() for batch in batches)
    if any(isinstance(module, flatlora.LoRALinear) for module in model.modules()):
        batches = spread(model, data["train"], recipe, min(recipe.eval_windows, 64))
        found["sharpness"] = flatlora.sharpness(model, loss_of, batches, sigma=0.1, samples=4, seed=0)
    return found


# 97.5 % points of Student's t for 1 to 15 degrees of freedom. The last serves above, too: there it is up to 9 % wide.
T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval."""
    n = len(values)
    t = T975[min(n - 2, 14)]
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n)


# ---- What is printed -----------------------------------------------------------------------------------------
HEADINGS = {"val_loss": "validation", "test_loss": "test", "ood_loss": "other text", "sharpness": "sharpness"}
COSTS = {"passes": "passes", "ms": "ms/step"}
DIGITS = {"sharpness": 4, "passes": 0, "ms": 0}  # 3 for the others
Runs = Sequence[Mapping[str, Any]]


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the heading. The first column stands to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        cells = [row[0].ljust(widths[0])]
        cells += map(str.rjust, row[1:], widths[1:])
        lines.append("  ".join(cells))
    return "\n".join(lines)


def mean_row(method: str, runs: Runs, keys: Sequence[str]) -> list[str]:
    row = [method]
    for key in keys:
        values = [run[key] for run in runs if key in run]
        row.append(f"{statistics.fmean(values):.{DIGITS.get(key, 3)}f}" if values else "-")
    return row


def difference(key: str, runs: Runs, others: Runs) -> tuple[float, float]:
    """Mean and half the width of the interval, paired by seed."""
    pairs = zip(runs, others, strict=True)
    return interval([run[key] - other[key] for run, other in pairs])


def difference_row(method: str, runs: Runs, others: Runs, keys: Sequence[str]) -> list[str]:
    row = [method]
    for key in keys:
        cell = "-"
        if key in runs[0]:
            cell = plus_minus(*difference(key, runs, others), DIGITS.get(key, 3))
        row.append(cell)
    return row


def plus_minus(mean: float, half: float, digits: int) -> str:
    """With as many digits more as the width needs not to be rounded to zero."""
    if mean == half == 0:
        return "equal"
    while digits < 9 and round(half or mean, digits) == 0:
        digits += 1
    return f"{mean:+.{digits}f} +-{half:.{digits}f}"


def verdict(mean: float, half: float) -> str:
    """Undecided: an edge of the interval is so close to zero that a few more seeds may turn the word."""
    if mean == half == 0:
        return "equal"
    word = "lower" if mean < 0 else "higher"
    if abs(mean) < half:
        word = "not shown to differ"
    if mean and abs(abs(mean) - half) <= abs(mean) / 5:
        word = "undecided"
    return f"{word} ({plus_minus(mean, half, 3)})"


def report(runs: Runs, task: str) -> str:
    """Means over the seeds, differences to LoRA, and what they say, in 80 columns. Each part explains itself."""
    by: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        by.setdefault(run["method"], []).append(run)
    results = [key for key in HEADINGS if any(key in run for run in runs)]
    titles = ["", *map(HEADINGS.get, results)]
    n = len(by[runs[-1]["method"]])
    note = f"{task} Nats per token; n = {n}: seeds 0 to {n - 1}, methods untuned. "
    note += "Sharpness: how much noise of sigma 0.1 on the merged weights raises the training loss."

    rows = [[*titles, *COSTS.values()]]
    for method, own in by.items():
        rows.append(mean_row(method, own, [*results, *COSTS]))
    parts = [textwrap.fill(f"Means over the seeds. {note}", 79), table(rows)]
    others = [method for method in by if method not in ("base", "lora")]
    if "lora" not in by or not others:
        return "\n\n".join(parts)
    if n == 1:
        return "\n\n".join([*parts, "One seed has no interval: more, by --seeds, only add to these runs."])

    rows = [titles, mean_row("lora", by["lora"], results)]
    words = []
    for method in others:
        rows.append(difference_row(method, by[method], by["lora"], results))
        word = verdict(*difference("test_loss", by[method], by["lora"]))
        passes = f" at {METHODS[method]} passes per step" if METHODS[method] > 1 else ""
        words.append(f"{method} {word}{passes}")
    heading = f"LoRA's own values, then differences to them, paired by seed, with 95 % intervals. {note}"
    parts.append(f"{textwrap.fill(heading, 79)}\n{table(rows)}")
    parts.append(textwrap.fill(f"Test loss against lora's: {'; '.join(words)}.", 79))
    return "\n\n".join(parts)


def curve(losses: Sequence[float]) -> str:
    """The loss as it falls, a character per twentieth of the steps."""
    shades = "▁▂▃▄▅▆▇█" if "utf" in (sys.stderr.encoding or "").lower() else "01234567"
    parts = np.array_split(losses, min(20, len(losses)))
    means = np.array([part.mean() for part in parts])
    height = np.ptp(means) or 1.0
    levels = 7 * (means - means.min()) / height  # from 0 to 7
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
    tensors = {}
    whole = set()
    for key, tensor in flatlora.lora_state_dict(model).items():
        owner, _, part = key.rpartition(".")
        if owner not in layers:
            whole.add(owner)
            tensors[PREFIX + key] = tensor.contiguous()
        elif part != "alpha":
            tensors[f"{PREFIX}{key}.weight"] = tensor.contiguous()

    first = next(iter(layers.values()))
    config = extra("peft").LoraConfig(r=first.r, lora_alpha=first.alpha, inference_mode=True)
    config.target_modules = "|".join(map(re.escape, layers))  # of a list, PEFT would take "1" for the end of "3.1" too
    config.modules_to_save = sorted(whole) or None
    for name, layer in layers.items():
        pattern = f"^{re.escape(name)}"  # without ^ "0" would fit "1.0" too
        if layer.r != first.r:
            config.rank_pattern[pattern] = layer.r
        if layer.alpha != first.alpha:
            config.alpha_pattern[pattern] = layer.alpha
    with reading("such an adapter"):
        loaded_by_peft(model, config, tensors)

    config.base_model_name_or_path = str(base_model)
    config.fan_in_fan_out = fan_in_fan_out
    config.task_type = task_type
    config.save_pretrained(folder)
    extra("safetensors.torch").save_file(tensors, Path(folder, "adapter_model.safetensors"), {"format": "pt"})


def load_peft(model: nn.Module, folder: str | Path) -> nn.Module:
    """`inject_lora` from an adapter of PEFT's: its layers, ranks, scalings and weights. Returns the model.

    ValueError, before anything is changed: damaged files, more than plain LoRA, or the model has adapters.
    """
    peft = extra("peft")
    if any(isinstance(module, flatlora.LoRALinear) for module in model.modules()):
        raise ValueError("the model has adapters already: load_peft takes a plain one")
    with reading(folder):
        check_plain_lora(json.loads(Path(folder, "adapter_config.json").read_text("utf-8")))
        config = peft.LoraConfig.from_pretrained(str(folder))
        config.fan_in_fan_out = False  # this model has nn.Linear
        config.init_lora_weights = False
        tensors = peft.utils.load_peft_weights(str(folder), device="cpu")
        layers = loaded_by_peft(model, config, tensors)

        state = {}
        whole = set()
        for key, tensor in tensors.items():
            name = key.removeprefix(PREFIX)
            if ".lora_" in name:
                name = name.removesuffix(".weight")
            else:
                whole.add(name.rpartition(".")[0])
            state[name] = tensor

        rehearsal = skeleton(model)
        inject_like(layers, whole, rehearsal)
        trains = {name for name, p in rehearsal.named_parameters(remove_duplicate=False) if p.requires_grad}
        buffers = dict(rehearsal.named_buffers())
        unlike = (trains ^ state.keys()) - buffers.keys()
        if unlike:
            raise ValueError(f"PEFT's layers and those of inject_lora differ, as on a tied weight: {unlike}")
    inject_like(layers, whole, model)
    flatlora.load_lora_state_dict(model, state)
    return model


def check_plain_lora(given: Mapping[str, Any]) -> None:
    """ValueError: a setting by which PEFT computes something else, even one that this version does not know."""
    plain = extra("peft").LoraConfig().to_dict()
    for key, value in given.items():
        allowed = (plain.get(key), "gaussian", "orthogonal")  # two inits that leave the base as it is
        if value and key not in FREE.split() and value not in allowed:
            raise ValueError(f"{key}={value!r} is more than plain LoRA, or may have changed the base")


def inject_like(layers: Mapping[str, Any], whole: set[str], model: nn.Module) -> None:
    """One `inject_lora` for each rank and scaling of PEFT's layers."""
    groups = defaultdict(list)
    for name, layer in layers.items():
        groups[layer.r["default"], layer.scaling["default"]].append(re.escape(name))
    heads = "|".join(map(re.escape, whole)) or ()
    for (r, scaling), names in groups.items():
        flatlora.inject_lora(model, r, scaling * r, targets="|".join(names), modules_to_save=heads)


def loaded_by_peft(model: nn.Module, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """PEFT's layers, by name, after it has loaded an adapter into a copy. ValueError: it has no place for a tensor."""
    peft = extra("peft")
    theirs = peft.PeftModel(skeleton(model), copy.deepcopy(config), low_cpu_mem_usage=True)
    result = peft.set_peft_model_state_dict(theirs, dict(tensors), low_cpu_mem_usage=True)
    missing = [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    if missing or result.unexpected_keys:
        raise ValueError(f"PEFT has no place or no tensor for {[*result.unexpected_keys, *missing][:3]}")
    return plain_peft_layers(theirs)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy without numbers (on the meta device), without adapters and without a wrapper around the model."""
    memo: dict[int, Any] = {}  # what the copy has in the place of each object
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.to("meta"), requires_grad=False)
    for module in model.modules():
        if isinstance(module, flatlora.LoRALinear):
            memo[id(module)] = copy.deepcopy(module.base, memo)
    inner = next(iter(flatlora.module_names(model)))
    return copy.deepcopy(inner, memo)


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
    for module, name in flatlora.module_names(model).items():
        if isinstance(module, lora.LoraLayer):
            check_plain_layer(name, module, lora)
            layers[name.removeprefix(PREFIX)] = module
    if not layers:
        raise ValueError("the model has no LoRA layer of PEFT's: call get_peft_model first")
    return layers


def check_plain_layer(name: str, layer: Any, lora: Any) -> None:
    base = layer.base_layer
    is_linear = type(base) is nn.Linear or type(base).__name__ == "Conv1D"
    if type(layer) is not lora.Linear or layer.lora_variant or not is_linear:
        raise ValueError(f"{name} is more than plain LoRA on an nn.Linear or Conv1D: {layer}")
    flatlora.check_numbers(f"{name}.weight", base.weight)
    active = layer.active_adapters
    if layer.merged or layer.disable_adapters or len(active) != 1 or active[0] not in layer.lora_A:
        raise ValueError(f"{name} must have one active adapter, not merged and not disabled, got {active}")
    if "forward" in vars(base):
        raise ValueError(f"{name} has its own forward: perturbations do not nest, nor fit accelerate's offloading")


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
def load_base(args: argparse.Namespace) -> tuple[GPT, str, dict[str, Tensor], Any]:
    """The base and where it is, the data, and the tokenizer, which is None for bytes."""
    if args.init:
        base, tokenizer = load_gpt2(args.init, args.device)
        name = args.init
        if Path(name).is_dir():
            name = str(Path(name).resolve())  # for PEFT, wherever it is called
        return base, name, load_data(args, base.config, tokenizer), tokenizer

    torch.manual_seed(0)
    heads = args.n_embd // math.gcd(args.n_embd, 32)
    base = GPT(GPTConfig(args.n_layer, heads, args.n_embd, args.block_size)).to(args.device)
    data = load_data(args, base.config, None)
    text = data.pop("pretrain")
    once = Recipe(args.pretrain_steps, 3e-3, args.batch_size, block_size=args.block_size, dtype=args.dtype)
    file = run_file(args.out, base, "base", {"train": text}, once, 0)
    with tqdm(desc="pre-training, once", total=once.steps, leave=False, disable=RANK > 0) as bar:
        base, _ = train(base, "full", text, once, 0, file, bar)
    return base, file.name, data, None


def finished_run(
    base: GPT, method: str, data: Mapping[str, Tensor], recipe: Recipe, seed: int, file: Path, bar: tqdm
) -> dict[str, Any]:
    """What the file of the run holds in the end: read, if it is there, or made."""
    if file.exists():
        with reading(file):
            content = load(file)
            if "result" in content:
                bar.update(recipe.steps)
                return content

    model, history = train(base, method, data["train"], recipe, seed, file, bar)
    result = {"method": method, "seed": seed, **measure(model, data, recipe), "passes": METHODS[method]}
    result["ms"] = 1000 * statistics.median(history["seconds"])
    return {"recipe": asdict(recipe), "trained": trained(model), "history": history, "result": result}


def compare(args: argparse.Namespace) -> None:
    """Fine-tune with each method and seed, measure, write the results, then print."""
    recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
    base, name, data, tokenizer = load_base(args)
    runs = [{"method": "base", "seed": 0, **measure(base, data, recipe)}]
    shown = {}
    total = args.seeds * len(args.methods) * recipe.steps
    with tqdm(total=total, leave=False, disable=RANK > 0) as bar:
        for seed in range(args.seeds):
            for method in args.methods:
                bar.set_description(f"{method}, seed {seed}")
                file = run_file(args.out, base, method, data, recipe, seed)
                content = finished_run(base, method, data, recipe, seed, file, bar)
                keep(base, name, content, file, args)
                runs.append(content["result"])
                shown.setdefault(method, content)

    if RANK == 0:
        texts = args.text or [args.data or "Python's package email"]
        text = report(runs, f"GPT-2 fine-tuned on {', '.join(map(str, texts))}.")
        results = file.with_name(f"results-{file.stem.rpartition('-')[2]}.json")
        save(results, {"torch": torch.__version__, "options": vars(args), "runs": runs, "report": text})
        print(f"{text}\n\nNumbers: {results}; adapters: {file.with_stem(file.stem.replace(method, 'METHOD'))}")
        if "flat" in shown:
            method = "flat"
        models = {"base": base, method: restored(base, shown[method])}
        for title, model in models.items():
            words = written(model, tokenizer, args)
            print(f"\n{title} writes:\n\n{textwrap.indent(words, '    ')}")


def keep(base: GPT, name: str, content: dict[str, Any], file: Path, args: argparse.Namespace) -> None:
    """Write a finished run, if it is new, and say with its loss how it went."""
    if RANK > 0:
        return
    if "base" not in content:
        content |= {"base": name, "config": asdict(base.config)}
        save(file, content)
    run = content["result"]
    if args.peft and run["method"] != "full":
        model = restored(base, content)
        save_peft(model, file.with_suffix(""), name, fan_in_fan_out=True, task_type="CAUSAL_LM")

    losses = content["history"]["loss"]
    seconds = sum(content["history"]["seconds"])
    name = f"{run['method']}, seed {run['seed']}:"
    say(f"{name:17}loss {curve(losses)} {losses[-1]:.2f}, test loss {run['test_loss']:.3f}, {seconds:.0f} s")


def restored(base: GPT, content: Mapping[str, Any]) -> GPT:
    """The model of a finished run."""
    model = trainable(base, content["result"]["method"], Recipe(**content["recipe"]))
    restore(model, content["trained"])
    return model.eval()


def written(model: GPT, tokenizer: Any, args: argparse.Namespace) -> str:
    encode, decode = encoding(tokenizer)
    tokens = encode((args.prompt or "\n").encode())
    return decode([*tokens, *generate(model, tokens, args.length)])


def sample(args: argparse.Namespace) -> None:
    """Text from a finished run, on the base beside it or on OpenAI's GPT-2 (--init, where that has moved)."""
    content = load(args.sample)
    with reading(args.sample):
        tokenizer = None
        init = args.init or content["base"]
        if args.init or not init.endswith(".pt"):
            base, tokenizer = load_gpt2(init, args.device)
        else:
            base = GPT(GPTConfig(**content["config"])).to(args.device)
            restore(base, load(args.sample.with_name(init))["trained"])
        model = restored(base, content)
    print(written(model, tokenizer, args))


def parsed() -> argparse.Namespace:
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=__doc__, allow_abbrev=False, formatter_class=raw
    )
    add = parser.add_argument_group("what to run").add_argument
    standard = ["lora", "dropout", "flat", "sam"]
    add("--methods", nargs="+", choices=METHODS, default=standard, metavar="METHOD", help="of %(choices)s")
    add("--seeds", type=int, default=3, help="runs of each method, from two on with intervals (%(default)s)")
    add("--out", type=Path, default=Path("out"), help="folder for base, runs and results (%(default)s)")
    add("--device", choices=devices, default=devices[0], help="(%(default)s)")
    add("--sample", type=Path, metavar="FILE", help="only write a text with this finished run")
    add("--prompt", default="def ", help="what the texts continue (%(default)r)")
    add("--length", type=int, default=200, help="their length in tokens (%(default)s)")

    group = parser.add_argument_group("data")
    either = group.add_mutually_exclusive_group().add_argument
    either("--text", type=Path, nargs="+", metavar="FILE", help="fine-tune on these (sources of the package email)")
    either("--data", type=Path, metavar="DIR", help="or on nanoGPT's train.bin and val.bin (half of val is the test)")
    other = "the other text (sources of asyncio; with --init none)"
    group.add_argument("--ood", type=Path, nargs="+", metavar="FILE", help=other)

    add = parser.add_argument_group("the base: OpenAI's GPT-2, or a small one pre-trained here").add_argument
    add("--init", metavar="MODEL", help="gpt2 to gpt2-xl or a folder; changes the defaults, see --init MODEL -h")
    add("--peft", action="store_true", help="with --init: also write each adapter for PEFT, in a folder beside it")
    add("--n-layer", type=int, default=4, help="blocks of the small one (%(default)s)")
    add("--n-embd", type=int, default=128, help="its width, in heads of 32 (%(default)s)")
    add("--pretrain-steps", type=int, default=1100, help="its optimizer steps (%(default)s)")

    add = parser.add_argument_group("fine-tuning").add_argument
    for f in fields(Recipe):
        add(f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default, **f.metadata)
    if any(word.partition("=")[0] == "--init" for word in sys.argv):
        parser.set_defaults(methods=["lora", "flat"], seeds=1, eval_windows=32)
        parser.set_defaults(lr=2e-4, batch_size=4, grad_accum=4, block_size=256)
        parser.set_defaults(r=8, alpha=16.0, sigma=0.05, rho=0.05)
    args = parser.parse_args()
    args.methods = list(dict.fromkeys(args.methods))
    index = int(os.environ.get("LOCAL_RANK", 0)) if args.device == "cuda" else None
    args.device = torch.device(args.device, index)
    return args


def check(args: argparse.Namespace) -> None:
    """ValueError or OSError for what would end a run after minutes."""
    for name, value in vars(args).items():
        low = 0 if isinstance(value, float) or name == "peft" else 1
        if isinstance(value, (int, float)) and not low <= value <= 10**6:
            raise ValueError(f"--{name.replace('_', '-')} must be from {low} to 1000000, got {value}")
    flatlora.LoRALinear(nn.Linear(1, 1), 1, args.alpha, args.lora_dropout)  # raises what it does not take
    if args.peft and not args.init:
        raise ValueError("--peft needs --init: PEFT loads adapters onto a model that it can find")
    if args.peft:
        extra("peft")
    if not args.sample:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()


def main() -> None:
    args = parsed()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # what an ASCII terminal cannot show must not end a run
    try:
        check(args)
        if WORLD > 1:
            distributed.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
        sample(args) if args.sample else compare(args)
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        raise SystemExit(f"train_gpt2.py: {error}") from None
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise SystemExit(f"train_gpt2.py: {str(error).splitlines()[0]}") from None
    except KeyboardInterrupt:
        raise SystemExit("\ntrain_gpt2.py: stopped; the same command goes on") from None
    finally:
        if distributed.is_initialized():
            gc.collect()  # a DistributedDataParallel still alive keeps gloo's threads, which must not outlive Python
            distributed.destroy_process_group()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_interrupt)
    main()
