"""What all tasks of the studies share: the settings of a run, its training loop, and what is measured of the result.

A task gives a model with adapters, and data. A batch is (x, y), and model(x) gives the logits, so that loss, training
and measures are the same code for all.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import flatlora  # noqa: E402
import train_gpt2  # noqa: E402
import train_toy  # noqa: E402

OUT = ROOT / "out" / "evidence"  # what is downloaded
RISES = (0.1, 0.3)  # sigma of the noise under which the rise of the training loss is measured
BITS = 3  # to which merged weights are rounded
USED = [train_gpt2.learning_rate, train_toy.sam_on_merged_step, train_toy.shifted]  # of the scripts, by every task
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """How a run is trained. What is 0 is off, so that Setting(lr) is plain LoRA."""

    lr: float
    r: int = 0  # 0: the task's own
    dropout: float = 0.0  # on the input of the adapters
    sigma: float = 0.0  # Flat-LoRA
    schedule: str = "cosine"  # of sigma; else it is constant
    std: str = "row"  # of the noise: by eq. 7, or one per "matrix", for noise of the same expected size
    rho: float = 0.0  # SAM on (A, B)
    rho_merged: float = 0.0  # SAM on W'
    bits: int = 0  # to which W' is rounded in the forward; the gradient passes straight through


@dataclass
class Data:
    """What a run of one seed is trained on and measured with."""

    steps: Sequence[Batch]  # one training batch per step
    train: list[Batch]  # for the training loss
    probe: list[Batch]  # training examples, for the rise of the loss under noise
    tests: dict[str, list[Batch]]  # "test" and others
    rounded: list[Batch]  # of the test, for the rise of the loss by rounding; none: it is not measured
    keep_answers: bool = False  # whether results tell for each example of the tests if it was right


class Task(Protocol):
    samples: int  # of the noise, for the rise of the loss

    def data(self, seed: int, tuning: bool) -> Data: ...

    def adapted(self, seed: int, setting: Setting) -> nn.Module: ...


# ---- Training ------------------------------------------------------------------------------------------------


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy, in nats per label."""
    x, y = batch
    logits = model(x)  # (..., classes)
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def train(model: nn.Module, steps: Sequence[Batch], setting: Setting, seed: int) -> None:
    """In place. The seed fixes the noise and the dropout."""
    optimizer = torch.optim.AdamW(flatlora.lora_parameters(model), weight_decay=0.0)
    model.train()
    for step, batch in enumerate(steps):
        torch.manual_seed(1000 * seed + step)  # for dropout
        optimizer.param_groups[0]["lr"] = train_gpt2.learning_rate(step, len(steps), setting.lr)
        if setting.rho:
            flatlora.sam_step(model, loss_fn, [batch], optimizer, setting.rho, 1.0)
        elif setting.rho_merged:
            train_toy.sam_on_merged_step(model, loss_fn, [batch], optimizer, setting.rho_merged, 1.0)
        elif setting.bits:
            rounded_loss_fn = partial(loss_when_rounded, bits=setting.bits)
            flatlora.flat_lora_step(model, rounded_loss_fn, [batch], optimizer, 0.0, 0, 1.0)
        else:
            sigma = setting.sigma
            if setting.schedule == "cosine":
                sigma = flatlora.sigma_at(step, len(steps), sigma)
            flatlora.flat_lora_step(model, loss_fn, [batch], optimizer, sigma, (seed, step), 1.0)
    model.eval()


def loss_when_rounded(model: nn.Module, batch: Batch, bits: int) -> Tensor:
    """The loss with W' rounded in all layers. Their gradients are taken as if it were not."""
    shifts = []
    for layer in flatlora.lora_layers(model).values():
        weight = layer.weight.detach()
        shifts.append(round_rows(weight, bits) - weight)
    with train_toy.shifted(model, shifts):
        return loss_fn(model, batch)


@contextmanager
def one_std_per_matrix(wanted: bool) -> Iterator[None]:
    """Inside, if it is wanted, the noise of flatlora has one standard deviation per matrix."""
    row_std = flatlora.row_std

    def matrix_std(merged: Tensor, sigma: float) -> Tensor:
        std = row_std(merged, sigma)  # (m, 1)
        return std.square().mean().sqrt().expand_as(std)

    try:
        if wanted:
            flatlora.row_std = matrix_std
        yield
    finally:
        flatlora.row_std = row_std


# ---- Measures ------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, Tensor]:
    """Mean loss in nats per label, and whether each label was right: (N,)."""
    loss = 0.0
    answers = []
    for x, y in batches:
        logits = model(x).flatten(0, -2)  # (N, classes)
        labels = y.flatten()  # (N,)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        answers.append(logits.argmax(-1) == labels)
    right = torch.cat(answers)
    return loss / len(right), right


def packed(right: Tensor) -> str:
    """Right or wrong, a bit per example, in hexadecimal digits."""
    return np.packbits(right.numpy()).tobytes().hex()


def round_rows(weight: Tensor, bits: int) -> Tensor:
    """The weight on the symmetric grid of so many bits whose ends are the largest entry of each row."""
    largest = weight.abs().amax(1, keepdim=True).clamp_min(1e-12)  # (m, 1)
    unit = largest / (2 ** (bits - 1) - 1)
    return (weight / unit).round() * unit


@torch.no_grad()
def measure(model: nn.Module, data: Data, seed: int, samples: int) -> dict[str, Any]:
    """What the tables show of a trained model, which is merged and rounded in the course of it."""
    result: dict[str, Any] = {}
    for sigma in RISES:
        result[f"rise_{sigma}"] = flatlora.sharpness(model, loss_fn, data.probe, sigma, samples, seed)

    names = list(flatlora.lora_layers(model))
    model = flatlora.merge_lora(model)
    result["train_loss"], _ = evaluate(model, data.train)
    for name, batches in data.tests.items():
        result[f"{name}_loss"], right = evaluate(model, batches)
        result[f"{name}_acc"] = 100 * right.double().mean().item()
        if data.keep_answers:
            result[f"{name}_right"] = packed(right)

    if not data.rounded:
        return result
    before, _ = evaluate(model, data.rounded)
    for name in names:
        linear = model.get_submodule(name)
        linear.weight.copy_(round_rows(linear.weight, BITS))
    after, _ = evaluate(model, data.rounded)
    result["rise_3_bits"] = after - before
    return result


def run(task: Task, setting: Setting, seed: int, tuning: bool = False) -> dict[str, Any]:
    """Train and measure once. Tuning gives loss and accuracy of its test alone, on data of its own."""
    data = task.data(seed, tuning)
    torch.manual_seed(seed)  # the same adapters for every method
    model = task.adapted(seed, setting)

    begin = time.perf_counter()
    with one_std_per_matrix(setting.std == "matrix"):
        train(model, data.steps, setting, seed)
    seconds = time.perf_counter() - begin

    if tuning:
        loss, right = evaluate(flatlora.merge_lora(model), data.tests["test"])
        return {"test_loss": loss, "test_acc": 100 * right.double().mean().item(), "seconds": seconds}
    return {**measure(model, data, seed, task.samples), "seconds": seconds}


def short(value: Any) -> Any:
    """A float with the six digits that are worth keeping."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


# ---- Which code made a run -----------------------------------------------------------------------------------


def fingerprint(sources: Iterable[str]) -> str:
    """A hash of Python sources that docstrings, comments and layout do not change."""
    trees = [structure(ast.parse(textwrap.dedent(source))) for source in sources]
    return hashlib.sha256("".join(trees).encode()).hexdigest()[:12]


def structure(node: Any) -> str:
    """The syntax tree as text, without docstrings. ast.dump would differ between versions of Python."""
    if isinstance(node, list):
        return f"[{','.join(map(structure, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)

    parts = []
    for field, value in ast.iter_fields(node):
        if field == "body" and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            value = value[ast.get_docstring(node, clean=False) is not None :]
        if value is not None and value != []:  # newer versions have more fields, which are empty
            parts.append(f"{field}={structure(value)}")
    return f"{type(node).__name__}({','.join(parts)})"
