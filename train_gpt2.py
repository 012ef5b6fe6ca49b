"""Fine-tune a GPT-2 with LoRA, Flat-LoRA and SAM, side by side.

    python train_gpt2.py              # all of it, from nothing: no network, no file
    python train_gpt2.py --seeds 5    # the same with paired 95 % intervals
    python train_gpt2.py --text my.txt --ood other.txt    # your own text
    python train_gpt2.py --sample --adapter out/flat.pt --prompt "def "

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
import hashlib
import importlib.util
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from flatlora import (
    flat_lora_step,
    inject_lora,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    sam_step,
    sharpness,
    sigma_at,
)
from train_toy import environment, report, write_json

TARGETS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
METHODS = ("lora", "flat", "sam", "sam-full", "full")
METRICS = {  # what the table shows: label, digits
    "train_loss": ("train, nats a token", 3),
    "val_loss": ("validation", 3),
    "test_loss": ("test", 3),
    "ood_loss": ("out of domain", 3),
    "test_bits": ("test, bits a byte", 3),
    "ood_bits": ("out of domain", 3),
    "sharp_lora": ("sharpness, LoRA", 3),
    "sharp_full": ("sharpness, full", 3),
    "trainable": ("trained params", 0),
    "passes": ("passes a step", 0),
    "ms": ("ms a step", 0),
    "time": ("time / LoRA's", 2),
}

PAIRED = [key for key in METRICS if key.endswith("loss") or key.startswith("sharp")]  # as differences to LoRA

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
def generate(model: GPT, prompt: bytes, length: int, temperature: float, top_k: int, seed: int) -> bytes:
    """`length` bytes after `prompt`, drawn with a generator of their own."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(length):
        context = torch.tensor([tokens[-model.config.block_size :]], device=device)  # (1, T)
        logits = model(context)[0, -1].float().cpu() / temperature  # (vocab_size,)
        best, ids = logits.topk(min(top_k, len(logits)))
        tokens.append(int(ids[torch.multinomial(best.softmax(0), 1, generator=generator)]))
    return bytes(tokens[len(prompt) :])


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


def load_data(args: argparse.Namespace) -> dict[str, Tensor]:
    """Token ids of "pretrain", "train", "val", "test", "ood", each (N,). Token = byte."""
    texts = split(read_files(args.text) if args.text else package_sources("email", "--text"))
    texts["ood"] = b"".join(read_files(args.ood) if args.ood else package_sources("asyncio", "--ood"))
    texts["pretrain"] = b"".join(read_files(args.pretrain_text)) if args.pretrain_text else english()
    # The built-in text is cut so that it is scarce: with plenty there is nothing to regularise.
    texts["train"] = texts["train"][: args.train_bytes or (None if args.text else 30_000)]
    for name, text in texts.items():
        if len(text) < args.block_size + 1:
            raise ValueError(f"the {name} text is {len(text)} bytes, shorter than --block-size {args.block_size} + 1")
    return {name: torch.tensor(list(text), dtype=torch.uint8) for name, text in texts.items()}


def windows(data: Tensor, starts: Tensor, block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and next-token targets from the given places: (B, T), (B, T)."""
    at = starts[:, None] + torch.arange(block_size + 1)  # (B, T + 1)
    chunk = data[at].to(device).long()  # (B, T + 1)
    return chunk[:, :-1], chunk[:, 1:]


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


def train(
    model: nn.Module,
    method: str,
    data: Tensor,
    steps: int,
    peak_lr: float,
    seed: int,
    args: argparse.Namespace,
    title: str,
) -> dict[str, float]:
    """Train in place: "full" everything, the other methods the adapters. The seed fixes the batches and the noise."""
    loss_fn = make_loss_fn(args)
    passes = 0

    def counted_loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal passes
        passes += 1
        return loss_fn(model, batch)

    parameters = list(model.parameters()) if method == "full" else lora_parameters(model)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    # All starting places at once, from a generator that no method can disturb.
    last = len(data) - args.block_size
    shape = (steps, args.grad_accum, args.batch_size)
    starts = torch.randint(last, shape, generator=torch.Generator().manual_seed(seed))
    model.train()
    seconds, sigma = [], 0.0
    bar = tqdm(range(steps), desc=f"{title}, seed {seed}", leave=False)
    for step in bar:
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak_lr, args.warmup)
        batches = [windows(data, places, args.block_size, args.device) for places in starts[step]]
        begin = time.perf_counter()
        if method in ("sam", "sam-full"):
            space, rho = ("lora", args.rho) if method == "sam" else ("full", args.rho_full)
            loss = sam_step(model, counted_loss_fn, batches, optimizer, rho, space, args.clip)
        else:
            sigma = sigma_at(step, steps, args.sigma, args.schedule) if method == "flat" else 0.0
            keep = not args.low_memory
            loss = flat_lora_step(model, counted_loss_fn, batches, optimizer, sigma, (seed, step), args.clip, keep)
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        if step % 10 == 0:
            bar.set_postfix_str(f"loss {loss:.3f}, sigma {sigma:.3f}")
    model.eval()
    count = sum(p.numel() for p in parameters)
    return {"ms": 1000 * statistics.median(seconds), "passes": passes / (steps * args.grad_accum), "trainable": count}


@torch.no_grad()
def evaluate(model: nn.Module, data: Tensor, args: argparse.Namespace) -> float:
    """Nats a token over windows that do not overlap; --eval-windows of them, evenly spread, where there are more."""
    loss_fn = make_loss_fn(args)
    starts = torch.arange(0, len(data) - args.block_size, args.block_size)  # (N,)
    starts = starts[:: -(-len(starts) // args.eval_windows)]
    parts = [windows(data, part, args.block_size, args.device) for part in starts.split(64)]
    return sum(loss_fn(model, part).item() * len(part[0]) for part in parts) / len(starts)


# ---- Base and adapters ---------------------------------------------------------------------------------------


def save(path: Path, content: dict[str, Any]) -> None:
    """Written beside and renamed, so that a kill at any moment leaves a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def load(path: Path, keys: set[str], device: torch.device) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of this script: {type(error).__name__}") from None
    if not isinstance(content, dict) or content.keys() != keys:
        raise ValueError(f"{path} is not a checkpoint of this script: it must hold {', '.join(sorted(keys))}")
    return content


def load_base(path: Path, device: torch.device) -> GPT:
    content = load(path, {"config", "model"}, device)
    model = GPT(GPTConfig(**content["config"])).to(device)
    model.load_state_dict(content["model"])
    return model.eval()


def pretrained(config: GPTConfig, data: Tensor, args: argparse.Namespace) -> tuple[GPT, Path]:
    """The base and its file. The file is named after all that shapes the base, so that only an equal one is reused."""
    recipe = [asdict(config), args.pretrain_steps, args.pretrain_lr, args.batch_size, args.grad_accum, args.warmup]
    recipe += [args.weight_decay, args.clip, args.dtype, hashlib.sha256(data.numpy().tobytes()).hexdigest()]
    path = args.out / f"base-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]}.pt"
    if path.exists():
        print(f"base: {path}")
        return load_base(path, args.device), path
    torch.manual_seed(0)
    model = GPT(config).to(args.device)
    train(model, "full", data, args.pretrain_steps, args.pretrain_lr, 0, args, "pre-train")
    save(path, {"config": asdict(config), "model": model.state_dict()})
    print(f"base: {path}, pre-trained")
    return model, path


def finetune(base: GPT, method: str, data: dict[str, Tensor], seed: int, args: argparse.Namespace) -> tuple[GPT, Any]:
    """One fine-tuned copy of the base, in evaluation mode, and what the table says of it."""
    torch.manual_seed(seed)  # the same adapters for every method
    model = copy.deepcopy(base)
    if method != "full":
        inject_lora(model, args.r, args.alpha, args.lora_dropout, TARGETS)
    peak_lr = args.full_lr if method == "full" else args.lr
    cost = train(model, method, data["train"], args.steps, peak_lr, seed, args, method)
    return model, {"method": method, "seed": seed, **cost, **measure(model, data, args)}


def measure(model: nn.Module, data: dict[str, Tensor], args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in tqdm(("train", "val", "test", "ood"), desc="evaluate", leave=False):
        result[f"{name}_loss"] = evaluate(model, data[name], args)
        result[f"{name}_bits"] = result[f"{name}_loss"] / math.log(2)  # a token is a byte
    # A model without adapters gets a copy with B = 0: W' = W, and the factors say nothing.
    adapted = bool([name for name, _ in model.named_parameters() if name.endswith("lora_B")])
    model = model if adapted else inject_lora(copy.deepcopy(model), 1, targets=TARGETS)
    starts = torch.arange(0, len(data["train"]) - args.block_size, args.block_size)
    starts = starts[:: max(1, len(starts) // 64)]  # 64 windows or a few more
    batches = [windows(data["train"], starts, args.block_size, args.device)]
    for space in ("lora", "full"):
        rise = sharpness(model, make_loss_fn(args), batches, args.sharpness_sigma, args.sharpness_samples, 0, space)
        result[f"sharp_{space}"] = rise if adapted or space == "full" else None
    return result


# ---- Command line --------------------------------------------------------------------------------------------


def show_samples(models: dict[str, GPT], prompt: bytes, args: argparse.Namespace) -> dict[str, str]:
    samples = {}
    for name, model in models.items():
        text = generate(model, prompt, args.length, args.temperature, args.top_k, seed=0)
        samples[name] = (prompt + text).decode(errors="replace")
        print(f"\n---- {name} " + "-" * (74 - len(name)) + f"\n{samples[name]}")
    return samples


def sample(args: argparse.Namespace) -> None:
    """--sample: text from a saved adapter on the base that it was trained on."""
    if args.adapter is None or not args.prompt:
        raise ValueError("--sample needs --adapter FILE and --prompt TEXT, the text not empty")
    content = load(args.adapter, {"base", "r", "alpha", "adapters"}, args.device)
    model = load_base(args.adapter.parent / content["base"], args.device)
    inject_lora(model, content["r"], content["alpha"], targets=TARGETS)
    load_lora_state_dict(model, content["adapters"])
    show_samples({args.adapter.stem: model}, args.prompt.encode(), args)


def compare(args: argparse.Namespace) -> None:
    config = GPTConfig(args.n_layer, args.n_head, args.n_embd, args.block_size, dropout=args.dropout)
    with torch.device("meta"):  # bad sizes end here, before the work
        inject_lora(GPT(config), args.r, args.alpha, args.lora_dropout, TARGETS)
    sigma_at(0, args.steps, args.sigma, args.schedule)
    data = load_data(args)
    base, path = pretrained(config, data["pretrain"], args)
    methods = ["base", *dict.fromkeys(args.methods)]
    baseline = measure(base, data, args)
    runs: list[dict[str, Any]] = []
    models = {"base": base}
    for seed in range(args.seeds):
        runs.append({"method": "base", "seed": seed, **baseline})
        for method in methods[1:]:
            model, result = finetune(base, method, data, seed, args)
            runs.append(result)
            if seed == 0:
                models[method] = model
                if method != "full":
                    content = {"base": path.name, "r": args.r, "alpha": args.alpha, "adapters": lora_state_dict(model)}
                    save(args.out / f"{method}.pt", content)
        lora_ms = next((run["ms"] for run in runs if run["seed"] == seed and run["method"] == "lora"), None)
        for result in runs:
            if result["seed"] == seed and "ms" in result:
                result["time"] = result["ms"] / lora_ms if lora_ms else None
    summary = report(runs, methods, METRICS, PAIRED)
    print("\nText as each model goes on (seed 0):")
    prompt = args.prompt.encode() if args.prompt else bytes(data["test"][:64].tolist())
    samples = show_samples(models, prompt, args)
    options = {key: str(value) for key, value in vars(args).items()}
    content = {"config": options, "environment": environment(), "summary": summary, "runs": runs, "samples": samples}
    write_json(args.out / "results.json", content)
    print(f"\nAll numbers: {args.out / 'results.json'}; adapters: {args.out}/METHOD.pt")


def main() -> None:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__, formatter_class=shape)
    add = parser.add_argument_group("what to run").add_argument
    add("--methods", nargs="+", default=["lora", "flat", "sam"], choices=METHODS, help="default: lora flat sam")
    add("--seeds", type=int, default=1, help="runs of each method; two or more give intervals (1)")
    add("--device", default="auto", help="cpu, cuda or auto (auto)")
    add("--dtype", default="float32", help="float32, or bfloat16 for autocast (float32)")
    add("--out", type=Path, default=Path("out"), help="folder for base, adapters and results.json (out)")
    add = parser.add_argument_group("data").add_argument
    add("--text", type=Path, nargs="+", metavar="FILE", help="fine-tune on these (sources of the email package)")
    add("--ood", type=Path, nargs="+", metavar="FILE", help="out-of-domain test (sources of the asyncio package)")
    add("--pretrain-text", type=Path, nargs="+", metavar="FILE", help="pre-train on these (the reference of help())")
    add("--train-bytes", type=int, help="use at most so much of the training split (30000, or all of --text)")
    add("--eval-windows", type=int, default=400, help="at most so many contexts a split in an evaluation (400)")
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
    add("--r", type=int, default=16, help="rank of the adapters (16)")
    add("--alpha", type=float, default=32, help="their scaling is alpha / r (32)")
    add("--lora-dropout", type=float, default=0.0, help="on the input of the adapters (0)")
    add("--sigma", type=float, default=0.2, help="flat: noise strength at the end of the ramp (0.2)")
    add("--schedule", default="cosine", help="flat: the ramp, cosine, linear or constant (cosine)")
    add("--low-memory", action="store_true", help="flat: no copy of the noisy weights, but noise made at each use")
    add("--rho", type=float, default=0.2, help="sam: radius on (A, B) (0.2)")
    add("--rho-full", type=float, default=0.05, help="sam-full: radius on the merged weight (0.05)")
    add("--sharpness-sigma", type=float, default=0.1, help="noise strength of the sharpness measure (0.1)")
    add("--sharpness-samples", type=int, default=8, help="its draws (8)")
    add = parser.add_argument_group("text from the models").add_argument
    add("--sample", action="store_true", help="only generate, from --adapter")
    add("--adapter", type=Path, metavar="FILE", help="adapter file that a run saved; its base lies beside it")
    add("--prompt", help="what to continue (the start of the test split)")
    add("--length", type=int, default=200, help="bytes to generate (200)")
    add("--temperature", type=float, default=0.7, help="below 1 plays safe (0.7)")
    add("--top-k", type=int, default=40, help="draw among the k likeliest (40)")
    args = parser.parse_args()
    try:
        check(args)
        sample(args) if args.sample else compare(args)
    except (ValueError, FloatingPointError, OSError) as error:
        raise SystemExit(f"train_gpt2.py: {error}") from None


def check(args: argparse.Namespace) -> None:
    """The options that nothing else checks; turns --device into a torch.device."""
    counts = ["seeds", "train_bytes", "eval_windows", "n_layer", "n_head", "n_embd", "block_size", "pretrain_steps"]
    counts += ["steps", "batch_size", "grad_accum", "sharpness_samples", "length", "top_k"]
    positive = ["pretrain_lr", "lr", "full_lr", "clip", "temperature"]
    natural = ["warmup", "weight_decay", "rho", "rho_full", "sharpness_sigma"]
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
    if args.n_embd % args.n_head:
        raise ValueError(f"--n-embd must be a multiple of --n-head = {args.n_head}, got {args.n_embd}")
    if args.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype must be float32 or bfloat16, got {args.dtype!r}")
    if args.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or auto, got {args.device!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    args.device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
