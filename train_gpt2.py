"""Fine-tune a GPT-2 with LoRA, Flat-LoRA and SAM, side by side.

    python train_gpt2.py                          # no network, no file needed
    python train_gpt2.py --text my.txt --ood other.txt       # your own text
    python train_gpt2.py --init gpt2 --text my.txt        # OpenAI's GPT-2
    python train_gpt2.py --sample out/flat.pt --prompt "def "
    torchrun --nproc-per-node 2 -- train_gpt2.py  # several processes

The bare command pre-trains a small GPT-2 (https://github.com/karpathy/nanoGPT)
on the text of Python's help(), once, and fine-tunes it on the package email by
each method under three seeds. A stopped run goes on by the same command.
"""

from __future__ import annotations

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
import textwrap
import time
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
METHODS = {"lora": 1, "dropout": 1, "flat": 1, "sam": 2, "sam-full": 2, "full": 1}  # and the passes of each per batch
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
torch_load = partial(torch.load, map_location="cpu", weights_only=True)  # runs no code of the file
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
        self.n_head, n = config.n_head, config.n_embd
        self.ln_1 = nn.LayerNorm(n)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(n, 3 * n), "c_proj": nn.Linear(n, n)})
        self.ln_2 = nn.LayerNorm(n)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(n, 4 * n), "c_proj": nn.Linear(4 * n, n)})

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x))  # (B, T, 3C)
        q, k, v = qkv.view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)
        y = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")  # (B, T, 4C); OpenAI's form of GELU, not erf
        return x + self.mlp["c_proj"](y)  # (B, T, C)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config, n = config, config.n_embd
        embeddings = {"wte": nn.Embedding(config.vocab_size, n), "wpe": nn.Embedding(config.block_size, n)}
        self.transformer = nn.ModuleDict(embeddings)
        self.transformer["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer["ln_f"] = nn.LayerNorm(n)
        self.lm_head = nn.Linear(n, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight  # tied
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # each block adds to the residual stream twice, hence the smaller c_proj
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)

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
    tokens, generator = list(prompt), torch.Generator().manual_seed(seed)
    for _ in range(length):
        context = torch.tensor([tokens[-model.config.block_size :]], device=model.lm_head.weight.device)  # (1, T)
        logits = model(context)[0, -1].float().cpu() / 0.7  # (vocab_size,); 0.7, a temperature below 1, plays safe
        best, ids = logits.topk(min(top_k, len(logits)))  # (top_k,), (top_k,)
        tokens.append(int(ids[torch.multinomial(best.softmax(0), 1, generator=generator)]))
    return tokens[len(prompt) :]


# ---- OpenAI's GPT-2 ------------------------------------------------------------------------------------------
RELEASED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# The settings of config.json under which `GPT` computes what Hugging Face's model does.
SAME_FUNCTION = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
SAME_FUNCTION |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # byte pairs stay inside of these
# tiktoken fails on very long runs of blanks, so it gets pieces. They end before a blank or newline that follows a word,
# where SPLIT cuts in any case; only a run of more than 20,000 characters without such a place is cut elsewhere.
PIECE = r"(?s).{1,20000}(?:(?<=\S)(?=[ \n])|\Z)|.{1,20000}"


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Whatever is wrong with a file, truncated, of another kind or made to harm: a ValueError in one line."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise ValueError(f"{path} cannot be used: {kind}{' '.join(str(error).split())[:300]}") from None


def extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f'{name.split(".")[0]} is not installed: pip install -e ".[gpt2]"') from None


def checkpoint_file(init: str, *names: str) -> Path:
    """The first of `names` that the folder `init` holds. Of a released model, the first, downloaded once."""
    if found := [Path(init, name) for name in names if Path(init, name).is_file()]:
        return found[0]
    if init not in RELEASED:
        raise ValueError(f"--init must be one of {', '.join(RELEASED)} or a folder with {names[0]}, got {init}")
    url = f"https://huggingface.co/openai-community/{init}/resolve/main/{names[0]}"
    path = Path(torch.hub.get_dir(), "flatlora", init, names[0])
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))
    except Exception as error:  # a connection that breaks raises all kinds
        raise ValueError(f"cannot download {url} ({error}): --init DIR takes a folder with it") from None
    return path


def load_gpt2(init: str, device: torch.device) -> GPT:
    """The weights as Hugging Face saves them, with or without its prefix `transformer.`, every key accounted for."""
    with reading(path := checkpoint_file(init, "config.json")), torch.device("meta"):
        given = json.loads(path.read_text("utf-8"))
        if other := {key: given[key] for key, value in SAME_FUNCTION.items() if given.get(key, value) != value}:
            raise ValueError(f"it is not GPT-2 with {other}")
        model = GPT(GPTConfig(*(given[k] for k in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"))))
        model(torch.zeros(1, 1, dtype=torch.long))  # sizes that do not fit together show here
    path = checkpoint_file(init, "model.safetensors", "pytorch_model.bin")
    load_file = extra("safetensors.torch").load_file if path.suffix == ".safetensors" else torch_load
    with reading(path):
        mask = r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias"  # causal, a buffer in older files
        state = {key: value for key, value in load_file(path).items() if not re.fullmatch(mask, key)}
        for key in list(state):  # one after the other, so that no second copy of the model comes to be
            value, name = state.pop(key), key.removeprefix("transformer.")
            transposed = name.endswith(tuple(f"{target}.weight" for target in TARGETS))  # Hugging Face's Conv1D
            value = (value.t() if transposed else value).to(device, torch.float32).contiguous()
            state[name if name == "lm_head.weight" else f"transformer.{name}"] = value
        if not torch.equal(state.setdefault("lm_head.weight", wte := state["transformer.wte.weight"]), wte):
            raise ValueError("lm_head.weight differs from wte.weight, to which GPT-2 ties it")
        model.load_state_dict(state, assign=True)
    model.lm_head.weight = model.transformer["wte"].weight  # tied again
    return model.eval()


def tokenizer(init: str | None) -> tuple[Callable[[bytes], list[int]], Callable[[Sequence[int]], bytes]]:
    """encode and decode: a token is a byte or, with --init, one of GPT-2's byte pairs."""
    if init is None:
        return list, bytes
    tiktoken = extra("tiktoken")
    # vocab.json writes a byte as a printable character: itself, or one from 256 on. Its ids are in merge order.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*plain}))}
    with reading(path := checkpoint_file(init if Path(init, "vocab.json").is_file() else "gpt2", "vocab.json")):
        ids = {bytes(byte[c] for c in word): i for word, i in json.loads(path.read_text("utf-8")).items()}
        ids |= {bytes([b]): ids[bytes([b])] for b in range(256)}  # a KeyError where a byte is missing
        bpe = tiktoken.Encoding("gpt2", pat_str=SPLIT, mergeable_ranks=ids, special_tokens={})
        words = {i: word for word, i in ids.items()}
    cut = re.compile(PIECE).findall
    return (  # "ignore": where a text was split, half a character may stand
        lambda text: [i for piece in cut(text.decode("utf-8", "ignore")) for i in bpe.encode_ordinary(piece)],
        lambda tokens: b"".join(words.get(token, b"?") for token in tokens),
    )


# ---- Adapters in PEFT's files --------------------------------------------------------------------------------
def save_peft(model: nn.Module, folder: str | Path, base_model: str, fan_in_fan_out: bool = False) -> None:
    """Write adapter_config.json and adapter_model.safetensors as Hugging Face's PEFT reads them. `base_model` names the
    model on which it is to load them, `fan_in_fan_out` is for one that holds the layers as Conv1D, as GPT-2 does.
    ValueError: no adapters, or something trained beside them, which would be lost."""
    save_file, state = extra("safetensors.torch").save_file, flatlora.lora_state_dict(model)
    if lost := [k for k, p in model.named_parameters() if p.requires_grad and not k.endswith(("lora_A", "lora_B"))]:
        raise ValueError(f"PEFT's files hold adapters only: {lost[:3]} ({len(lost)} in all) are trained too")
    layers = [module for module in model.modules() if isinstance(module, flatlora.LoRALinear)]
    names = [key.removesuffix(".lora_A") for key in state if key.endswith("lora_A")]
    ranks, alphas = [layer.r for layer in layers], [layer.scaling * layer.r for layer in layers]
    config: dict[str, Any] = {"peft_type": "LORA", "base_model_name_or_path": base_model, "inference_mode": True}
    exact = "|".join(map(re.escape, names))  # of a list, PEFT would take "1" for the end of "3.1" too
    config |= {"target_modules": exact, "fan_in_fan_out": fan_in_fan_out, "r": ranks[0], "lora_alpha": alphas[0]}
    for key, values in (("rank_pattern", ranks), ("alpha_pattern", alphas)):  # without ^ "0" would fit "1.0" too
        config[key] = {f"^{re.escape(name)}": v for name, v in zip(names, values) if v != values[0]}
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{key}.weight": p.contiguous() for key, p in state.items()}
    save_file(tensors, Path(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
    Path(folder, "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def load_peft(model: nn.Module, folder: str | Path) -> nn.Module:
    """`inject_lora` from an adapter that PEFT trained: its layers, ranks, scalings and weights. Returns the model.
    ValueError: damaged files, or more than LoRA, such as DoRA, a trained head, or a start that changed the base."""
    load_file, modules = extra("safetensors.torch").load_file, dict(model.named_modules())
    with reading(folder):
        config = json.loads(Path(folder, "adapter_config.json").read_text("utf-8"))
        if str(start := config.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq")):
            raise ValueError(f"init_lora_weights={start} changed the base model too")
        state = load_file(Path(folder, "adapter_model.safetensors"))
        state = {key.removeprefix("base_model.model.").removesuffix(".weight"): p for key, p in state.items()}
        layers = {key: key.removesuffix(".lora_A").removesuffix(".lora_B") for key in state}
        if more := [key for key, name in layers.items() if key == name or not isinstance(modules.get(name), nn.Linear)]:
            raise ValueError(f"it must hold factors of this model's nn.Linear layers and no more, got {more[:3]}")
        for name in dict.fromkeys(layers.values()):
            r, patterns = len(state[f"{name}.lora_A"]), (config.get("alpha_pattern") or {}).items()
            alpha = next((a for k, a in patterns if re.match(rf"(.*\.)?({k})$", name)), config["lora_alpha"])
            alpha = alpha * math.sqrt(r) if config.get("use_rslora") else alpha
            flatlora.inject_lora(model, r, alpha, targets=re.escape(name))
        flatlora.load_lora_state_dict(model, state)
    return model


# ---- Data ----------------------------------------------------------------------------------------------------
def package_sources(name: str, size: int = 2000) -> list[bytes]:
    """Source code of a standard-library package: of each file `size` bytes at most, since else one module of email
    would be a third of the text, and not the first 2,000, which are licence and imports."""
    folder = Path(importlib.import_module(name).__path__[0])
    return [path.read_bytes()[2000 : 2000 + size] for path in sorted(folder.glob("*.py"))]


def read_files(paths: Sequence[Path], utf8: bool = False) -> list[bytes]:
    """Without a byte-order mark. ValueError with `utf8`, which GPT-2's byte pairs need, for another encoding."""
    files = []
    for path in paths:
        with reading(path):
            files.append(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
            if utf8 and "\0" in files[-1].decode():
                raise ValueError(f"in UTF-8 its byte {files[-1].index(0)} would not be zero")
    return files


def split(files: Sequence[bytes]) -> dict[str, bytes]:
    """Of each file, so that every split covers all, three fifths to train, one for validation, one for the test."""
    fifths = {"train": (0, 3), "val": (3, 4), "test": (4, 5)}
    return {k: b"".join(f[a * len(f) // 5 : b * len(f) // 5] for f in files) for k, (a, b) in fifths.items()}


def load_data(args: argparse.Namespace, config: GPTConfig) -> dict[str, Tensor]:
    """Token ids of "train", "val", "test", perhaps "ood" and, without --init, "pretrain", each (N,)."""
    data, texts, released = {}, {}, args.init is not None
    if args.data:  # nanoGPT's files, mapped into memory, not read into it; the halves of val are val and test
        for name in ("train", "val"):
            with reading(path := args.data / f"{name}.bin"):
                data[name] = torch.from_numpy(np.memmap(path, np.uint16, "c"))  # c: nothing is written to the file
        data["val"], data["test"] = data["val"].tensor_split(2)
    else:
        texts = split(read_files(args.text, released) if args.text else package_sources("email"))
    if args.ood or not released:
        texts["ood"] = b"".join(read_files(args.ood, released) if args.ood else package_sources("asyncio"))
    if not released:
        topics = importlib.import_module("pydoc_data.topics").topics
        texts["pretrain"] = "\n\n".join(topics[key] for key in sorted(topics)).encode()
    encode = tokenizer(args.init)[0] if texts else list
    data |= {name: torch.tensor(encode(text), dtype=torch.int32) for name, text in texts.items()}
    for name, ids in data.items():
        if not args.block_size < min(len(ids), config.block_size + 1):
            raise ValueError(f"--block-size must be below {min(len(ids), config.block_size + 1)} for the {name} text")
        if (top := ids.numpy().max()) >= config.vocab_size:
            raise ValueError(f"the {name} text has the token {top}, the model only {config.vocab_size} of them")
    return data


def windows(data: Tensor, starts: Tensor, block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and next-token targets from the given places: (B, T), (B, T). By numpy: torch cannot index uint16."""
    at = starts[:, None] + torch.arange(block_size + 1)  # (B, T + 1)
    chunk = torch.from_numpy(data.numpy()[at.numpy()].astype(np.int64)).to(device)  # (B, T + 1)
    return chunk[:, :-1], chunk[:, 1:]


# ---- Training ------------------------------------------------------------------------------------------------
def option(default: Any, words: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": f"{words} (%(default)s)", **more})


@dataclass
class Recipe:
    """What a training run is made of, beside method, model, data and seed: the options of that group in -h."""

    steps: int = option(200, "optimizer steps")
    lr: float = option(1.5e-3, "peak learning rate; full wants a lower one")
    batch_size: int = option(16, "windows per micro-batch")
    grad_accum: int = option(1, "micro-batches per step")
    block_size: int = option(64, "tokens per window")
    weight_decay: float = option(0.0, "AdamW's")
    dtype: str = option("float32", "bfloat16 is autocast: parameters stay float32", choices=["float32", "bfloat16"])
    r: int = option(16, "rank of the adapters")
    alpha: float = option(32.0, "their scaling is alpha / r")
    lora_dropout: float = option(0.1, "dropout: rate, on the input of the adapters")
    sigma: float = option(0.2, "flat: noise strength at the end of the schedule")
    schedule: str = option("cosine", "flat: how sigma grows", choices=["cosine", "linear", "constant"])
    rho: float = option(0.2, "sam: radius; sam-full wants about a quarter of it")


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor], dtype: str = "float32") -> Tensor:
    """Mean cross-entropy in nats per token."""
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(batch[0])  # (B, T, vocab_size)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[1].flatten())


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the steps, at most 100, then a cosine down to a tenth of the peak."""
    warmup = min(100, steps // 10)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    base: GPT, method: str, data: Tensor, recipe: Recipe, seed: int, file: Path | None = None, bar: tqdm | None = None
) -> tuple[GPT, list[float]]:
    """A trained copy of the base in evaluation mode, and the seconds per step. Goes on from `file`, kept up to date;
    all that a step draws follows from (seed, step, rank), so the result is that of a run which never stopped."""
    torch.manual_seed(seed)  # the same adapters for every method
    if method == "full":
        model = copy.deepcopy(base).requires_grad_(True)
    else:  # adapters stand on the weights of the base itself, not on a copy: these are never written
        model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        flatlora.inject_lora(model, recipe.r, recipe.alpha, recipe.lora_dropout * (method == "dropout"), TARGETS)
    device, first, seconds, saved_at = next(model.parameters()).device, 0, [], time.monotonic()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), recipe.lr, (0.9, 0.95), weight_decay=recipe.weight_decay)
    # Where the windows of all steps start, from a generator that no method can disturb; each process has its own.
    generator, shape = torch.Generator().manual_seed(seed), (recipe.steps, WORLD, recipe.grad_accum, recipe.batch_size)
    starts = torch.randint(len(data) - recipe.block_size, shape, generator=generator)[:, RANK]
    if file and file.exists():
        with reading(file):
            saved = torch_load(file)
            model.load_state_dict(saved["trained"], strict=False)  # strict would ask for the frozen weights
            optimizer.load_state_dict(saved["optimizer"])
            first, seconds = saved["step"], saved["seconds"]
    net = nn.parallel.DistributedDataParallel(model.train()) if WORLD > 1 else model.train()
    bar = tqdm(disable=True) if bar is None else bar
    bar.update(first)
    for step in range(first, recipe.steps):
        torch.manual_seed(int(np.random.SeedSequence([seed, step, RANK]).generate_state(1)[0]))  # for dropout
        optimizer.param_groups[0]["lr"] = learning_rate(step, recipe.steps, recipe.lr)
        batches = [windows(data, places, recipe.block_size, device) for places in starts[step]]
        step_loss, begin = partial(loss_fn, dtype=recipe.dtype), time.perf_counter()
        if space := {"sam": "lora", "sam-full": "full"}.get(method):
            loss = flatlora.sam_step(net, step_loss, batches, optimizer, recipe.rho, space, max_grad_norm=1.0)
        else:  # with sigma = 0 the plain step
            sigma = flatlora.sigma_at(step, recipe.steps, recipe.sigma * (method == "flat"), recipe.schedule)
            loss = flatlora.flat_lora_step(net, step_loss, batches, optimizer, sigma, (seed, step, RANK), 1.0)
        seconds.append(time.perf_counter() - begin)  # loss is a Python number, so a GPU is through, but for the update
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        bar.update()
        due = step + 1 == recipe.steps or time.monotonic() > saved_at + CHECKPOINT_SECONDS
        if file and due and RANK == 0:
            state = {"trained": {name: p.detach() for name, p in trained.items()}, "optimizer": optimizer.state_dict()}
            save(file, {**state, "step": step + 1, "seconds": seconds})
            saved_at = time.monotonic()
    return model.eval(), seconds


def run_file(folder: Path, base: GPT, method: str, data: Tensor, recipe: Recipe, seed: int) -> Path:
    """Named by all that shapes a run, so that only an equal one goes on from it; of a tensor 2^16 numbers count."""
    digest = hashlib.sha256(json.dumps([asdict(base.config), asdict(recipe), WORLD]).encode())
    for tensor in (data, *base.parameters()):
        digest.update(tensor.detach().flatten()[:: 1 + tensor.numel() // 2**16].cpu().numpy().tobytes())
    return folder / f"{method}-{seed}-{digest.hexdigest()[:12]}.pt"


def save(path: Path, content: dict[str, Any]) -> None:
    """Written beside and renamed: a kill or a full disk at any moment leaves the earlier file or the new one."""
    buffer, temporary = io.BytesIO(), path.with_name(f".writing-{os.getpid()}")
    if path.suffix == ".json":
        buffer.write(json.dumps(content, indent=1, default=str).encode())
    else:
        torch.save(content, buffer)
    try:
        temporary.write_bytes(buffer.getbuffer())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- Evaluation ----------------------------------------------------------------------------------------------
METRICS = {"val_loss": "validation", "test_loss": "test", "ood_loss": "other text", "sharpness": "sharpness"}
METRICS |= {"passes": "passes", "ms": "ms/step"}
# 97.5 % points of Student's t for 1 to 15 degrees of freedom. The last serves above, too: there it is up to 9 % wide.
T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]


def spread(model: GPT, data: Tensor, block_size: int, limit: int) -> list[tuple[Tensor, Tensor]]:
    """At most `limit` windows, evenly spread, without overlap, in equal batches whose logits take 256 MB at most."""
    starts = torch.arange(0, len(data) - block_size, block_size)  # (N,)
    starts = starts[:: -(-len(starts) // limit)]
    size = min(64, len(starts), max(1, 2**26 // (block_size * model.config.vocab_size)))
    parts = starts[: len(starts) // size * size].split(size)
    return [windows(data, part, block_size, next(model.parameters()).device) for part in parts]


@torch.no_grad()
def evaluate(model: GPT, data: Tensor, block_size: int, limit: int = 200, dtype: str = "float32") -> float:
    """Nats per token."""
    return statistics.fmean(loss_fn(model, b, dtype).item() for b in spread(model, data, block_size, limit))


def measure(model: GPT, data: Mapping[str, Tensor], block_size: int, limit: int, dtype: str) -> dict[str, float]:
    """The losses and, of a model with adapters, the rise of the training loss under noise of sigma 0.1 on W'."""
    names = [name for name in ("val", "test", "ood") if name in data]
    found = {f"{name}_loss": evaluate(model, data[name], block_size, limit, dtype) for name in names}
    if any(isinstance(module, flatlora.LoRALinear) for module in model.modules()):
        batches = spread(model, data["train"], block_size, min(limit, 64))
        found["sharpness"] = flatlora.sharpness(model, partial(loss_fn, dtype=dtype), batches, 0.1, 8, seed=0)
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval."""
    return statistics.fmean(values), T975[min(len(values), 16) - 2] * statistics.stdev(values) / len(values) ** 0.5


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    """Means over the seeds, differences to LoRA paired by seed, and what they say, in 80 columns."""

    def table(rows: Sequence[Sequence[str]]) -> str:
        width = [max(map(len, column)) for column in zip(*rows)]
        lines = [rows[0], ["-" * w for w in width], *rows[1:]]
        return "\n".join("  ".join([line[0].ljust(width[0]), *map(str.rjust, line[1:], width[1:])]) for line in lines)

    by = {run["method"]: [r for r in runs if r["method"] == run["method"]] for run in runs}
    keys = [key for key in METRICS if any(key in run for run in runs)]
    digits = {key: {"sharpness": 4, "passes": 0, "ms": 0}.get(key, 3) for key in keys}
    means, differences, words = [["", *(METRICS[k] for k in keys)]], [["", *(METRICS[k] for k in keys[:-2])]], []
    for method, own in by.items():
        cells = [f"{statistics.fmean(r[k] for r in own):.{digits[k]}f}" if k in own[0] else "-" for k in keys]
        means.append([method, *cells])
        if method in ("base", "lora") or "lora" not in by or len(own) == 1:
            continue
        found = {k: interval([a[k] - b[k] for a, b in zip(own, by["lora"])]) for k in keys[:-2] if k in own[0]}
        cells = {k: f"{mean:+.{digits[k]}f} +-{half:.{digits[k]}f}" for k, (mean, half) in found.items()}
        differences.append([method, *(cells.get(k, "-") for k in keys[:-2])])
        mean, half = found["test_loss"]
        size = f"{'lower' if mean < 0 else 'higher'} by {abs(mean):.3f} +-{half:.3f}"
        passes = f" at {own[0]['passes']} passes per step" if own[0]["passes"] > 1 else ""
        words.append(f"{method} {size if abs(mean) > half else 'the same within the interval'}{passes}")
    note = "Nats per token, mean over the seeds. Sharpness: how much noise of sigma 0.1 raises the training loss."
    texts = [textwrap.fill(note, 79), table(means)]
    if words:
        verdict = f"Test loss against that of lora: {', '.join(words)}."
        if "ood_loss" in keys:
            verdict += " A lower learning rate alone lowers the loss on other text: it is no evidence for flatness."
        verdict += " These defaults suit a small model: on a real one start from sigma 0.05 to 0.1."
        texts.append("Difference to lora, paired by seed, with its 95 % interval:")
        texts += [table(differences), textwrap.fill(verdict, 79)]
    return "\n\n".join(texts)


# ---- Command line --------------------------------------------------------------------------------------------
def compare(args: argparse.Namespace) -> None:
    """Fine-tune with each method and seed, measure, write results.json, then print."""
    if args.init:
        base, name = load_gpt2(args.init, args.device), args.init
    else:
        torch.manual_seed(0)
        heads = args.n_embd // math.gcd(args.n_embd, 32)
        base = GPT(GPTConfig(args.n_layer, heads, args.n_embd, args.block_size)).to(args.device)
    data = load_data(args, base.config)
    recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
    shape, runs, files = (args.block_size, args.eval_windows, args.dtype), [], []
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.init:
        pretraining = Recipe(args.pretrain_steps, 3e-3, args.batch_size, block_size=args.block_size, dtype=args.dtype)
        file = run_file(args.out, base, "base", data["pretrain"], pretraining, 0)
        with tqdm(desc="pre-training, once", total=args.pretrain_steps, leave=False, disable=RANK > 0) as bar:
            base, name = train(base, "full", data["pretrain"], pretraining, 0, file, bar)[0], file.name
    runs.append({"method": "base", "seed": 0, **measure(base, data, *shape)})
    with tqdm(total=args.seeds * len(args.methods) * args.steps, leave=False, disable=RANK > 0) as bar:
        for seed, method in [(seed, method) for seed in range(args.seeds) for method in dict.fromkeys(args.methods)]:
            bar.set_description(f"{method}, seed {seed}")
            files.append(run_file(args.out, base, method, data["train"], recipe, seed))
            model, seconds = train(base, method, data["train"], recipe, seed, files[-1], bar)
            cost = {"passes": METHODS[method], "ms": 1000 * statistics.median(seconds)}
            runs.append({"method": method, "seed": seed, **measure(model, data, *shape), **cost})
            if seed == 0 and method != "full" and RANK == 0:
                content = {"base": name, "config": asdict(base.config), "r": args.r, "alpha": args.alpha}
                save(args.out / f"{method}.pt", {**content, "adapters": flatlora.lora_state_dict(model)})
                if args.peft:
                    save_peft(model, args.out / method, name, fan_in_fan_out=True)
    if RANK == 0:
        found = {"torch": torch.__version__, "options": vars(args), "runs": runs, "report": report(runs)}
        save(args.out / "results.json", found)
        for file in files:
            file.unlink(missing_ok=True)
        print(f"{found['report']}\n\nNumbers: {args.out}/results.json; adapters of seed 0: {args.out}/METHOD.pt")


def sample(args: argparse.Namespace) -> None:
    """Text from a saved adapter, on the base beside it or on OpenAI's GPT-2 (--init, where that has moved)."""
    with reading(args.sample):
        content = torch_load(args.sample)
        init = args.init or (None if content["base"].endswith(".pt") else content["base"])
        model = load_gpt2(init, args.device) if init else GPT(GPTConfig(**content["config"])).to(args.device).eval()
        if not init:
            model.load_state_dict(torch_load(args.sample.parent / content["base"])["trained"], strict=False)
        flatlora.inject_lora(model, content["r"], content["alpha"], targets=TARGETS)
        flatlora.load_lora_state_dict(model, content["adapters"])
    encode, decode = tokenizer(init)
    tokens = encode((args.prompt or "\n").encode())
    print(decode([*tokens, *generate(model, tokens, args.length)]).decode(errors="replace"))


def count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def main() -> None:
    devices = ["cpu", *["cuda"] * torch.cuda.is_available()]
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument_group("what to run").add_argument
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS][:4], metavar="METHOD", help="of %(choices)s")
    add("--seeds", type=count, default=3, help="runs of each method, from two on with intervals (%(default)s)")
    add("--out", type=Path, default=Path("out"), help="folder for base, adapters and results.json (%(default)s)")
    add("--device", choices=devices, default=devices[-1], help="(%(default)s)")
    add("--sample", type=Path, metavar="FILE", help="only write a text with this adapter, such as out/flat.pt")
    add("--prompt", default="def ", help="what it continues (%(default)r)")
    add("--length", type=count, default=200, help="tokens to write (%(default)s)")
    add = (group := parser.add_argument_group("data")).add_argument
    either = group.add_mutually_exclusive_group().add_argument
    either("--text", type=Path, nargs="+", metavar="FILE", help="fine-tune on these (sources of the package email)")
    either("--data", type=Path, metavar="DIR", help="or on nanoGPT's train.bin and val.bin (half of val is the test)")
    add("--ood", type=Path, nargs="+", metavar="FILE", help="the other text (sources of asyncio; with --init none)")
    add("--eval-windows", type=count, default=200, help="windows of each text in an evaluation (%(default)s)")
    add = parser.add_argument_group("the base: OpenAI's GPT-2, or a small one pre-trained here").add_argument
    add("--init", metavar="MODEL", help=f"{', '.join(RELEASED)} or a folder; changes the defaults, see --init MODEL -h")
    add("--peft", action="store_true", help="also write each adapter for Hugging Face's PEFT, in OUT/METHOD")
    add("--n-layer", type=count, default=4, help="blocks of the small one (%(default)s)")
    add("--n-embd", type=count, default=128, help="its width, in heads of 32 (%(default)s)")
    add("--pretrain-steps", type=count, default=1200, help="its optimizer steps (%(default)s)")
    add = parser.add_argument_group("fine-tuning").add_argument
    for f in fields(Recipe):
        kind = count if type(f.default) is int else type(f.default)
        add(f"--{f.name.replace('_', '-')}", type=kind, default=f.default, **f.metadata)
    if any(word.partition("=")[0] == "--init" for word in sys.argv):
        parser.set_defaults(methods=["flat"], seeds=1, eval_windows=32, steps=100, lr=2e-4, batch_size=4, grad_accum=4)
        parser.set_defaults(block_size=256, r=8, alpha=16.0, sigma=0.05, rho=0.05)
    args = parser.parse_args()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # what an ASCII terminal cannot show must not end a run
    args.device = torch.device(args.device, int(os.environ.get("LOCAL_RANK", 0)) if args.device == "cuda" else None)
    try:
        if WORLD > 1:
            distributed.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
        sample(args) if args.sample else compare(args)
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        raise SystemExit(f"train_gpt2.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("\ntrain_gpt2.py: stopped; the same command goes on") from None
    finally:
        if distributed.is_initialized():
            gc.collect()  # a DistributedDataParallel still alive keeps gloo's threads, which must not outlive Python
            distributed.destroy_process_group()


if __name__ == "__main__":
    main()
