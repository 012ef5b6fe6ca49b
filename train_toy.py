"""The idea of Flat-LoRA in a minute, on a toy network: LoRA, Flat-LoRA and SAM.

    python train_toy.py

fine-tunes with each method on twenty target tasks, prints a table and writes
out/toy.json. For the picture, train long enough that LoRA overfits:

    python train_toy.py --seeds 2 --steps 1500 --lr 3e-3 --plot idea

A random network, the teacher, labels the source task, on which a student is
trained once. For each target task, low-rank matrices are added to the teacher's
weights, a change that LoRA can follow. A target task has 300 training samples,
a tenth of them labelled at random. The "shifted" test set is labelled by the
same teacher; its inputs have a shifted mean and a larger variance. On each task
all methods start from the same adapters and see the same batches, so that their
differences are paired.
"""

from __future__ import annotations

import copy
import json
import math
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import flatlora
from flatlora import LossFn, Noise, lora_layers, lora_parameters

INPUTS = 16
HIDDEN = 64
CLASSES = 4
TRAIN = 300  # samples
TEST = 4000
BATCH = 64
R = 4  # rank of the adapters
ALPHA = 8  # their scaling is ALPHA / R
METHODS = ["lora", "flat", "sam", "sam-full"]  # sam-full: SAM on W' itself

# First seed of each use. The ranges are apart, since two uses of the same seed would draw correlated numbers.
SOURCE = 0
TARGET = 1_000_000
ADAPTERS = 2_000_000
BATCHES = 3_000_000

Data = tuple[Tensor, Tensor]  # inputs (N, INPUTS), labels (N,)
Run = dict[str, float]  # what was measured after one fine-tuning


# ---- The tasks -----------------------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(INPUTS, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, CLASSES),
    )


def source_task(steps: int = 1500) -> tuple[nn.Sequential, nn.Sequential]:
    """A random teacher, and a student trained on its labels."""
    torch.manual_seed(SOURCE)
    teacher = mlp().requires_grad_(False)
    student = mlp()
    for layer in teacher[::2]:
        nn.init.normal_(layer.weight, std=1.4 / math.sqrt(layer.in_features))  # sqrt(2 / n) keeps ReLU variance

    optimizer = AdamW(student.parameters(), lr=3e-3)
    decay = CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), desc="pre-train the student", leave=False):
        optimizer.zero_grad()
        loss_fn(student, draw(teacher, 256)).backward()
        optimizer.step()
        decay.step()
    return teacher, student


def target_task(teacher: nn.Sequential, seed: int) -> dict[str, Data]:
    """The splits of one task. Its teacher has a random matrix of rank 2 and relative norm 0.3 added to each weight."""
    torch.manual_seed(TARGET + seed)
    moved = copy.deepcopy(teacher)
    for layer in moved[::2]:
        delta = torch.randn(layer.out_features, 2) @ torch.randn(2, layer.in_features)
        layer.weight += delta * (0.3 * layer.weight.norm() / delta.norm())

    test = draw(moved, TEST)
    shift = 2 * F.normalize(torch.randn(INPUTS), dim=0)
    x = 1.25 * torch.randn(TEST, INPUTS) + shift
    train = draw(moved, TRAIN, label_noise=0.1)
    return {"train": train, "test": test, "shifted": (x, moved(x).argmax(1))}


def draw(teacher: nn.Sequential, n: int, label_noise: float = 0.0) -> Data:
    """n inputs with the teacher's labels, a fraction `label_noise` of them replaced by random ones."""
    x = torch.randn(n, INPUTS)
    y = teacher(x).argmax(1)  # (n,)
    replaced = torch.rand(n) < label_noise
    return x, torch.where(replaced, torch.randint(CLASSES, (n,)), y)


def loss_fn(model: nn.Module, batch: Data) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


# ---- Training ------------------------------------------------------------------------------------------------


def finetune(student: nn.Sequential, train: Data, method: str, seed: int, args: Namespace) -> nn.Sequential:
    """The student with trained adapters. The seed fixes the initial adapters and the batches for every method."""
    torch.manual_seed(ADAPTERS + seed)
    model = copy.deepcopy(student)
    flatlora.inject_lora(model, R, ALPHA, targets=["0", "2", "4"])
    optimizer = AdamW(lora_parameters(model), lr=args.lr, weight_decay=0.0)
    decay = CosineAnnealingLR(optimizer, args.steps)
    generator = torch.Generator().manual_seed(BATCHES + seed)
    picks = torch.randint(TRAIN, (args.steps, BATCH), generator=generator)

    x, y = train
    for step, pick in enumerate(picks):
        batches = [(x[pick], y[pick])]
        if method == "lora":
            flatlora.flat_lora_step(model, loss_fn, batches, optimizer, sigma=0.0, seed=0)  # no noise: plain LoRA
        elif method == "flat":
            sigma = flatlora.sigma_at(step, args.steps, args.sigma)
            flatlora.flat_lora_step(model, loss_fn, batches, optimizer, sigma, seed=(seed, step))
        elif method == "sam":
            flatlora.sam_step(model, loss_fn, batches, optimizer, args.rho)
        else:
            sam_on_merged_step(model, loss_fn, batches, optimizer, args.rho)
        decay.step()
    return model


def sam_on_merged_step(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    optimizer: Optimizer,
    rho: float,
    max_grad_norm: float = math.inf,
) -> float:
    """One step of SAM on W' itself, which Flat-LoRA approximates at lower cost (eq. 5). Returns the first pass's loss.

    W' moves by rho along its gradient, normalised over all layers; the gradient there updates A and B. A step takes two
    passes, and two matrices of the size of W per layer. W must be float32: half precision would round the shift away.
    """
    loss, gradients = merged_gradients(model, loss_fn, batches)
    norm = nn.utils.get_total_norm(gradients).clamp_min(1e-12)
    shifts = [rho * gradient / norm for gradient in gradients]

    optimizer.zero_grad()
    with shifted(model, shifts):
        flatlora.add_gradient(model, loss_fn, batches)
    flatlora.update(model, optimizer, max_grad_norm)
    return loss


@torch.enable_grad()
def merged_gradients(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any]) -> tuple[float, list[Tensor]]:
    """The mean loss, and its gradient with respect to each W' (equal to that of W). Also adds to `.grad` of A and B."""
    weights = [layer.frozen_weight for layer in lora_layers(model).values()]
    try:
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = torch.zeros_like(weight)
        loss = flatlora.add_gradient(model, loss_fn, batches)
        return loss, [weight.grad for weight in weights]
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


@contextmanager
def shifted(model: nn.Module, shifts: Sequence[Tensor]) -> Iterator[None]:
    """Inside, each layer computes with W' + its shift (m, n), as it does with noise: nothing is written."""
    layers = lora_layers(model).values()
    try:
        for layer, shift in zip(layers, shifts):
            layer.noise = Noise(torch.ones_like(shift[:, :1]), shift)  # scale 1, so eps is the shift
        yield
    finally:
        for layer in layers:
            layer.noise = None


# ---- Measures ------------------------------------------------------------------------------------------------

SIGMA = 0.3  # of the noise in all sharpness measures
SAMPLES = 10


@torch.no_grad()
def measure(model: nn.Module, splits: dict[str, Data], seed: int) -> Run:
    """Losses, accuracies in per cent, and the sharpness in LoRA space, in the full space and at equal |dW'|."""
    result = {}
    for name, (x, y) in splits.items():
        logits = model(x)  # (N, CLASSES)
        right = logits.argmax(1) == y
        result[f"{name}_loss"] = F.cross_entropy(logits, y).item()
        result[f"{name}_acc"] = 100 * right.double().mean().item()

    train = splits["train"]
    result["lora_space"], result["moved"] = noise_on_factors(model, train, seed)
    result["full_space"] = flatlora.sharpness(model, loss_fn, [train], SIGMA, SAMPLES, seed)
    result["equal"] = flatlora.sharpness(model, loss_fn, [train], result["moved"], SAMPLES, seed)
    return result


def noise_on_factors(model: nn.Module, train: Data, seed: int) -> tuple[float, float]:
    """The mean rise of the loss under noise on A and B, drawn by eq. 7 from their rows, and the mean |dW'| / |W'|.

    The second value is also the sigma at which noise on W' moves W' equally far.
    """
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    W = merged(model)
    clean = loss_fn(model, train).item()
    rises = []
    distances = []
    for sample in range(SAMPLES):
        shifts = []
        for name, factor in factors.items():
            noise = flatlora.draw_noise(factor, SIGMA, ("factors", seed, sample), name)
            shifts.append(noise.scale * noise.normals)
        with flatlora.moved(list(factors.values()), shifts):
            rises.append(loss_fn(model, train).item() - clean)
            distances.append(float((merged(model) - W).norm() / W.norm()))
    return fmean(rises), fmean(distances)


def merged(model: nn.Module) -> Tensor:
    """W' of all layers as one vector, inside `perturbed` with the noise."""
    return torch.cat([layer.weight.flatten() for layer in lora_layers(model).values()])


# ---- The table -----------------------------------------------------------------------------------------------

ROWS = {
    "training loss": "train_loss",
    "test loss": "test_loss",
    "shifted test loss": "shifted_loss",
    "test accuracy, %": "test_acc",
    "sharpness, LoRA space": "lora_space",
    "sharpness, full space": "full_space",
    "sharpness, equal |dW'|": "equal",
    "|dW'| / |W'|": "moved",
}
NOTES = f"""
Sharpness: the rise of the training loss under noise of sigma {SIGMA}. In LoRA space
the noise is on A and B; the last row says how far that moves W'. In the full
space it is on W'. At equal |dW'| it is on W' too, but scaled down so that it
moves W' only as far as in LoRA space.
"""

# 97.5 % points of Student's t for 1 to 20 degrees of freedom. Above 21 seeds, intervals are up to 7 % too wide.
T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]
T975 += [2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086]


def table(runs: dict[str, list[Run]]) -> str:
    """LoRA's means, and the mean differences of the other methods from LoRA, paired by task, with 95 % intervals."""
    lines = [f"{'':<22}{'lora':>7}"]
    for method in METHODS[1:]:
        lines[0] += f"{method + ' - lora':>17}"

    for label, key in ROWS.items():
        digits = 1 if key == "test_acc" else 4
        lora = [run[key] for run in runs["lora"]]
        line = f"{label:<22}{fmean(lora):>7.{digits}f}"
        for method in METHODS[1:]:
            differences = [run[key] - other for run, other in zip(runs[method], lora)]
            cell = f"{fmean(differences):+.{digits}f} +-{half_interval(differences):.{digits}f}"
            line += f"{cell:>17}"
        lines.append(line)
    return "\n".join(lines)


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of their mean."""
    n = len(values)
    t = T975[min(n - 2, len(T975) - 1)]
    return t * stdev(values) / math.sqrt(n)


# ---- The picture ---------------------------------------------------------------------------------------------

ACROSS = torch.linspace(-0.4, 1.5, 39)  # x: A and B go from those of LoRA, at 0, to those of Flat-LoRA, at 1
UP = torch.linspace(-18, 18, 61)  # y: W' moves out of reach of A and B, in per cent of its norm
LEVELS = torch.arange(-2, 4, 0.5)  # of the logarithm of the loss
RISE = 0.5  # how much the loss has risen at the ends of a bar
DOTS = 150
MAGNIFIED = 5  # factor on the noise in the picture: noise spreads over all directions, and the plane shows only two
STYLES = {"light": "default", "dark": "dark_background"}  # of matplotlib


def plot(lora: nn.Sequential, flat: nn.Sequential, train: Data, args: Namespace) -> None:
    """The training loss around the two minima, in a light and a dark picture."""
    from matplotlib import pyplot

    loss, dots = plane(lora, flat, train, args.sigma)
    for name, style in STYLES.items():
        with pyplot.style.context([style, {"font.size": 14}]):
            figure, axes = pyplot.subplots(figsize=(6, 4.9), layout="constrained")
            draw_plane(axes, loss, dots)
            figure.legend(loc="outside upper center")
            figure.savefig(f"{args.plot}-{name}.png", dpi=160)


@torch.no_grad()
def plane(lora: nn.Sequential, flat: nn.Sequential, train: Data, sigma: float) -> tuple[Tensor, Tensor]:
    """The training loss (Y, X), and where noise draws on Flat-LoRA's W' lie in the plane, relative to W': (DOTS, 2)."""
    size = merged(lora).norm() / 100
    up = [size * part for part in steep_direction(lora, flat, train)]
    starts = lora_parameters(lora)
    across = [end - start for start, end in zip(starts, lora_parameters(flat))]
    loss = torch.empty(len(UP), len(ACROSS))
    for column, x in enumerate(ACROSS):
        with flatlora.moved(starts, [x * part for part in across]):
            for row, y in enumerate(UP):
                with shifted(lora, [y * part for part in up]):
                    loss[row, column] = loss_fn(lora, train)

    W = merged(flat)
    # The two are orthogonal, since the second is orthogonal to all changes within reach of A and B.
    basis = torch.stack([W - merged(lora), torch.cat([part.flatten() for part in up])])  # (2, weights)
    dots = torch.empty(DOTS, 2)
    for dot in range(DOTS):
        with flatlora.perturbed(flat, sigma, ("picture", dot)):
            dots[dot] = basis @ (merged(flat) - W) / basis.square().sum(1)
    return loss, dots


def steep_direction(lora: nn.Sequential, flat: nn.Sequential, train: Data) -> list[Tensor]:
    """A direction of W', (m, n) per layer and of total norm 1, along which the sum of both losses rises steeply.

    It is out of reach of A and B: orthogonal to every change s (b A + B a) of W' that small changes a of A and b of B
    make at either minimum. Found by power iteration: a step of length 1, the gradient there, a step along that
    gradient, and so on.
    """
    direction = [torch.zeros_like(layer.frozen_weight) for layer in lora[::2]]
    for _ in range(30):
        with shifted(lora, direction), shifted(flat, direction):
            _, by_lora = merged_gradients(lora, loss_fn, [train])
            _, by_flat = merged_gradients(flat, loss_fn, [train])
        for i, (one, other) in enumerate(zip(lora[::2], flat[::2])):
            A = torch.cat([one.lora_A, other.lora_A])  # (2 r, n)
            B = torch.cat([one.lora_B, other.lora_B], dim=1)  # (m, 2 r)
            both = by_lora[i] + by_flat[i]
            both -= both @ A.pinverse() @ A
            direction[i] = both - B @ B.pinverse() @ both
        length = nn.utils.get_total_norm(direction)
        direction = [part / length for part in direction]
    return direction


def draw_plane(axes: Any, loss: Tensor, dots: Tensor) -> None:
    shades = [("steelblue", i / 18) for i in range(len(LEVELS) + 1)]
    axes.contourf(ACROSS, UP, loss.log(), LEVELS, colors=shades, extend="both")
    axes.contour(ACROSS, UP, loss.log(), LEVELS, colors="gray", linewidths=0.5, linestyles="-")
    across, up = MAGNIFIED * dots.T
    axes.plot(1 + across, up, ".", color="C0", alpha=0.6, label=f"noise, magnified {MAGNIFIED} times")

    for x, name, colour in [(0, "LoRA", "C3"), (1, "Flat-LoRA", "C0")]:
        column = loss[:, (ACROSS - x).abs().argmin()]  # (Y,)
        high = column > column[len(UP) // 2] + RISE
        high[0] = True  # where the picture ends
        reach = UP.abs()[high].min()
        label = f"{name}: loss rises by < {RISE} within \u00b1{reach:.1f} %"
        axes.errorbar(x, 0, reach, color=colour, marker="o", markersize=11, linewidth=2.5, capsize=8, label=label)

    for words, place in {"high loss": loss.argmax(), "low loss": loss.argmin()}.items():
        row, column = divmod(int(place), len(ACROSS))
        axes.text(min(ACROSS[column] + 0.1, 1.1), 0.9 * UP[row], words, va="center")
    axes.set(xticks=[], xlim=(-0.4, 1.5), ylim=(-18, 18))
    axes.set_xlabel("\u2190 within reach of A and B \u2192")
    axes.set_ylabel("\u2190 out of reach of A and B, % of |W'| \u2192")


# ---- The command ---------------------------------------------------------------------------------------------

OPTIONS = {
    "seeds": (20, "number of target tasks"),
    "steps": (300, "optimizer steps per fine-tuning"),
    "lr": (1e-3, "peak learning rate of AdamW, with cosine decay"),
    "sigma": (0.6, "flat: noise at the last step"),
    "rho": (0.2, "sam: radius on A and B; sam-full: on W'"),
}


def arguments() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    for name, (default, words) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{words} ({default})")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for toy.json (out)")
    parser.add_argument("--plot", metavar="NAME", help="draw NAME-light.png and NAME-dark.png")
    args = parser.parse_args()

    for name in OPTIONS:
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name} must be above 0, got {getattr(args, name)}")
    if args.seeds == 1:
        parser.error("--seeds must be at least 2, or there is no interval")
    return args


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # more would not help such small layers, and one thread gives the same sums everywhere
    teacher, student = source_task()
    runs: dict[str, list[Run]] = {method: [] for method in METHODS}
    models: dict[str, nn.Sequential] = {}  # of the first task
    for seed in tqdm(range(args.seeds), desc="fine-tune on target tasks", leave=False):
        splits = target_task(teacher, seed)
        for method in METHODS:
            model = finetune(student, splits["train"], method, seed, args)
            models.setdefault(method, model)
            runs[method].append(measure(model, splits, seed))

    print(f"\nMeans over {args.seeds} target tasks, +- 95 % intervals of the paired differences:\n")
    print(table(runs))
    print(NOTES)
    file = args.out / "toy.json"
    content = {"options": vars(args), "runs": runs}
    file.write_text(json.dumps(content, indent=1, default=str))
    print(f"All numbers: {file}")
    if args.plot:
        plot(models["lora"], models["flat"], target_task(teacher, 0)["train"], args)


if __name__ == "__main__":
    main()
