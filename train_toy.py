"""The idea of Flat-LoRA in a minute, on a toy network: LoRA, Flat-LoRA and SAM.

    python train_toy.py

trains on twenty target tasks, prints a table, the loss landscape and a verdict,
and writes out/toy.json. To draw the picture of the idea, train for so long that
LoRA overfits:

    python train_toy.py --seeds 2 --steps 1500 --lr 3e-3 --plot idea

A random network, the teacher, labels the source task, on which a student is
trained once. Each target task moves the teacher by matrices of low rank, so
that LoRA can follow. It has 300 training samples, a tenth of them labelled at
random. The "shifted" test has the same labels on inputs that are moved and
wider. On one task all methods start from the same adapters and see the same
batches, so that their differences are paired.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
    from tqdm import tqdm

    import flatlora
    from flatlora import LoRALinear, LossFn, RowNoise, inject_lora, lora_layers, lora_parameters
except KeyboardInterrupt:  # these take seconds
    raise SystemExit("\ntrain_toy.py: stopped") from None

INPUTS = 16
HIDDEN = 64
CLASSES = 4
TRAIN = 300  # samples
TEST = 4000
BATCH = 64

# Each use counts its seeds from here, since two uses of one stream of random numbers would be correlated.
SOURCE = 0
TARGET = 1_000_000
ADAPTERS = 2_000_000
BATCHES = 3_000_000

Data = tuple[Tensor, Tensor]  # inputs (N, INPUTS), labels (N,)


@dataclass(frozen=True)
class Settings:
    """How the student is fine-tuned."""

    steps: int = 300
    lr: float = 1e-3
    r: int = 4
    alpha: float = 8.0
    dropout: float = 0.0
    sigma: float = 0.6
    schedule: str = "cosine"
    rho: float = 0.2


# ---- The tasks -----------------------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    first = nn.Linear(INPUTS, HIDDEN)
    second = nn.Linear(HIDDEN, HIDDEN)
    last = nn.Linear(HIDDEN, CLASSES)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)


def source_task(steps: int = 1500) -> tuple[nn.Sequential, nn.Sequential]:
    """A random teacher, and a student trained on its labels."""
    torch.manual_seed(SOURCE)
    teacher = mlp().requires_grad_(False)
    student = mlp()
    for layer in teacher[::2]:
        nn.init.normal_(layer.weight, std=1.4 / math.sqrt(layer.in_features))  # sqrt(2 / n) keeps ReLU variance

    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), desc="pre-train the student", leave=False):
        optimizer.zero_grad()
        loss_fn(student, draw(teacher, 256)).backward()
        optimizer.step()
        decay.step()
    return teacher, student


def target_task(teacher: nn.Sequential, seed: int, change: float = 0.3, label_noise: float = 0.1) -> dict[str, Data]:
    """The splits of a task whose teacher moved: each weight by a random matrix of rank 2 and relative norm `change`."""
    torch.manual_seed(TARGET + seed)
    moved = copy.deepcopy(teacher)
    for layer in moved[::2]:
        delta = torch.randn(layer.out_features, 2) @ torch.randn(2, layer.in_features)
        layer.weight += delta * (change * layer.weight.norm() / delta.norm())

    test = draw(moved, TEST)
    direction = F.normalize(torch.randn(INPUTS), dim=0)
    shift = 0.5 * math.sqrt(INPUTS) * direction
    shifted = 1.25 * torch.randn(TEST, INPUTS) + shift
    train = draw(moved, TRAIN, label_noise)
    return {"train": train, "test": test, "shifted": (shifted, moved(shifted).argmax(1))}


def draw(teacher: nn.Sequential, n: int, label_noise: float = 0.0) -> Data:
    """n inputs with the teacher's labels, of which a share is replaced by random ones."""
    x = torch.randn(n, INPUTS)
    y = teacher(x).argmax(1)  # (n,)
    replaced = torch.rand(n) < label_noise
    return x, torch.where(replaced, torch.randint(CLASSES, (n,)), y)


def loss_fn(model: nn.Module, batch: Data) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


# ---- Training ------------------------------------------------------------------------------------------------

LETTERS = {"lora": "L", "flat": "F", "sam": "S", "sam-full": "W"}  # of the methods, in the landscape


def finetune(student: nn.Sequential, train: Data, method: str, seed: int, settings: Settings) -> nn.Module:
    """The student with trained adapters, in evaluation mode. The seed fixes adapters and batches for every method."""
    torch.manual_seed(ADAPTERS + seed)
    model = inject_lora(copy.deepcopy(student), settings.r, settings.alpha, settings.dropout)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=settings.lr, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    generator = torch.Generator().manual_seed(BATCHES + seed)
    picks = torch.randint(TRAIN, (settings.steps, BATCH), generator=generator)

    for step, pick in enumerate(picks):
        batches = [(train[0][pick], train[1][pick])]
        if method == "sam":
            flatlora.sam_step(model, loss_fn, batches, optimizer, settings.rho)
        elif method == "sam-full":
            sam_on_merged_step(model, loss_fn, batches, optimizer, settings.rho)
        else:
            sigma = flatlora.sigma_at(step, settings.steps, settings.sigma, settings.schedule)
            if method == "lora":
                sigma = 0.0
            flatlora.flat_lora_step(model, loss_fn, batches, optimizer, sigma, (seed, step))
        decay.step()
    return model.eval()


def sam_on_merged_step(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    optimizer: torch.optim.Optimizer,
    rho: float,
    max_grad_norm: float = math.inf,
) -> float:
    """One step of SAM on W' itself, the ideal that Flat-LoRA stands in for (eq. 5). Returns the loss of the first pass.

    The gradient at W' moved by rho along the gradient by W', normalised over all layers, updates A and B. It keeps two
    matrices of the size of W per layer, and two passes. `modules_to_save` are not moved. Errors as in `sam_step`.
    """
    if not 0 <= rho < math.inf:
        raise ValueError(f"rho must be a finite number >= 0, got {rho!r}")

    loss, gradients = merged_gradients(model, loss_fn, batches)
    norm = total_norm(gradients).clamp_min(1e-12)
    shifts = [rho * gradient / norm for gradient in gradients]

    def loss_at_shifted(model: nn.Module, batch: Any) -> Tensor:
        with shifted(model, shifts):
            return loss_fn(model, batch)

    flatlora.flat_lora_step(model, loss_at_shifted, batches, optimizer, 0.0, 0, max_grad_norm)
    return loss


def merged_gradients(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any]) -> tuple[float, list[Tensor]]:
    """The mean loss of the batches, and its gradient by W' of each layer, which is that by W."""
    weights = [layer.base.weight for layer in lora_layers(model).values()]
    loss = 0.0
    gradients = [torch.zeros_like(weight) for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for batch in batches:
            part = loss_fn(model, batch) / len(batches)
            by_batch = torch.autograd.grad(part, weights, materialize_grads=True)
            for gradient, addend in zip(gradients, by_batch):
                gradient += addend
            loss += part.item()
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return loss, gradients


@contextmanager
def shifted(model: nn.Module, shifts: Sequence[Tensor]) -> Iterator[None]:
    """Inside, each layer computes with W' + its shift, as with noise: nothing is written."""
    layers = lora_layers(model).values()
    for layer in layers:
        if layer.base.weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"SAM on W' needs float32 or float64, {layer.base.weight.dtype} would round its shift away"
            )
    try:
        for layer, shift in zip(layers, shifts):
            layer.noise = RowNoise(shift.new_ones(len(shift), 1), shift)
        yield
    finally:
        for layer in layers:
            layer.noise = None


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


# ---- Measures ------------------------------------------------------------------------------------------------

STRENGTHS = (0.15, 0.3, 0.45, 0.6)  # sigma of the noise, in the landscape
SHOWN = 0.3  # and in the table
SPACES = {"lora": "LoRA space", "full": "full space", "equal": "full, equal |dW'|"}  # the panels of the landscape


@torch.no_grad()
def measure(model: nn.Module, splits: dict[str, Data], seed: int, samples: int = 10) -> dict[str, float]:
    """Losses, accuracies, and the sharpness at each of the STRENGTHS in each of the SPACES."""
    result = {}
    for name, (x, y) in splits.items():
        logits = model(x)
        right = logits.argmax(1) == y
        result[f"{name}_loss"] = F.cross_entropy(logits, y).item()
        result[f"{name}_acc"] = 100 * right.double().mean().item()

    train = [splits["train"]]
    for sigma in STRENGTHS:
        equal = moved_by(model, sigma)
        result[f"moved_{sigma}"] = equal
        result[f"lora_{sigma}"] = sharpness_on_factors(model, loss_fn, train, sigma, samples, seed)
        result[f"full_{sigma}"] = flatlora.sharpness(model, loss_fn, train, sigma, samples, seed)
        result[f"equal_{sigma}"] = flatlora.sharpness(model, loss_fn, train, equal, samples, seed)
    return result


@torch.no_grad()
def sharpness_on_factors(
    model: nn.Module, loss_fn: LossFn, batches: Sequence[Any], sigma: float, samples: int, seed: Any
) -> float:
    """Mean rise of the loss under noise on A and B, by the law of eq. 7 on their rows, over `samples` draws.

    As `flatlora.sharpness` is for noise on W'. One seed gives the same directions at every sigma.
    """
    factors = {}
    for name, layer in lora_layers(model).items():
        factors[f"{name}.lora_A"] = layer.lora_A
        factors[f"{name}.lora_B"] = layer.lora_B

    clean = mean_loss(model, loss_fn, batches)
    noisy = []
    for sample in range(samples):
        steps = []
        for name, factor in factors.items():
            noise = flatlora.draw_noise(factor, sigma, ("factors", seed, sample), name)
            steps.append(noise.signed_std * noise.normals)
        with flatlora.moved(list(factors.values()), steps):
            noisy.append(mean_loss(model, loss_fn, batches))
    return statistics.fmean(noisy) - clean


def mean_loss(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any]) -> float:
    losses = [loss_fn(model, batch) for batch in batches]
    return torch.stack(losses).mean().item()


@torch.no_grad()
def moved_by(model: nn.Module, sigma: float) -> float:
    """How far noise of strength sigma on A and B moves the W' of all layers: the root of E|dW'|_F^2 / |W'|_F^2.

    It is also the sigma of noise on W' of that size. Noise b on B and a on A moves W' by s (b A + B a + b a). By eq. 7
    the entries in row i of b have variance vb_i, those in row k of a va_k. All have mean zero and are uncorrelated, so
    the three parts are too:

        E|dW'|_F^2 = s^2 (sum_i vb_i |A|_F^2 + n sum_k va_k |B_:k|^2 + n sum_i vb_i sum_k va_k)
    """
    moved = 0.0
    whole = 0.0
    for layer in lora_layers(model).values():
        A = layer.lora_A
        B = layer.lora_B
        n = layer.in_features
        var_a = flatlora.filter_std(A, sigma).square()  # (r, 1)
        var_b = flatlora.filter_std(B, sigma).square()  # (m, 1)

        by_b = var_b.sum() * A.square().sum()
        by_a = n * (B.square().sum(0) @ var_a)
        by_both = n * var_b.sum() * var_a.sum()
        moved += layer.scaling**2 * float(by_b + by_a + by_both)
        whole += float(layer.weight.square().sum())
    return math.sqrt(moved / whole)


# ---- The result ----------------------------------------------------------------------------------------------

ROWS = {  # of the table, with the digits of each
    "train_loss": ("training loss", 3),
    "test_loss": ("test loss", 3),
    "shifted_loss": ("shifted test loss", 3),
    "test_acc": ("test accuracy, %", 1),
    f"lora_{SHOWN}": ("sharpness, LoRA space", 4),
    f"full_{SHOWN}": ("sharpness, full space", 4),
    f"equal_{SHOWN}": ("sharpness, equal |dW'|", 4),
}
Run = dict[str, Any]  # what was measured after one fine-tuning
Interval = tuple[float, float]  # a mean, and the half width of its 95 % interval

# 97.5 % points of Student's t for 1 to 30 degrees of freedom.
T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]
T975 += [2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086]
T975 += [2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


def interval(values: Sequence[float]) -> Interval:
    """Above 31 values it is up to 4 % too wide, never too narrow."""
    freedom = min(len(values) - 1, len(T975))
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), T975[freedom - 1] * error


def summarise(runs: Sequence[Run], methods: Sequence[str]) -> dict[str, Any]:
    """Means, paired differences to LoRA, and how much sharper LoRA's minima are in the full space at equal |dW'|."""
    keys = [key for key in runs[0] if key not in ("method", "seed")]
    lora = [run for run in runs if run["method"] == "lora"]
    means = {}
    differences = {}
    for method in methods:
        own = [run for run in runs if run["method"] == method]  # in the order of the seeds, as LoRA's
        means[method] = {key: statistics.fmean(run[key] for run in own) for key in keys}
        if method != "lora":
            differences[method] = {key: paired(own, key, lora, key) for key in keys}

    gap = paired(lora, f"equal_{SHOWN}", lora, f"lora_{SHOWN}")
    return {"mean": means, "difference": differences, "gap": gap}


def paired(runs: Sequence[Run], key: str, others: Sequence[Run], other_key: str) -> Interval:
    return interval([run[key] - other[other_key] for run, other in zip(runs, others)])


def table(summary: dict[str, Any]) -> str:
    """LoRA's means, and the differences of the others to them."""
    head = f"{'':<22}{'lora':>7}"
    for method in summary["difference"]:
        head += f"{method + ' - lora':>17}"

    lines = [head]
    for key, (label, digits) in ROWS.items():
        line = f"{label:<22}{summary['mean']['lora'][key]:>7.{digits}f}"
        for difference in summary["difference"].values():
            mean, half = difference[key]
            cell = f"{mean:+.{digits}f} ± {half:.{digits}f}"
            line += f"{cell:>17}"
        lines.append(line)
    return "\n".join(lines)


def chart(means: dict[str, dict[str, float]], height: int = 12) -> str:
    """The landscape as text: a panel per space, one scale, a letter per method, side by side. Falls stand at 0."""
    top = 1e-9
    for mean in means.values():
        top = max(top, *(mean[f"{space}_{sigma}"] for space in SPACES for sigma in STRENGTHS))
    unit = top / height

    lines = ["rise    " + "  ".join(f"{label:<20}" for label in SPACES.values())]
    for level in range(height, -1, -1):
        line = f"{level * unit:.3f}"
        for space in SPACES:
            line += " |"
            for sigma in STRENGTHS:
                line += f" {letters_at(level, means, f'{space}_{sigma}', unit):<4}"
        lines.append(line)

    axis = "".join(f" {sigma:<4g}" for sigma in STRENGTHS)
    lines.append("sigma  " + "  ".join([axis] * len(SPACES)))
    lines.append("       " + ", ".join(f"{LETTERS[method]} {method}" for method in means))
    return "\n".join(line.rstrip() for line in lines)


def letters_at(level: int, means: dict[str, dict[str, float]], key: str, unit: float) -> str:
    """Those of the methods whose rise is so many units, rounded."""
    letters = ""
    for method, mean in means.items():
        if round(max(0.0, mean[key]) / unit) == level:
            letters += LETTERS[method]
    return letters


def judged(difference: Interval, lower: str, higher: str) -> str:
    """What an interval allows to say. Undecided: where its edge is so near to 0 that one task more may turn it."""
    mean, half = difference
    beyond_zero = abs(mean) - half
    if abs(beyond_zero) < abs(mean) / 5:
        return "undecided"
    if beyond_zero <= 0:
        return "not shown to differ"
    return lower if mean < 0 else higher


def verdict(summary: dict[str, Any]) -> str:
    lines = []
    for method, difference in summary["difference"].items():
        passes = "two passes" if method.startswith("sam") else "one pass"
        words = judged(difference["test_loss"], "lower", "higher")
        lines.append(f"Test loss of {method} ({passes} per step) against LoRA's: {words}.")

    lora = summary["mean"]["lora"]
    moved = 100 * lora[f"moved_{SHOWN}"]
    mean, half = summary["gap"]
    words = judged(summary["gap"], "flatter, against Figure 1", "sharper, as in Figure 1")
    lines += [
        "\nFigure 1 of the paper: flat in LoRA space, yet sharp in the full space. At",
        f"LoRA's minima, noise of sigma {SHOWN} raises the training loss",
        f"  by {lora[f'lora_{SHOWN}']:.4f} on A and B, which moves W' by {moved:.0f} % of its norm,",
        f"  by {lora[f'full_{SHOWN}']:.4f} on W', which moves it by {100 * SHOWN:.0f} %,",
        f"  by {lora[f'equal_{SHOWN}']:.4f} on W', weakened so as to move it by {moved:.0f} % too.",
        f"The last less the first is {mean:+.4f} ± {half:.4f}. So at equal |dW'|, the full",
        f"space against LoRA space: {words}.",
    ]
    return "\n".join(lines)


# ---- The picture ---------------------------------------------------------------------------------------------

MAGNIFIED = 5  # the noise in the picture: it spreads over all directions, of which a plane shows two
DOTS = 150
ACROSS = torch.linspace(-0.4, 1.5, 39)  # x, with 0 and 1 in it
UP = torch.linspace(-0.18, 0.18, 61)  # y, as a share of |W'|
RISE = 0.5  # of the loss, at the ends of the bars
LEVELS = [0.0, 0.15, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


class Theme(NamedTuple):
    paper: str
    ink: str
    low: str
    high: str
    lora: str
    flat: str


THEMES = {
    "light": Theme("#ffffff", "#1f2328", "#ffffff", "#8db3d9", "#c2410c", "#0b3d91"),
    "dark": Theme("#0d1117", "#e6edf3", "#0d1117", "#3f6ea5", "#ff9b6a", "#8cc8ff"),
}


class Plane(NamedTuple):
    """A slice of the training loss. x: from LoRA's A and B, at 0, to Flat-LoRA's, at 1. y: along a direction of W'."""

    x: Tensor  # (X,)
    y: Tensor  # (Y,)
    loss: Tensor  # (Y, X)
    dots: Tensor  # (DOTS, 2), the noise around Flat-LoRA


def slice_of_loss(lora: nn.Module, flat: nn.Module, train: Data, sigma: float) -> Plane:
    """x is within reach of A and B. y is out of it all along x."""
    worst = worst_out_of_reach(lora, flat, train)
    size = total_norm([layer.weight for layer in lora_layers(lora).values()])  # |W'| of all layers
    y = UP * size.detach()

    model = copy.deepcopy(lora)
    loss = torch.empty(len(y), len(ACROSS))
    for column, share in enumerate(ACROSS):
        move_between(model, lora, flat, share)
        for row, distance in enumerate(y):
            with torch.no_grad(), shifted(model, [distance * part for part in worst]):
                loss[row, column] = loss_fn(model, train)
    return Plane(ACROSS, y, loss, noise_in_plane(lora, flat, worst, sigma))


@torch.no_grad()
def move_between(model: nn.Module, lora: nn.Module, flat: nn.Module, share: Tensor) -> None:
    """Give the model A and B on the line from those of LoRA, at 0, to those of Flat-LoRA, at 1."""
    for p, start, end in zip(lora_parameters(model), lora_parameters(lora), lora_parameters(flat)):
        p.copy_(start + share * (end - start))


def worst_out_of_reach(lora: nn.Module, flat: nn.Module, train: Data, size: float = 1.0) -> list[Tensor]:
    """A direction of W', (m, n) per layer and of length 1 in all, in which the sum of the two losses rises steeply.

    Found as a power iteration does: a step of that size, the gradient there, a step along that gradient, and so on.
    """
    ends = list(zip(lora_layers(lora).values(), lora_layers(flat).values()))
    shifts = [torch.zeros_like(layer.base.weight) for layer in lora_layers(lora).values()]
    for _ in range(30):
        with shifted(lora, shifts), shifted(flat, shifts):
            _, by_lora = merged_gradients(lora, loss_fn, [train])
            _, by_flat = merged_gradients(flat, loss_fn, [train])
        steepest = []
        for one, other, layers in zip(by_lora, by_flat, ends):
            steepest.append(out_of_reach(one + other, *layers))
        length = total_norm(steepest)
        direction = [part / length for part in steepest]
        shifts = [size * part for part in direction]
    return direction


@torch.no_grad()
def out_of_reach(change: Tensor, lora: LoRALinear, flat: LoRALinear) -> Tensor:
    """The part of a change of W' (m, n) that no small step of A and B makes, in either layer or in between.

    Such a step changes W' by s (b A + B a). The rows of b A are sums of those of A, the columns of B a of those of B.
    """
    rows = torch.cat([lora.lora_A, flat.lora_A])  # (2 r, n)
    columns = torch.cat([lora.lora_B, flat.lora_B], dim=1)  # (m, 2 r)
    row_basis, _ = torch.linalg.qr(rows.T)  # (n, 2 r)
    column_basis, _ = torch.linalg.qr(columns)  # (m, 2 r)
    change = change - change @ row_basis @ row_basis.T
    return change - column_basis @ (column_basis.T @ change)


@torch.no_grad()
def noise_in_plane(lora: nn.Module, flat: nn.Module, worst: Sequence[Tensor], sigma: float) -> Tensor:
    """Where draws of the full noise on Flat-LoRA's W' lie in the plane, (DOTS, 2)."""
    places = torch.zeros(DOTS, 2)
    ends = zip(lora_layers(lora).values(), lora_layers(flat).values())
    length = 0.0
    for i, ((start, end), along_y) in enumerate(zip(ends, worst)):
        change_of_A = end.lora_A - start.lora_A
        change_of_B = end.lora_B - start.lora_B
        along_x = end.scaling * (change_of_B @ end.lora_A + end.lora_B @ change_of_A)  # (m, n), dW' / dx at x = 1
        length += float(along_x.square().sum())
        for dot in range(DOTS):
            noise = flatlora.draw_noise(end.weight, sigma, ("picture", dot, i))
            eps = noise.signed_std * noise.normals  # (m, n)
            places[dot, 0] += (eps * along_x).sum()
            places[dot, 1] += (eps * along_y).sum()
    places[:, 0] /= length
    return places


def import_matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")  # needs no screen
    from matplotlib import colors, patheffects, pyplot  # noqa: F401

    return matplotlib


def save_picture(plane: Plane, theme: Theme, path: Path) -> None:
    matplotlib = import_matplotlib()
    figure, axes = matplotlib.pyplot.subplots(figsize=(6, 4.3), layout="constrained", facecolor=theme.paper)
    draw_loss(plane, theme, axes, matplotlib)
    across, up = MAGNIFIED * plane.dots.T
    axes.plot(1 + across, up, ".", color=theme.flat, markersize=4, alpha=0.55)

    bars = [bar(plane, 0.0), bar(plane, 1.0)]
    for x, colour, (first, last) in zip((0, 1), (theme.lora, theme.flat), bars):
        axes.plot([x, x], [first, last], "_-", color=colour, linewidth=2.5, markersize=14, markeredgewidth=2.5)
        axes.plot(x, 0, "o", color=colour, markersize=11, markeredgecolor=theme.paper)

    halo = matplotlib.patheffects.withStroke(linewidth=4, foreground=theme.paper)
    style = {"fontsize": 15, "horizontalalignment": "center", "path_effects": [halo]}
    top = float(plane.y[-1])
    axes.text(0, 0.82 * top, "high loss", color=theme.ink, **style)
    axes.text(0.5, 0, "low loss", color=theme.ink, verticalalignment="center", **style)
    axes.text(1, 0.82 * top, "noise in training", color=theme.flat, **style)
    for x, colour, words, (first, _) in zip((0, 1), (theme.lora, theme.flat), described(bars), bars):
        below = max(first - 0.05 * top, -0.68 * top)
        axes.text(x, below, words, color=colour, weight="bold", verticalalignment="top", **style)

    axes.set_xlabel("\u2190 within reach of A and B \u2192", color=theme.ink, fontsize=15)
    axes.set_ylabel("\u2190 out of their reach \u2192", color=theme.ink, fontsize=15)
    axes.set_xlim(float(plane.x[0]), float(plane.x[-1]))
    axes.set_ylim(-top, top)
    figure.savefig(path, dpi=160)
    matplotlib.pyplot.close(figure)


def draw_loss(plane: Plane, theme: Theme, axes: Any, matplotlib: Any) -> None:
    colours = matplotlib.colors.LinearSegmentedColormap.from_list("loss", [theme.low, theme.high])
    norm = matplotlib.colors.BoundaryNorm(LEVELS, colours.N, extend="max")
    grid = (plane.x, plane.y, plane.loss, LEVELS)
    axes.contourf(*grid, cmap=colours, norm=norm, extend="max")
    axes.contour(*grid, colors=theme.ink, linewidths=0.4, alpha=0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def bar(plane: Plane, x: float) -> tuple[float, float]:
    """From where to where, around y = 0, the loss is less than RISE above that at y = 0."""
    column = plane.loss[:, (plane.x - x).abs().argmin()]  # (Y,)
    middle = len(column) // 2
    low = column < column[middle] + RISE
    first = middle
    while first > 0 and low[first]:
        first -= 1
    last = middle
    while last < len(column) - 1 and low[last]:
        last += 1
    return float(plane.y[first]), float(plane.y[last])


def described(bars: Sequence[tuple[float, float]]) -> list[str]:
    """The names of the two points, and their valleys, if one is half as wide again as the other."""
    lora, flat = (last - first for first, last in bars)
    if flat > 1.5 * lora:
        return ["LoRA:\nnarrow valley", "Flat-LoRA:\nwide valley"]
    if lora > 1.5 * flat:
        return ["LoRA:\nwide valley", "Flat-LoRA:\nnarrow valley"]
    return ["LoRA", "Flat-LoRA"]


# ---- The command ---------------------------------------------------------------------------------------------

LIMITS = {  # the least and the most that an option may be
    "seeds": (2, 10_000),
    "pretrain_steps": (2, 1_000_000),
    "steps": (2, 1_000_000),
    "lr": (0, 100),
    "r": (1, 1000),
    "alpha": (0, 1000),
    "dropout": (0, 1),
    "sigma": (0, 100),
    "rho": (0, 1000),
}


def main() -> None:
    try:
        run(arguments())
    except (ValueError, FloatingPointError, OSError) as error:
        raise SystemExit(f"train_toy.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("\ntrain_toy.py: stopped") from None


def arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    methods_help = "of flat, sam and sam-full, those to train beside lora (flat sam)"
    add("--methods", nargs="+", default=["flat", "sam"], choices=LETTERS, metavar="METHOD", help=methods_help)
    add("--seeds", type=int, default=20, help="number of target tasks (%(default)s)")
    add("--out", type=Path, default=Path("out"), help="folder for toy.json (%(default)s)")
    add("--plot", type=Path, metavar="NAME", help="draw NAME-light.png and NAME-dark.png")
    add("--pretrain-steps", type=int, metavar="STEPS", default=1500, help="steps on the source task (%(default)s)")
    add("--steps", type=int, default=Settings.steps, help="steps of each fine-tuning (%(default)s)")
    add("--lr", type=float, default=Settings.lr, help="AdamW's, decayed along a cosine (%(default)s)")
    add("--r", type=int, default=Settings.r, help="rank of the adapters (%(default)s)")
    add("--alpha", type=float, default=Settings.alpha, help="their scaling is alpha / r (%(default)s)")
    add("--dropout", type=float, default=Settings.dropout, help="on the input of the adapters (%(default)s)")
    add("--sigma", type=float, default=Settings.sigma, help="flat: strength of the noise (%(default)s)")
    add("--schedule", default=Settings.schedule, choices=["cosine", "constant"], help="flat: how it grows (cosine)")
    add("--rho", type=float, default=Settings.rho, help="sam: radius on A, B; sam-full: on W' (%(default)s)")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Train, write toy.json, print."""
    torch.set_num_threads(1)  # the layers are too small to share, and one thread gives the same sums everywhere
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    methods = list(dict.fromkeys(["lora", *args.methods]))
    check(args)

    teacher, student = source_task(args.pretrain_steps)
    runs = []
    for seed in tqdm(range(args.seeds), desc="fine-tune on target tasks", leave=False):
        splits = target_task(teacher, seed)
        for method in methods:
            model = finetune(student, splits["train"], method, seed, settings)
            runs.append({"method": method, "seed": seed, **measure(model, splits, seed)})
    summary = summarise(runs, methods)

    config = {"methods": methods, "seeds": args.seeds, "pretrain_steps": args.pretrain_steps, **asdict(settings)}
    content = {"config": config, "torch": torch.__version__, "summary": summary, "runs": runs}
    write(args.out / "toy.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    show(f"\nMean over {args.seeds} target tasks, ± 95 % interval of the paired difference:\n\n{table(summary)}")
    show(f"\nLandscape, the rise of the training loss under noise (the sharpness):\n\n{chart(summary['mean'])}")
    show(f"\n{verdict(summary)}\n\nAll numbers: {args.out / 'toy.json'}")

    if args.plot:
        plot(teacher, student, settings, args.plot)


def check(args: argparse.Namespace) -> None:
    """ValueError or OSError for what would else end the run after its work is done."""
    for name, (least, most) in LIMITS.items():
        value = getattr(args, name)
        if not least <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')} must be from {least} to {most}, got {value}")
    inject_lora(mlp(), args.r, args.alpha, args.dropout)

    check_writable(args.out / "toy.json")
    if args.plot:
        import_matplotlib()
        if args.sigma == 0 or args.lr == 0:
            raise ValueError("--plot needs --sigma and --lr above 0, or both methods end in one point")
        if 2 * args.r >= HIDDEN:
            raise ValueError(f"--plot needs --r below {HIDDEN // 2}, or nothing is out of reach of A and B")
        for word in THEMES:
            check_writable(picture_file(args.plot, word))


def check_writable(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")


def write(path: Path, text: str) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # renamed when whole: an earlier file survives a full disk
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def show(text: str) -> None:
    """Print what the stream has letters for: redirected on Windows, or under LANG=C, it may know ASCII only."""
    encoding = sys.stdout.encoding or "utf-8"
    if text.encode(encoding, "replace").decode(encoding) != text:
        text = text.replace("± ", "+-").encode(encoding, "replace").decode(encoding)
    print(text, flush=True)


def plot(teacher: nn.Sequential, student: nn.Sequential, settings: Settings, name: Path) -> None:
    """The first target task, in a light and a dark picture."""
    train = target_task(teacher, 0)["train"]
    lora = finetune(student, train, "lora", 0, settings)
    flat = finetune(student, train, "flat", 0, settings)
    plane = slice_of_loss(lora, flat, train, settings.sigma)
    for word, theme in THEMES.items():
        path = picture_file(name, word)
        save_picture(plane, theme, path)
        show(f"Picture: {path}")


def picture_file(name: Path, word: str) -> Path:
    return name.with_name(f"{name.name}-{word}.png")


if __name__ == "__main__":
    main()
