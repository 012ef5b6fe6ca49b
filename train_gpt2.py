"""Fine-tune a GPT-2 with LoRA, Flat-LoRA and SAM, side by side.

    python train_gpt2.py              # all of it: no network, no file needed
    python train_gpt2.py --seeds 5    # the same with paired 95 % intervals
    python train_gpt2.py --text my.txt --ood other.txt    # your own text
    python train_gpt2.py --init gpt2 --text my.txt        # OpenAI's GPT-2
    python train_gpt2.py --sample --adapter out/flat.pt --prompt "def "
    python train_gpt2.py --resume     # a stopped run goes on, bit for bit
    torchrun --nproc-per-node 2 -- train_gpt2.py --r 8    # several processes

The bare command pre-trains a small byte-level GPT-2 on the English that every
Python carries (the reference behind `help()`), once, and fine-tunes it on the
source code of one standard-library package. Files of that package that no
method saw are the test, another package is the out-of-domain test. The model
follows OpenAI's GPT-2 as written down in nanoGPT
(https://github.com/karpathy/nanoGPT), module names included.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import signal
import statistics
import sys
import textwrap
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from flatlora import (
    check_fit,
    flat_lora_step,
    inject_lora,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    read_safetensors,
    sam_step,
    save_peft,
    sharpness,
    sigma_at,
)
from train_toy import (
    DRAWS,
    NOISE,
    ablated,
    check_shared,
    choice,
    environment,
    gradient_noise,
    report,
    variants,
    write,
    write_json,
)

TARGETS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
METHODS = ("lora", "flat", "sam", "sam-full", "full")
METRICS = {  # what the table shows: label, digits
    "train_loss": ("train, nats a token", 3),
    "val_loss": ("validation", 3),
    "test_loss": ("test", 3),
    "ood_loss": ("out of domain", 3),
    "test_bits": ("test, bits a byte", 3),
    "ood_bits": ("out of domain", 3),
    "sharp_lora": ("sharpness, LoRA", 4),
    "sharp_full": ("sharpness, full", 4),
    "grad_noise": ("gradient noise", 3),
    "trainable": ("trained params", 0),
    "passes": ("passes a step", 0),
    "ms": ("ms a step", 0),
    "time": ("time / LoRA's", 2),
}

INIT_DEFAULTS: dict[str, Any] = {  # with --init, where a step is dear
    "methods": ["flat"], "block_size": 256, "batch_size": 4, "grad_accum": 4, "steps": 100, "warmup": 10, "lr": 2e-4,
    "full_lr": 3e-5, "r": 8, "alpha": 16, "sigma": 0.05, "rho": 0.05, "eval_interval": 20, "eval_windows": 32,
    "sharpness_samples": 0, "length": 100,
}  # fmt: skip
SHAPING = [  # the options that a run must share with the checkpoint from which it goes on, beside those of its own
    "batch_size", "grad_accum", "block_size", "warmup", "weight_decay", "clip", "dtype", "r", "alpha", "dropout",
    "lora_dropout", "sigma", "schedule", "noise", "draws", "rho", "rho_full", "eval_interval",
]  # fmt: skip
VARIABLE = [  # the options that METHOD:OPTION=VALUE may set
    "steps", "batch_size", "grad_accum", "lr", "full_lr", "warmup", "weight_decay", "clip", "r", "alpha",
    "lora_dropout", "sigma", "schedule", "noise", "draws", "rho", "rho_full",
]  # fmt: skip
FIXED_BY_INIT = ["n_layer", "n_head", "n_embd", "pretrain_text", "pretrain_steps", "pretrain_lr"]
PAIRED = [key for key in METRICS if key.endswith(("loss", "noise")) or key.startswith("sharp")]  # as differences too
BRIEF = ["test_loss", "ood_loss", "sharp_lora", "sharp_full", "grad_noise", "time"]  # shown of five methods or more

# ---- Model ---------------------------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int = 256
    dropout: float = 0.0


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, nh, T, hs)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C); GPT-2 was trained with this form, not with erf
        return F.dropout(self.c_proj(x), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight  # tied
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # each block adds to the residual stream twice, hence the smaller c_proj
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T, vocab_size)."""
        part = self.transformer
        x = part["wte"](tokens) + part["wpe"](torch.arange(tokens.shape[1], device=tokens.device))  # (B, T, C)
        for layer in (part["drop"], *part["h"], part["ln_f"]):
            x = layer(x)  # (B, T, C)
        return self.lm_head(x)  # (B, T, vocab_size)


@torch.no_grad()
def generate(model: GPT, prompt: Sequence[int], length: int, temperature: float, top_k: int, seed: int) -> list[int]:
    """`length` tokens after `prompt`, drawn with a generator of their own."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(length):
        context = torch.tensor([tokens[-model.config.block_size :]], device=device)  # (1, T)
        logits = model(context)[0, -1].float().cpu() / temperature  # (vocab_size,)
        best, ids = logits.topk(min(top_k, len(logits)))
        tokens.append(int(ids[torch.multinomial(best.softmax(0), 1, generator=generator)]))
    return tokens[len(prompt) :]


# ---- OpenAI's GPT-2 ------------------------------------------------------------------------------------------

RELEASED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB = "https://huggingface.co/openai-community/{}/resolve/main/{}"
SAME_FUNCTION = {  # the settings of config.json under which `GPT` computes what Hugging Face's model does
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "tie_word_embeddings": True,
}  # fmt: skip
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # byte pairs stay inside of these


def checkpoint_file(init: str, *names: str) -> Path:
    """The first of `names` that the folder `init` holds. Of a released model, the first, downloaded once."""
    if init not in RELEASED:
        for name in names:
            if Path(init, name).is_file():
                return Path(init, name)
        what = f"{', '.join(RELEASED)} or a folder with {' or '.join(names)}"
        raise ValueError(f"--init must be {what}, got {init}")
    url, path = HUB.format(init, names[0]), Path(torch.hub.get_dir(), "flatlora", init, names[0])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except OSError as error:
            or_data = ", and --data DIR does without" if names == ("vocab.json",) else ""
            raise ValueError(f"cannot download {url} ({error}); --init DIR takes a folder with it{or_data}") from None
    return path


def gpt2_config(init: str, dropout: float) -> GPTConfig:
    path = checkpoint_file(init, "config.json")
    try:
        given = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    for key, value in SAME_FUNCTION.items():
        if given.get(key, value) != value:
            raise ValueError(f"{path}: {key} must be {value!r}, got {given[key]!r}")
    sizes = [given.get(key) for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")]
    if not all(isinstance(n, int) and n >= 1 for n in sizes) or sizes[2] % sizes[1]:
        raise ValueError(f"{path}: n_layer, n_head, n_embd, n_positions and vocab_size cannot be {sizes}")
    return GPTConfig(*sizes, dropout)


def load_gpt2(init: str, config: GPTConfig, device: torch.device) -> GPT:
    """The weights as Hugging Face saves them, with or without its prefix `transformer.`, every key accounted for."""
    path = checkpoint_file(init, "model.safetensors", "pytorch_model.bin")
    if path.suffix == ".safetensors":
        state = read_safetensors(path)
    else:
        try:
            state = dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            raise ValueError(f"{path} is truncated or no file of weights: {type(error).__name__}") from None
    prefix = "" if any(key.startswith("transformer.") for key in state) else "transformer."
    head = state.pop("lm_head.weight", None)
    mask = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")  # the causal mask, a buffer in older files
    state = {prefix + key: value for key, value in state.items() if not mask.fullmatch(key)}
    with torch.device("meta"):
        model = GPT(config)
    conv1d = {f"{name}.weight" for name, _ in model.named_modules() if name.endswith(tuple(TARGETS))}
    shapes = {key: p.shape[::-1] if key in conv1d else p.shape for key, p in model.named_parameters()}
    check_fit(f"the weights in {path}", shapes, state)
    if head is not None and not torch.equal(head, state["transformer.wte.weight"]):
        raise ValueError(f"{path}: lm_head.weight differs from wte.weight, to which GPT-2 ties it")
    for key in shapes:  # one after the other, so that no second copy of the model comes to be
        state[key] = (state[key].t() if key in conv1d else state[key]).to(device, torch.float32).contiguous()
    model.load_state_dict(state, strict=False, assign=True)  # strict would ask for the head
    model.lm_head.weight = model.transformer["wte"].weight  # tied again
    return model.eval()


def tokenizer(init: str | None) -> tuple[Callable[[bytes], Sequence[int]], Callable[[Sequence[int]], bytes]]:
    """encode and decode: a token is a byte or, with --init, one of GPT-2's byte pairs."""
    if init is None:
        return list, bytes
    try:
        import tiktoken
    except ImportError:
        raise ImportError('tiktoken is not installed: pip install -e ".[gpt2]"') from None
    path = checkpoint_file(init if Path(init, "vocab.json").is_file() else "gpt2", "vocab.json")  # one for all sizes
    # vocab.json writes a byte as a printable character: itself, or one from 256 on. Its ids are in merge order.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*plain}))}
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
        words = {i: bytes(byte[c] for c in word) for word, i in ids.items()}
        ranks = {word: i for i, word in words.items()}
        special = {"<|endoftext|>": ranks.pop(b"<|endoftext|>")}
        if not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is not a vocabulary of GPT-2's kind") from None
    bpe = tiktoken.Encoding("gpt2", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)
    unknown = "\N{REPLACEMENT CHARACTER}".encode()  # a model may have more outputs than there are words
    return (
        lambda text: bpe.encode_ordinary(text.decode(errors="replace")),
        lambda tokens: b"".join(words.get(token, unknown) for token in tokens),
    )


# ---- Data ----------------------------------------------------------------------------------------------------


def english() -> bytes:
    """The Python language reference, as `help()` shows it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError("this Python has no pydoc_data.topics: give --pretrain-text FILE, and --text FILE") from None
    return "\n\n".join(topics[key] for key in sorted(topics)).encode()


def package_sources(name: str, option: str) -> list[bytes]:
    """The source files of a standard-library package, by name."""
    spec = importlib.util.find_spec(name)
    folders = (spec and spec.submodule_search_locations) or []
    files = [path.read_bytes() for folder in folders for path in sorted(Path(folder).glob("*.py"))]
    if len(files) < 3:
        raise ValueError(f"this Python has no sources of its package {name}: give your own text, {option} FILE")
    return files


def read_files(paths: Sequence[Path]) -> list[bytes]:
    files = [path.read_bytes() for path in paths]
    for path, text in zip(paths, files):
        if not text:
            raise ValueError(f"{path} is empty")
    return files


def split(files: list[bytes]) -> dict[str, bytes]:
    """Train, validation and test, about 3:1:1: by file where there are three or more, else by position."""
    if len(files) >= 3:
        deal = {"train": [0, 3, 4], "val": [1], "test": [2]}
        return {name: b"".join(f for i, f in enumerate(files) if i % 5 in ks) for name, ks in deal.items()}
    text = b"".join(files)
    a, b = 3 * len(text) // 5, 4 * len(text) // 5
    return {"train": text[:a], "val": text[a:b], "test": text[b:]}


def read_bins(folder: Path) -> dict[str, Tensor]:
    """nanoGPT's train.bin and val.bin, mapped into memory, not read into it. The halves of val are val and test."""
    data = {}
    for name in ("train", "val"):
        path = folder / f"{name}.bin"
        size = path.stat().st_size
        if size == 0 or size % 2:
            raise ValueError(f"{path} must hold uint16 numbers, got {size} bytes")
        ids = np.memmap(path, np.uint16, "r")
        if len(ids) > 1 and ids[:4096:2].max() > 255 and ids[1:4096:2].max() < 4:
            raise ValueError(f"{path} holds 32-bit numbers, as of a vocabulary larger than uint16: only uint16 is read")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would rather have memory that can be written
            data[name] = torch.from_numpy(ids)
    half = len(data["val"]) // 2
    return {**data, "val": data["val"][:half], "test": data["val"][half:]}


def load_data(
    args: argparse.Namespace, vocab_size: int = 256, encode: Callable[[bytes], Sequence[int]] = list
) -> dict[str, Tensor]:
    """Token ids of "pretrain", "train", "val", "test", "ood", each (N,); --init has no "pretrain", and it and --data
    have "ood" by option only. Also sets args.tokens_a_byte, where there is text."""
    data = read_bins(args.data) if args.data else {}
    texts = {} if data else split(read_files(args.text) if args.text else package_sources("email", "--text"))
    if args.ood or not (args.init or args.data):
        texts["ood"] = b"".join(read_files(args.ood) if args.ood else package_sources("asyncio", "--ood"))
    if not args.init:
        texts["pretrain"] = b"".join(read_files(args.pretrain_text)) if args.pretrain_text else english()
    if "train" in texts:
        # The built-in text is cut so that it is scarce: with plenty there is nothing to regularise.
        texts["train"] = texts["train"][: args.train_bytes or (None if args.text else 30_000)]
    dtype = torch.int32 if args.init else torch.uint8
    data |= {name: torch.tensor(encode(text), dtype=dtype) for name, text in texts.items()}
    args.tokens_a_byte = {name: len(data[name]) / max(1, len(text)) for name, text in texts.items()}
    if args.data and vocab_size > 2**16:
        raise ValueError(f"--data holds uint16 numbers, too small for a vocabulary of {vocab_size}")
    for name, ids in data.items():
        if len(ids) < args.block_size + 1:
            unit = "tokens" if args.init or args.data else "bytes"
            raise ValueError(f"the {name} text is {len(ids)} {unit}, shorter than --block-size {args.block_size} + 1")
        if ids.numpy().max() >= vocab_size:
            raise ValueError(f"the {name} text has the token {ids.numpy().max()}, the model {vocab_size} of them")
    return data


def windows(data: Tensor, starts: Tensor, block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and next-token targets from the given places: (B, T), (B, T)."""
    at = starts[:, None] + torch.arange(block_size + 1)  # (B, T + 1)
    # By numpy, which indexes a mapped uint16 file in every release.
    chunk = torch.from_numpy(data.numpy()[at.numpy()].astype(np.int64)).to(device)  # (B, T + 1)
    return chunk[:, :-1], chunk[:, 1:]


def starting_places(data: Tensor, shape: Sequence[int], seed: int, args: argparse.Namespace) -> Tensor:
    """Where the windows of all steps start, from a generator that no method can disturb."""
    return torch.randint(len(data) - args.block_size, tuple(shape), generator=torch.Generator().manual_seed(seed))


# ---- Training ------------------------------------------------------------------------------------------------


def make_loss_fn(args: argparse.Namespace) -> Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]:
    """Mean cross-entropy in nats a token. The bfloat16 of --dtype is autocast: parameters stay float32."""

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logits = model(batch[0])  # (B, T, vocab_size)
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[1].flatten())

    return loss_fn


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Inside, Ctrl-C and SIGTERM are noted for the end of the step; a second one stops at once."""
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    model: nn.Module,
    method: str,
    data: Tensor,
    steps: int,
    peak_lr: float,
    seed: int,
    args: argparse.Namespace,
    title: str,
    val: Tensor | None = None,
) -> dict[str, float]:
    """Train in place: "full" everything, the other methods the adapters. The seed fixes the batches and the noise.

    With --resume it goes on from the run's checkpoint. All that a step draws follows from (seed, step, rank), so a
    checkpoint needs no generator, and the result is that of a run which never stopped.
    """
    loss_fn = make_loss_fn(args)
    seconds: list[float] = []
    best = [math.inf, 0]  # lowest validation loss and its step
    passes = first = 0

    def counted_loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal passes
        passes += 1
        return loss_fn(model, batch)

    parameters = list(model.parameters()) if method == "full" else lora_parameters(model)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    shape = (steps, args.world, args.grad_accum, args.batch_size)  # each process has its own
    starts = starting_places(data, shape, seed, args)[:, args.rank]
    recipe = {name: getattr(args, name) for name in SHAPING} | {"steps": steps, "peak_lr": peak_lr}
    recipe |= {"processes": args.world, "training data": fingerprint([data])}
    recipe |= {"base and first adapters": fingerprint(model.parameters())}
    path = checkpoint_path(title, seed, args)
    if args.resume and path.exists():
        first, seconds, passes, best = resume(path, recipe, model, optimizer)
        print(f"{title}, seed {seed}: goes on after step {first} of {steps}")
    elif path.exists():
        print(f"{title}, seed {seed}: starts anew over {path}, since --resume is not given")
    net = DistributedDataParallel(model) if args.world > 1 else model
    net.train()
    sigma = 0.0
    bar = tqdm(range(first, steps), desc=f"{title}, seed {seed}", leave=False, initial=first, total=steps)
    with stop_signals() as noted:
        for step in bar:
            torch.manual_seed(int(np.random.SeedSequence([seed, step, args.rank]).generate_state(1)[0]))  # for dropout
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak_lr, args.warmup)
            batches = [windows(data, places, args.block_size, args.device) for places in starts[step]]
            begin = time.perf_counter()
            if method in ("sam", "sam-full"):
                space, rho = ("lora", args.rho) if method == "sam" else ("full", args.rho_full)
                loss = sam_step(net, counted_loss_fn, batches, optimizer, rho, space, args.clip)
            else:
                sigma = sigma_at(step, steps, args.sigma, args.schedule) if method == "flat" else 0.0
                draw, keep = (seed, step, args.rank), not args.low_memory
                noisy_loss_fn, rest = ablated(counted_loss_fn, sigma, draw, args)
                loss = flat_lora_step(net, noisy_loss_fn, batches, optimizer, rest, draw, args.clip, keep)
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
            if step % 10 == 0:
                bar.set_postfix_str(f"loss {loss:.3f}, sigma {sigma:.3f}")
            if val is not None and args.eval_interval and (step + 1) % args.eval_interval == 0:
                best = min(best, now := [evaluate(model.eval(), val, args), step + 1])
                bar.write(f"{title}, seed {seed}, step {step + 1}: validation {now[0]:.3f}, best {best[0]:.3f}")
                net.train()
            stop = any_process(noted, args)
            if stop or (step + 1) % args.checkpoint_every == 0 or step + 1 == steps:
                trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
                state = {"trained": trained, "optimizer": optimizer.state_dict(), "recipe": recipe}
                save(path, {**state, "step": step + 1, "seconds": seconds, "passes": passes, "best": best}, args)
            if stop:
                raise KeyboardInterrupt
    model.eval()
    count = sum(p.numel() for p in parameters)
    cost = {"ms": 1000 * statistics.median(seconds), "passes": passes / (steps * args.grad_accum), "trainable": count}
    return cost | ({"best_val_loss": best[0], "best_val_step": best[1]} if best[1] else {})


def any_process(noted: list[int], args: argparse.Namespace) -> bool:
    """Whether one of the processes is to stop: they do so after the same step."""
    if args.world == 1:
        return bool(noted)
    stop = torch.tensor(len(noted), device=args.device)
    dist.all_reduce(stop)
    return bool(stop)


def at_once(model: nn.Module, args: argparse.Namespace) -> int:
    """Windows a forward in evaluation: their float32 logits take 256 MB at most."""
    return max(1, 2**26 // (args.block_size * model.config.vocab_size))


@torch.no_grad()
def evaluate(model: nn.Module, data: Tensor, args: argparse.Namespace) -> float:
    """Nats a token over windows that do not overlap; --eval-windows of them, evenly spread, where there are more."""
    loss_fn = make_loss_fn(args)
    starts = torch.arange(0, len(data) - args.block_size, args.block_size)  # (N,)
    starts = starts[:: -(-len(starts) // args.eval_windows)]
    parts = [windows(data, part, args.block_size, args.device) for part in starts.split(min(64, at_once(model, args)))]
    return sum(loss_fn(model, part).item() * len(part[0]) for part in parts) / len(starts)


# ---- Base and adapters ---------------------------------------------------------------------------------------


def save(path: Path, content: dict[str, Any], args: argparse.Namespace) -> None:
    if args.rank == 0:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write(path, buffer.getvalue())


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file, truncated, of another kind or made to harm: one clear error."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except Exception as error:
        words = (str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}").split("\n")[0]
        raise ValueError(f"{path} is not a checkpoint of this script: {words}") from None


def load(path: Path, keys: set[str], device: torch.device) -> dict[str, Any]:
    with reading(path):
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"its part {broken} is damaged")
        content = torch.load(path, map_location=device, weights_only=True)  # runs no code of the file
        if not isinstance(content, dict) or content.keys() != keys:
            raise ValueError(f"it must hold {', '.join(sorted(keys))}")
    return content


def load_base(path: Path, device: torch.device) -> GPT:
    content = load(path, {"config", "model"}, device)
    with reading(path):
        model = GPT(GPTConfig(**content["config"])).to(device)
        model.load_state_dict(content["model"])
    return model.eval()


def checkpoint_path(title: str, seed: int, args: argparse.Namespace) -> Path:
    return args.out / f"checkpoint-{file_name(title)}-{seed}.pt"


def file_name(title: str) -> str:
    return re.sub(r"[^\w=.-]", "-", title)  # "flat:lr=1e-3" would be no name on every system


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Tells data and weights apart: a hash of shapes and of up to 65,536 evenly spread numbers of each tensor."""
    digest = hashlib.sha256()
    for tensor in tensors:
        numbers = tensor.detach().flatten()[:: 1 + tensor.numel() // 2**16]
        digest.update(repr(tuple(tensor.shape)).encode() + numbers.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def resume(
    path: Path, recipe: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, list[float], int, list[Any]]:
    """Put a checkpoint back; returns its step, the seconds of each step, the passes and the best validation so far."""
    keys = {"trained", "optimizer", "recipe", "step", "seconds", "passes", "best"}
    saved = load(path, keys, next(model.parameters()).device)
    with reading(path):
        then = dict(saved["recipe"])
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        check_fit("its numbers", {name: p.shape for name, p in trained.items()}, saved["trained"])
    changes = [f"{k.replace('_', '-')} was {then.get(k)}, is {v}" for k, v in recipe.items() if then.get(k) != v]
    if changes:
        raise ValueError(f"{path} is of another run ({'; '.join(changes)}): give its options, or another --out")
    with reading(path), torch.no_grad():
        for name, p in trained.items():
            p.copy_(saved["trained"][name])
        optimizer.load_state_dict(saved["optimizer"])
        return int(saved["step"]), list(saved["seconds"]), int(saved["passes"]), list(saved["best"])


def pretrained(config: GPTConfig, data: Tensor, args: argparse.Namespace) -> tuple[GPT, str]:
    """The base and its file name, made of all that shapes the base, so that only an equal one is reused."""
    recipe = [asdict(config), args.pretrain_steps, args.pretrain_lr, args.batch_size, args.grad_accum, args.warmup]
    recipe += [args.weight_decay, args.clip, args.dtype, args.world, hashlib.sha256(data.numpy().tobytes()).hexdigest()]
    checkpoint = checkpoint_path("pre-train", 0, args)
    path = args.out / f"base-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]}.pt"
    if path.exists():
        print(f"base: {path}")
        checkpoint.unlink(missing_ok=True)  # left by a kill just after the base was saved
        return load_base(path, args.device), path.name
    torch.manual_seed(0)
    model = GPT(config).to(args.device)
    train(model, "full", data, args.pretrain_steps, args.pretrain_lr, 0, args, "pre-train")
    save(path, {"config": asdict(config), "model": model.state_dict()}, args)
    checkpoint.unlink(missing_ok=True)
    print(f"base: {path}, pre-trained")
    return model, path.name


def finetune(base: GPT, title: str, data: dict[str, Tensor], seed: int, args: argparse.Namespace) -> tuple[GPT, Any]:
    """One fine-tuned copy of the base, in evaluation mode, and what the table says of it."""
    method = args.method
    torch.manual_seed(seed)  # the same adapters for every method
    # Adapters stand on the base itself, not on a copy: its weights are never written.
    model = copy.deepcopy(base, {} if method == "full" else {id(p): p for p in base.parameters()})
    if method == "full":
        model.requires_grad_(True)
    else:
        inject_lora(model, args.r, args.alpha, args.lora_dropout, TARGETS)
    peak_lr = args.full_lr if method == "full" else args.lr
    cost = train(model, method, data["train"], args.steps, peak_lr, seed, args, title, data["val"])
    result = {"method": title, "seed": seed, **cost, **measure(model, data, args)}
    if args.gradient_draws and method == "flat":
        shape = (args.gradient_draws, args.grad_accum, args.batch_size)
        places = starting_places(data["train"], shape, seed, args)
        steps = [[windows(data["train"], at, args.block_size, args.device) for at in step] for step in places]
        result["grad_noise"] = gradient_noise(model, make_loss_fn(args), steps, args, seed)
    return model, result


def measure(model: nn.Module, data: dict[str, Tensor], args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    splits = ["val"] if args.tune else [name for name in ("train", "val", "test", "ood") if name in data]
    for name in tqdm(splits, desc="evaluate", leave=False):
        result[f"{name}_loss"] = evaluate(model, data[name], args)
        if name in args.tokens_a_byte:
            result[f"{name}_bits"] = result[f"{name}_loss"] / math.log(2) * args.tokens_a_byte[name]
    if args.tune or not args.sharpness_samples:
        return result
    # A model without adapters gets a copy with B = 0: W' = W, and the factors say nothing.
    adapted = bool([name for name, _ in model.named_parameters() if name.endswith("lora_B")])
    model = model if adapted else inject_lora(copy.deepcopy(model), 1, targets=TARGETS)
    starts = torch.arange(0, len(data["train"]) - args.block_size, args.block_size)
    starts = starts[:: max(1, len(starts) // 64)]  # 64 windows or a few more
    size = min(len(starts), at_once(model, args))
    starts = starts[: len(starts) // size * size]  # equal parts, as the measure takes the mean over them
    batches = [windows(data["train"], part, args.block_size, args.device) for part in starts.split(size)]
    for space in ("lora", "full"):
        if not adapted and space == "lora":
            continue
        loss_fn, samples = make_loss_fn(args), args.sharpness_samples
        rise = [sharpness(model, loss_fn, batches, sigma, samples, 0, space) for sigma in args.sharpness_sigma]
        result |= {f"sharp_{space}": rise[0], f"landscape_{space}": dict(zip(map(str, args.sharpness_sigma), rise))}
    return result


# ---- Command line --------------------------------------------------------------------------------------------


def show_samples(
    models: dict[str, GPT], prompt: Sequence[int], decode: Callable[[Sequence[int]], bytes], args: argparse.Namespace
) -> dict[str, str]:
    samples = {}
    for name, model in models.items():
        tokens = generate(model, prompt, args.length, args.temperature, args.top_k, seed=0)
        samples[name] = decode([*prompt, *tokens]).decode(errors="replace")
        print(f"\n---- {name} " + "-" * (74 - len(name)) + f"\n{samples[name]}")
    return samples


def sample(args: argparse.Namespace) -> None:
    """--sample: text from a saved adapter on the base that it was trained on, or on --init where that has moved."""
    if args.adapter is None or not args.prompt:
        raise ValueError("--sample needs --adapter FILE and --prompt TEXT, the text not empty")
    content = load(args.adapter, {"base", "r", "alpha", "adapters"}, args.device)
    with reading(args.adapter):
        init = args.init or (None if content["base"].endswith(".pt") else content["base"])
    if init:
        model = load_gpt2(init, gpt2_config(init, 0.0), args.device)
    else:
        model = load_base(args.adapter.parent / content["base"], args.device)
    encode, decode = tokenizer(init)
    with reading(args.adapter):
        inject_lora(model, content["r"], content["alpha"], targets=TARGETS)
        load_lora_state_dict(model, content["adapters"])
    show_samples({args.adapter.stem: model}, encode(args.prompt.encode()), decode, args)


def compare(args: argparse.Namespace, own: dict[str, argparse.Namespace]) -> None:
    if args.init:
        config = gpt2_config(args.init, args.dropout)
    else:
        config = GPTConfig(args.n_layer, args.n_head, args.n_embd, args.block_size, dropout=args.dropout)
    if args.block_size > config.block_size:
        raise ValueError(f"--block-size must be at most the model's {config.block_size}, got {args.block_size}")
    for options in [args, *own.values()]:
        with torch.device("meta"):  # bad sizes end here, before the work
            inject_lora(GPT(config), options.r, options.alpha, options.lora_dropout, TARGETS)
        sigma_at(0, options.steps, options.sigma, options.schedule)
    # --data stands without a tokenizer, as long as no other text comes in and none is to come out.
    text = not (args.init and args.data) or args.ood or args.prompt
    encode, decode = tokenizer(args.init) if text else (list, None)
    data = load_data(args, config.vocab_size, encode)
    args.out.mkdir(parents=True, exist_ok=True)
    if not os.access(args.out, os.W_OK):
        raise ValueError(f"--out must be a folder that can be written, got {args.out}")
    if args.init:
        base, base_name = load_gpt2(args.init, config, args.device), args.init
    else:
        base, base_name = pretrained(config, data["pretrain"], args)
    titles = ["base", *own]
    baseline = {} if args.tune else measure(base, data, args)
    runs: list[dict[str, Any]] = []
    models = {"base": base}
    for seed in range(args.seeds):
        if not args.tune:
            runs.append({"method": "base", "seed": seed, **baseline})
        for title, options in own.items():
            options.tokens_a_byte = args.tokens_a_byte
            model, result = finetune(base, title, data, seed, options)
            runs.append(result)
            if seed == 0 and not args.tune:
                models[title] = model
                if options.method != "full":
                    content = {"base": base_name, "r": options.r, "alpha": options.alpha}
                    content["adapters"] = lora_state_dict(model)
                    save(args.out / f"{file_name(title)}.pt", content, args)
                    if args.peft and args.rank == 0:
                        save_peft(model, args.out / file_name(title), args.init, fan_in_fan_out=True)
    if args.rank:
        return
    settings = {key: str(value) for key, value in vars(args).items()}
    found: dict[str, Any] = {"config": settings, "environment": environment(), "runs": runs}
    if args.tune:
        print(f"\n{choice(runs, titles[1:], 'val_loss', 4)}")
    else:
        found["summary"] = report(runs, titles, METRICS, PAIRED, BRIEF)
    if decode and not args.tune:
        print("\nText as each model goes on (seed 0):")
        prompt = encode(args.prompt.encode()) if args.prompt else data["test"][:64].tolist()
        found["samples"] = show_samples(models, prompt, decode, args)
    write_json(args.out / "results.json", found)
    for title in titles:
        for seed in range(args.seeds):
            checkpoint_path(title, seed, args).unlink(missing_ok=True)
    print(f"\nAll numbers: {args.out / 'results.json'}" + ("" if args.tune else f"; adapters: {args.out}/METHOD.pt"))


def main() -> None:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__, formatter_class=shape)
    add = parser.add_argument_group("what to run").add_argument
    words = f"any of {', '.join(METHODS)}, also as METHOD:OPTION=VALUE,... with its own fine-tuning options "
    add("--methods", nargs="+", default=["lora", "flat", "sam"], metavar="METHOD", help=words + "(lora flat sam)")
    add("--seeds", type=int, default=1, help="runs of each method; two or more give intervals (1)")
    add("--tune", action="store_true", help="only validation losses, and the best settings of each method")
    add("--device", default="auto", help="cpu, cuda or auto (auto)")
    add("--dtype", help="float32, or bfloat16 for autocast (float32; with --init on a GPU bfloat16)")
    add("--out", type=Path, default=Path("out"), help="folder for base, adapters and results.json (out)")
    add("--resume", action="store_true", help="go on from the checkpoints of a stopped run with the same options")
    add("--checkpoint-every", type=int, default=50, help="steps between checkpoints; Ctrl-C takes one too (50)")
    add = parser.add_argument_group("data").add_argument
    add("--text", type=Path, nargs="+", metavar="FILE", help="fine-tune on these (sources of the email package)")
    add("--ood", type=Path, nargs="+", metavar="FILE", help="out-of-domain test (sources of the asyncio package)")
    add("--pretrain-text", type=Path, nargs="+", metavar="FILE", help="pre-train on these (the reference of help())")
    add("--data", type=Path, metavar="DIR", help="tokens in nanoGPT's train.bin and val.bin (half of val is the test)")
    add("--train-bytes", type=int, help="use at most so much of the training split (30000, or all of --text)")
    add("--eval-windows", type=int, default=400, help="at most so many contexts a split in an evaluation (400)")
    own = " ".join(f"--{key} {value}".replace("_", "-") for key, value in list(INIT_DEFAULTS.items())[1:])
    words = textwrap.fill(f"With --init other defaults hold: --methods flat {own}.", 76)
    add = parser.add_argument_group("a released model", words).add_argument
    add("--init", metavar="MODEL", help=f"{', '.join(RELEASED)}, or a folder with its files, instead of pre-training")
    add("--peft", action="store_true", help="also write each adapter for Hugging Face's PEFT, in OUT/METHOD")
    add = parser.add_argument_group("model and pre-training").add_argument
    add("--n-layer", type=int, default=4, help="blocks (4)")
    add("--n-head", type=int, default=4, help="attention heads (4)")
    add("--n-embd", type=int, default=128, help="width (128)")
    add("--block-size", type=int, default=64, help="context in tokens (64)")
    add("--dropout", type=float, default=0.0, help="of the model (0)")
    add("--pretrain-steps", type=int, default=1200, help="optimizer steps (1200)")
    add("--pretrain-lr", type=float, default=3e-3, help="peak learning rate (3e-3)")
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--steps", type=int, default=300, help="optimizer steps (300)")
    add("--batch-size", type=int, default=16, help="windows a micro-batch (16)")
    add("--grad-accum", type=int, default=1, help="micro-batches a step (1)")
    add("--lr", type=float, default=1.5e-3, help="peak learning rate of the adapters (1.5e-3)")
    add("--full-lr", type=float, default=1e-3, help="of the method full (1e-3)")
    add("--warmup", type=int, default=20, help="steps of linear warm-up (20)")
    add("--weight-decay", type=float, default=0.0, help="AdamW's (0)")
    add("--clip", type=float, default=1.0, help="largest gradient norm (1)")
    add("--eval-interval", type=int, default=0, help="steps between evaluations on validation data (0: none)")
    add("--r", type=int, default=16, help="rank of the adapters (16)")
    add("--alpha", type=float, default=32, help="their scaling is alpha / r (32)")
    add("--lora-dropout", type=float, default=0.0, help="on the input of the adapters (0)")
    add("--sigma", type=float, default=0.2, help="flat: noise strength at the end of the ramp (0.2)")
    add("--schedule", default="cosine", help="flat: the ramp, cosine, linear or constant (cosine)")
    add("--noise", default="rows", help=f"flat: the law, {', '.join(NOISE)} (rows)")
    add("--draws", default="window", help=f"flat: one eps for {', '.join(DRAWS)} (window)")
    add("--low-memory", action="store_true", help="flat: no copy of the noisy weights, but noise made at each use")
    add("--rho", type=float, default=0.2, help="sam: radius on (A, B) (0.2)")
    add("--rho-full", type=float, default=0.05, help="sam-full: radius on the merged weight (0.05)")
    words = "noise strengths of the sharpness measure, the first for the table (0.1)"
    add("--sharpness-sigma", type=float, nargs="+", default=[0.1], metavar="SIGMA", help=words)
    add("--sharpness-samples", type=int, default=8, help="its draws, 0 to leave it out (8)")
    add("--gradient-draws", type=int, default=0, help="draws to measure the gradient's noise with; 0: not (0)")
    add = parser.add_argument_group("text from the models").add_argument
    add("--sample", action="store_true", help="only generate, from --adapter")
    add("--adapter", type=Path, metavar="FILE", help="adapter file that a run saved; its base lies beside it")
    add("--prompt", help="what to continue (the start of the test split)")
    add("--length", type=int, default=200, help="tokens to generate (200)")
    add("--temperature", type=float, default=0.7, help="below 1 plays safe (0.7)")
    add("--top-k", type=int, default=40, help="draw among the k likeliest (40)")
    if parser.parse_known_args()[0].init:
        parser.set_defaults(**INIT_DEFAULTS, **dict.fromkeys(FIXED_BY_INIT))
    args = parser.parse_args()
    try:
        check(args)
        entries = variants(parser, args, METHODS, VARIABLE)
        for options in entries.values():
            check_ranges(options)
        sample(args) if args.sample else compare(args, entries)
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        raise SystemExit(f"train_gpt2.py: {error}") from None
    except KeyboardInterrupt:
        print("\ntrain_gpt2.py: stopped; the same command with --resume goes on", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if dist.is_initialized():
            gc.collect()  # a DistributedDataParallel still alive keeps gloo's threads, which must not outlive Python
            dist.destroy_process_group()


def check(args: argparse.Namespace) -> None:
    """The options that nothing else checks; turns --device into a torch.device."""
    check_ranges(args)
    if args.init and any(getattr(args, name) is not None for name in FIXED_BY_INIT):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in FIXED_BY_INIT)
        raise ValueError(f"--init brings a trained model: it goes without {options}")
    if args.data and (args.text or args.train_bytes):
        raise ValueError("--data stands in place of --text and --train-bytes: give one of them")
    if args.peft and not args.init:
        raise ValueError("--peft needs --init, the model on which PEFT is to load the adapters")
    if not args.init and args.n_embd % args.n_head:
        raise ValueError(f"--n-embd must be a multiple of --n-head = {args.n_head}, got {args.n_embd}")
    if args.dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"--dtype must be float32 or bfloat16, got {args.dtype!r}")
    if args.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or auto, got {args.device!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    args.device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    if args.world > 1:
        if args.device.type == "cuda":
            args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    if args.rank:  # only the first process writes and speaks
        sys.stdout = io.StringIO()
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    args.dtype = args.dtype or ("bfloat16" if args.init and args.device.type == "cuda" else "float32")


def check_ranges(args: argparse.Namespace) -> None:
    """The numbers that nothing else checks."""
    counts = ["seeds", "train_bytes", "eval_windows", "n_layer", "n_head", "n_embd", "block_size", "pretrain_steps"]
    counts += ["steps", "batch_size", "grad_accum", "length", "top_k", "checkpoint_every"]
    positive = ["pretrain_lr", "lr", "full_lr", "clip", "temperature"]
    natural = ["warmup", "weight_decay", "rho", "rho_full", "sharpness_samples", "eval_interval"]
    for names, holds, words in (
        (counts, lambda v: v >= 1, "at least 1"),
        (positive, lambda v: 0 < v < math.inf, "above 0 and finite"),
        (natural, lambda v: 0 <= v < math.inf, "at least 0 and finite"),
        (["dropout"], lambda v: 0 <= v < 1, "at least 0 and below 1"),
    ):
        for name in names:
            value = getattr(args, name)
            if value is not None and not holds(value):
                raise ValueError(f"--{name.replace('_', '-')} must be {words}, got {value}")
    check_shared(args)


if __name__ == "__main__":
    main()
