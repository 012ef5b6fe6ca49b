"""Fine-tune a GPT-2 with LoRA, Flat-LoRA and SAM, and compare the three.

    python train_gpt2.py                            # offline, a small GPT-2
    python train_gpt2.py --text my.txt              # your own text
    python train_gpt2.py --init gpt2 --text my.txt  # needs transformers
    torchrun --nproc-per-node 2 -- train_gpt2.py    # two processes

Without --init a small GPT-2, whose tokens are bytes, is pre-trained on the text
of Python's help(). Each method fine-tunes it on source code of the package
email. For a given seed, all methods start from the same adapters and see the
same batches. To resume a stopped run, repeat its command. A finished run is
reused as long as the code, the text and its training options are unchanged.

The .pt files in --out hold "model", "optimizer" and the "losses" of all steps.
The "model" of an adapter comes from flatlora.lora_state_dict. To load it, with
the --r of its run (by default 8 with --init, else 16):

    model = GPT.from_pretrained("gpt2")
    flatlora.inject_lora(model, r=8, targets=TARGETS)
    saved = torch.load("out/flat-0-....pt", map_location="cpu")
    flatlora.load_lora_state_dict(model, saved["model"])

Without --init, build the model with
    GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64))
and, before adding the adapters, load the "model" of out/base-0-....pt into it.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import io
import json
import math
import os
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.optim import AdamW
from tqdm import tqdm

import flatlora

METHODS = ["lora", "flat", "sam"]
MUST_MATCH_GPT2 = ["model_type", "activation_function", "layer_norm_epsilon", "tie_word_embeddings"]
MUST_MATCH_GPT2 += ["scale_attn_weights", "scale_attn_by_inverse_layer_idx"]
TARGETS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
CHECKPOINT_SECONDS = 30.0
SAMPLE_LENGTH = 200

WORLD = int(os.environ.get("WORLD_SIZE", 1))  # the number of processes, set by torchrun, like RANK
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0

progress_bar = partial(tqdm, leave=False, disable=RANK > 0)

# Read at startup, since the files may be edited during a run.
CODE = [Path(file).read_text("utf-8") for file in (__file__, flatlora.__file__)]

Batch = tuple[Tensor, Tensor]  # inputs and targets, (B, T) each
Data = dict[str, Tensor]


class UsageError(ValueError):
    """Unusable input or options. The script prints the message on one line and exits."""


# ---- The model -----------------------------------------------------------------------------------------------
@dataclass
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int  # the longest context, in tokens
    vocab_size: int = 256


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        n = config.n_embd
        self.n_head = config.n_head
        self.c_attn = nn.Linear(n, 3 * n)
        self.c_proj = nn.Linear(n, n)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        n = config.n_embd
        self.c_fc = nn.Linear(n, 4 * n)
        self.c_proj = nn.Linear(4 * n, n)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, 4C)
        x = F.gelu(x, approximate="tanh")  # OpenAI's form of GELU, not erf
        return self.c_proj(x)  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2, structured like https://github.com/karpathy/nanoGPT, with Hugging Face's parameter names."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        n = config.n_embd
        parts = {"wte": nn.Embedding(config.vocab_size, n), "wpe": nn.Embedding(config.block_size, n)}
        parts["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        parts["ln_f"] = nn.LayerNorm(n)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(n, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "c_proj" in name:  # smaller, since each block adds to the residual stream twice
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T, vocab_size)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)  # (T,)
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](positions)  # (B, T, C)
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))

    @classmethod
    def from_pretrained(cls, name: str) -> GPT:
        """The weights of "gpt2" to "gpt2-xl", or those in a folder, through transformers.

        UsageError: the model is not a GPT-2, does not compute the same as this class, or lacks a weight.
        """
        from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

        c = AutoConfig.from_pretrained(name)
        for key in MUST_MATCH_GPT2:
            expected = getattr(GPT2Config(), key)
            if getattr(c, key, None) != expected:
                raise UsageError(f"{name} differs from OpenAI's GPT-2: its {key} is not {expected!r}")
        theirs, info = GPT2LMHeadModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"]:
            raise UsageError(f"{name} lacks weights: {sorted(info['missing_keys'])}")

        state = theirs.state_dict()
        for key, weight in state.items():
            if key.endswith(tuple(f"{target}.weight" for target in TARGETS)):
                state[key] = weight.t().contiguous()  # Hugging Face's Conv1D holds it transposed
        config = GPTConfig(c.n_layer, c.n_head, c.n_embd, c.n_positions, c.vocab_size)
        with torch.device("meta"):  # takes no memory; the weights are assigned below
            model = cls(config)
        model.load_state_dict(state, assign=True)
        model.lm_head.weight = model.transformer["wte"].weight
        return model

    @torch.no_grad()
    def generate(self, tokens: list[int], length: int, temperature: float = 0.7) -> list[int]:
        """The tokens, then `length` sampled ones. The sampling seed is fixed, so every call gives the same text."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(length):
            context = torch.tensor([tokens[-self.config.block_size :]])  # (1, T)
            logits = self(context.to(self.lm_head.weight.device))[0, -1]  # (vocab_size,)
            probs = (logits.float().cpu() / temperature).softmax(0)
            choice = torch.multinomial(probs, 1, generator=generator)
            tokens = [*tokens, choice.item()]
        return tokens


# ---- Data ----------------------------------------------------------------------------------------------------
def encode(tokenizer: Any, text: bytes) -> list[int]:
    """Token ids, by a tokenizer of transformers. Without one, a token is a byte."""
    if tokenizer is None:
        return list(text)
    words = text.decode(errors="ignore")  # a cut may have halved a character
    return tokenizer.encode(words, add_special_tokens=False)


def decode(tokenizer: Any, tokens: list[int]) -> str:
    if tokenizer is None:
        return bytes(tokens).decode(errors="replace")
    return tokenizer.decode(tokens)


def package_sources(name: str, size: int = 1000) -> list[bytes]:
    """`size` bytes of each file of a standard-library package, skipping the first 2,000 (licence and imports)."""
    folder = Path(importlib.import_module(name).__path__[0])
    return [path.read_bytes()[2000 : 2000 + size] for path in sorted(folder.glob("*.py"))]


def read_files(paths: list[Path]) -> list[bytes]:
    files = [path.read_bytes() for path in paths]
    for path, content in zip(paths, files):
        try:
            content.decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not in UTF-8: {error}") from None
    return files


def split(files: list[bytes]) -> dict[str, bytes]:
    """Split each file: three fifths for training, one for validation and one for the test."""
    parts = {"train": b"", "val": b"", "test": b""}
    for content in files:
        a = 3 * len(content) // 5
        b = 4 * len(content) // 5
        parts["train"] += content[:a]
        parts["val"] += content[a:b]
        parts["test"] += content[b:]
    return parts


def load_data(args: Namespace, tokenizer: Any) -> Data:
    """Token ids (N,) of "train", "val" and "test", and of another text, "ood"."""
    files = read_files(args.text) if args.text else package_sources("email")
    others = read_files(args.ood) if args.ood else package_sources("asyncio")
    texts = split(files)
    texts["ood"] = b"".join(others)

    data = {}
    for name, text in texts.items():
        ids = encode(tokenizer, text)
        if len(ids) <= args.block_size:
            raise UsageError(f"the {name} text needs more than {args.block_size} tokens (--block-size), got {len(ids)}")
        data[name] = torch.tensor(ids, dtype=torch.int32)
    return data


def get_batch(data: Tensor, starts: np.ndarray, block_size: int, device: str) -> Batch:
    """The windows that begin at `starts`, and their next tokens: (B, T), (B, T)."""
    index = torch.from_numpy(starts)[:, None] + torch.arange(block_size + 1)  # (B, T + 1)
    tokens = data[index].long().to(device)
    return tokens[:, :-1], tokens[:, 1:]


# ---- Training ------------------------------------------------------------------------------------------------
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


def train(model: GPT, method: str, data: Tensor, args: Namespace, seed: int, file: Path) -> None:
    """Train the adapters in place or, if the method is "base", all weights.

    The file is written twice a minute, and a stopped run resumes from it. (seed, step, rank) determines all random
    numbers of a step. So a resumed run equals one that was never stopped, and all methods see the same batches.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(parameters, args.lr, (0.9, 0.95), weight_decay=0.0)
    losses: list[float] = []
    if file.exists():
        saved = torch.load(file, map_location="cpu")
        if method == "base":
            model.load_state_dict(saved["model"])
        else:
            flatlora.load_lora_state_dict(model, saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses = saved["losses"]
        say(f"reusing {file}: {len(losses)} of {args.steps} steps are done")

    net = model.train()
    if WORLD > 1:
        net = nn.parallel.DistributedDataParallel(model)  # the gradient is the mean over the processes
    loss_of = partial(loss_fn, dtype=args.dtype)
    saved_at = time.monotonic()
    first = len(losses)
    bar = progress_bar(range(first, args.steps), file.stem, initial=first, total=args.steps)
    for step in bar:
        rng = np.random.default_rng([seed, step, RANK])
        starts = rng.integers(len(data) - args.block_size, size=(args.grad_accum, args.batch_size))
        batches = [get_batch(data, row, args.block_size, args.device) for row in starts]
        torch.manual_seed(int(rng.integers(2**63)))  # for dropout
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, args.lr)

        if method == "sam":  # two passes: the gradient at the worst A and B nearby
            loss = flatlora.sam_step(net, loss_of, batches, optimizer, args.rho, max_grad_norm=1.0)
        else:  # LoRA and Flat-LoRA differ by the noise alone
            noise = nullcontext()
            if method == "flat":
                sigma = flatlora.sigma_at(step, args.steps, args.sigma)
                noise = flatlora.perturbed(net, sigma, seed=(seed, step, RANK))
            optimizer.zero_grad()
            with noise:
                loss = flatlora.add_gradient(net, loss_of, batches)
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            flatlora.finite("norm of the gradient", norm)
            optimizer.step()
        losses.append(loss)
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

        if step + 1 == args.steps or time.monotonic() > saved_at + CHECKPOINT_SECONDS:
            state = model.state_dict() if method == "base" else flatlora.lora_state_dict(model)
            buffer = io.BytesIO()  # torch.save to a full disk would raise a RuntimeError
            torch.save({"model": state, "optimizer": optimizer.state_dict(), "losses": losses}, buffer)
            write(file, buffer.getvalue())
            saved_at = time.monotonic()
    model.eval()


def write(path: Path, content: bytes) -> None:
    """By the first process only. After a kill or a full disk, the file is the old one or the complete new one."""
    if RANK > 0:
        return
    new = path.with_name(f".writing-{os.getpid()}")
    try:
        new.write_bytes(content)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def say(line: str) -> None:
    """Print a line above the progress bar, from the first process only."""
    if RANK == 0:
        tqdm.write(line, file=sys.stderr)


# ---- Losses, sharpness and their table -----------------------------------------------------------------------
def eval_batches(data: Tensor, limit: int, args: Namespace) -> list[Batch]:
    """At most `limit` windows, evenly spread and without overlap. Those that fill no batch are dropped."""
    starts = np.arange(0, len(data) - args.block_size, args.block_size)  # (N,)
    starts = starts[:: math.ceil(len(starts) / limit)]
    size = min(args.batch_size, len(starts))
    rows = starts[: len(starts) // size * size].reshape(-1, size)
    return [get_batch(data, row, args.block_size, args.device) for row in rows]


@torch.no_grad()
def evaluate(model: GPT, data: Data, args: Namespace) -> dict[str, float]:
    """The losses and, for a model with adapters, the rise of the training loss under noise of sigma 0.1."""
    bar = progress_bar(desc="evaluation", unit=" batches")

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        bar.update()
        return loss_fn(model, batch, args.dtype)

    result = {}
    for name in ("val", "test", "ood"):
        batches = eval_batches(data[name], args.eval_windows, args)
        result[f"{name}_loss"] = fmean(loss_of(model, batch).item() for batch in batches)
    if any("lora_A" in name for name, _ in model.named_parameters()):
        batches = eval_batches(data["train"], min(args.eval_windows, 64), args)
        result["sharpness"] = flatlora.sharpness(model, loss_of, batches, sigma=0.1, samples=4, seed=0)
    bar.close()
    return result


# 97.5 % points of Student's t for n = 2 to 10. For more values the last is used, which is up to 15 % too large.
T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]


def report(runs: list[dict[str, Any]], test_tokens: int) -> str:
    """One row per method: means over the seeds, and the paired difference from LoRA's test loss."""
    lines = ["        validation        test  other text   sharpness   test loss - lora's"]
    lora = [run["test_loss"] for run in runs if run["method"] == "lora"]
    for method in dict.fromkeys(run["method"] for run in runs):
        method_runs = [run for run in runs if run["method"] == method]
        n = len(method_runs)
        line = f"{method:6}"
        for key in ("val_loss", "test_loss", "ood_loss", "sharpness"):
            cell = "-"
            if key in method_runs[0]:  # the base has no sharpness
                cell = f"{fmean(run[key] for run in method_runs):.4f}"
            line += f"{cell:>12}"
        if lora and n > 1 and method != "lora":
            gaps = [run["test_loss"] - other for run, other in zip(method_runs, lora)]
            half = T975[min(n, 10) - 2] * stdev(gaps) / math.sqrt(n)
            line += f"   {fmean(gaps):+.4f} +- {half:.4f}"
        lines.append(line)

    lines.append(f"Seeds: {n}; base models: 1; test tokens: {test_tokens:,}.")
    if n > 1:
        lines.append("The 95 % intervals cover the seeds only.")
    return "\n".join(lines)


# ---- Command line --------------------------------------------------------------------------------------------
OPTIONS = {  # default, default with --init, meaning
    "seeds": (3, 1, "runs of each method, at least two for intervals"),
    "steps": (180, 180, "optimizer steps"),
    "lr": (1.5e-3, 2e-4, "peak learning rate"),
    "batch_size": (8, 4, "windows per micro-batch"),
    "grad_accum": (1, 4, "micro-batches per step and process: more processes make a larger batch"),
    "block_size": (64, 256, "tokens per window"),
    "r": (16, 8, "rank of the adapters"),
    "alpha": (32.0, 16.0, "scaling of the adapters is alpha / r"),
    "lora_dropout": (0.0, 0.0, "dropout on the input of the adapters"),
    "sigma": (0.2, 0.05, "flat: noise at the last step"),
    "rho": (0.2, 0.05, "sam: radius"),
    "eval_windows": (200, 32, "windows of each text in an evaluation"),
    "n_layer": (4, 4, "blocks of the small GPT-2"),
    "n_embd": (128, 128, "width of the small GPT-2; heads have 32 channels if that divides it"),
    "pretrain_steps": (1100, 1100, "optimizer steps of its pre-training"),
}


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.usage = "%(prog)s [options]"
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="lora, flat, sam (all; with --init no sam)")
    add("--text", type=Path, nargs="+", metavar="FILE", help="fine-tune on these (sources of the package email)")
    add("--ood", type=Path, nargs="+", metavar="FILE", help="another text to test on (sources of asyncio)")
    add("--init", metavar="MODEL", help="gpt2 to gpt2-xl or a folder, instead of the small GPT-2")
    add("--prompt", default="def ", help="prompt of the two sample texts at the end (%(default)r)")
    add("--out", type=Path, default=Path("out"), help="folder for runs and results (%(default)s)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16 means autocast (%(default)s)")
    for name, (small, large, meaning) in OPTIONS.items():
        shown = f"{small}" if small == large else f"{small}; with --init {large}"
        add(f"--{name.replace('_', '-')}", type=type(small), metavar="N", help=f"{meaning} ({shown})")

    args = parser.parse_args()
    default = ["lora", "flat"] if args.init else METHODS  # with a large model, SAM takes long
    args.methods = list(dict.fromkeys(args.methods or default))  # each once
    args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    for name, (small, large, _) in OPTIONS.items():
        value = getattr(args, name)
        if value is None:
            value = large if args.init else small
            setattr(args, name, value)
        low = 1 if type(small) is int else 0
        high = 0.99 if name == "lora_dropout" else 10**6
        if not low <= value <= high:
            raise UsageError(f"--{name.replace('_', '-')} must be from {low} to {high}, got {value}")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def digest(*parts: Any) -> str:
    """Hash of the code, torch version, process count and the parts: tensors by value, other parts by their text."""
    total = hashlib.sha256(f"{CODE} {torch.__version__} {WORLD}".encode())
    for part in parts:
        if isinstance(part, Tensor):
            total.update(part.detach().cpu().numpy().tobytes())
            part = part.shape
        total.update(f"{part} ".encode())
    return total.hexdigest()[:8]


def run_file(args: Namespace, method: str, seed: int, *parts: Any) -> Path:
    """The file of a run. Its name holds a digest of the given parts and of the options that affect this training."""
    names = ["steps", "lr", "batch_size", "grad_accum", "block_size", "dtype"]
    if method != "base":
        names += ["r", "alpha", "lora_dropout"]
    names += {"flat": ["sigma"], "sam": ["rho"]}.get(method, [])
    options = [getattr(args, name) for name in names]
    return args.out / f"{method}-{seed}-{digest(options, *parts)}.pt"


def load_base(args: Namespace) -> GPT:
    """The model of --init, or a small GPT-2 after its pre-training."""
    if args.init:
        base = GPT.from_pretrained(args.init)
        longest = base.config.block_size
        if args.block_size > longest:
            raise UsageError(f"--block-size must be at most {longest} for this model, got {args.block_size}")
        return base.to(args.device)

    torch.manual_seed(0)
    heads = args.n_embd // math.gcd(args.n_embd, 32)
    config = GPTConfig(args.n_layer, heads, args.n_embd, args.block_size)
    base = GPT(config).to(args.device)
    text = "\n\n".join(topics[key] for key in sorted(topics))
    data = torch.tensor(encode(None, text.encode()), dtype=torch.int32)
    base_args = copy.copy(args)
    base_args.steps, base_args.lr, base_args.grad_accum = args.pretrain_steps, 3e-3, 1
    file = run_file(base_args, "base", 0, config, *base.parameters(), data)
    train(base, "base", data, base_args, 0, file)
    return base


def compare(args: Namespace) -> None:
    """Fine-tune with each method and seed, measure, write the results and print them."""
    tokenizer = None
    if args.init:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.init, model_max_length=10**9)  # no warning about long texts
    data = load_data(args, tokenizer)  # before minutes of pre-training, so that a missing text is reported first
    base = load_base(args)
    start = digest(base.config, *base.parameters(), data["train"], data["val"], data["test"])

    runs = [{"method": "base", "seed": 0, **evaluate(base, data, args)}]
    models = {"base": base}  # of the first seed, for the sample texts
    files = []
    for seed in range(args.seeds):
        for method in args.methods:
            torch.manual_seed(seed)  # the same initial adapters for every method
            # The second argument keeps the weights from being copied, so that all models share those of the base.
            model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
            flatlora.inject_lora(model, args.r, args.alpha, args.lora_dropout, targets=TARGETS)
            file = run_file(args, method, seed, start)
            train(model, method, data["train"], args, seed, file)
            run = {"method": method, "seed": seed, **evaluate(model, data, args)}
            say(f"{method}, seed {seed}: test loss {run['test_loss']:.4f}")
            runs.append(run)
            models.setdefault(method, model)
            files.append(file.name)
    if RANK > 0:
        return

    tested = min(len(data["test"]), args.eval_windows * args.block_size)
    text = report(runs, tested)
    content = {"torch": torch.__version__, "options": vars(args), "runs": runs, "report": text}
    fingerprint = digest(files, args.eval_windows, data["ood"])
    results = args.out / f"results-{'-'.join(args.methods)}-{args.seeds}-{fingerprint}.json"
    write(results, json.dumps(content, indent=1, default=str).encode())
    print(f"{text}\n\nNumbers: {results}\nAdapters: the .pt files beside it")
    prompt = encode(tokenizer, (args.prompt or "\n").encode())
    for name in ("base", "flat" if "flat" in models else args.methods[-1]):
        sample = models[name].generate(prompt, SAMPLE_LENGTH)
        print(f"\n{name} writes:\n{decode(tokenizer, sample)}")


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # not in Jupyter
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character must not end a run
    try:
        args = parse_args()
        if WORLD > 1:
            distributed.init_process_group()
        compare(args)
    except (UsageError, OSError, FloatingPointError) as error:
        words = " ".join(str(error).split())
        raise SystemExit(f"train_gpt2.py: {words}") from None
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        raise SystemExit("train_gpt2.py: out of memory, try a smaller --batch-size") from None
    except KeyboardInterrupt:
        raise SystemExit("\ntrain_gpt2.py: stopped, run the same command to resume") from None
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    main()
