"""The idea of Flat-LoRA in a minute, on a toy MLP: LoRA, Flat-LoRA and SAM.

    python train_toy.py    # twenty target tasks: tables, landscape, verdict, out/toy.json

A random teacher network labels the source task, on which a student is trained
once. Each target task moves the teacher by matrices of low rank, so that LoRA
can follow. It has 300 training samples, a tenth of them labelled at random. The
"shifted" test has the same labels on inputs that are moved and wider. On one
task all methods start from the same adapters and see the same batches, so that
their differences are paired.
"""

import copy
import json
import math
import os
import statistics
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from flatlora import LoRALinear, filter_std, flat_lora_step, inject_lora, lora_parameters, sam_step, sharpness, sigma_at

INPUTS, HIDDEN, CLASSES, TRAIN, TEST, BATCH = 16, 64, 4, 300, 4000, 64
METHODS = {"lora": "L", "flat": "F", "sam": "S", "sam-full": "W"}  # and their letters in the landscape
STRENGTHS, SHOWN = (0.15, 0.3, 0.45, 0.6), 0.3  # sigma of the noise: in the landscape, and in the table
SPACES = {"lora": "LoRA space", "full": "full space", "equal": "full, equal |dW'|"}  # the panels of the landscape
ROWS = {  # of the table
    "train_loss": "training loss",
    "test_loss": "test loss",
    "shifted_loss": "shifted test loss",
    "test_acc": "test accuracy, %",
    f"lora_{SHOWN}": "sharpness, LoRA space",
    f"full_{SHOWN}": "sharpness, full space",
    f"equal_{SHOWN}": "sharpness, equal |dW'|",
}
# Seeds count from here, since two uses of one stream of numbers would be correlated: the adapters with the task.
SOURCE, TARGET, ADAPTERS, BATCHES = 0, 1_000_000, 2_000_000, 3_000_000
Data = tuple[Tensor, Tensor]  # inputs (N, INPUTS), labels (N,)

# ---- Task and training ----------------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    layers = [nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)]
    return nn.Sequential(*layers)


def source_task(steps: int = 1500) -> tuple[nn.Sequential, nn.Sequential]:
    """A random teacher, and a student trained on its labels."""
    torch.manual_seed(SOURCE)
    teacher, student = mlp().requires_grad_(False), mlp()
    for layer in teacher[::2]:
        nn.init.normal_(layer.weight, std=1.4 / math.sqrt(layer.in_features))  # sqrt(2 / n) keeps ReLU variance
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in tqdm(range(steps), desc="pre-train the student", leave=False):
        flat_lora_step(student, loss_fn, [draw(teacher, 256)], optimizer, sigma=0, seed=step)
        decay.step()
    return teacher, student


def target_task(teacher: nn.Sequential, seed: int, change: float = 0.3, label_noise: float = 0.1) -> dict[str, Data]:
    """The splits of a task whose teacher moved: each weight by a random matrix of rank 2 and relative norm `change`."""
    torch.manual_seed(TARGET + seed)
    moved = copy.deepcopy(teacher)
    for layer in moved[::2]:
        delta = torch.randn(layer.out_features, 2) @ torch.randn(2, layer.in_features)  # (m, n)
        layer.weight += delta * (change * layer.weight.norm() / delta.norm())
    test, direction = draw(moved, TEST), F.normalize(torch.randn(INPUTS), dim=0)
    shifted = 1.25 * torch.randn(TEST, INPUTS) + 0.5 * math.sqrt(INPUTS) * direction  # (TEST, INPUTS)
    return {"train": draw(moved, TRAIN, label_noise), "test": test, "shifted": (shifted, moved(shifted).argmax(1))}


def draw(teacher: nn.Sequential, n: int, label_noise: float = 0.0) -> Data:
    x = torch.randn(n, INPUTS)
    y = teacher(x).argmax(1)  # (n,)
    return x, torch.where(torch.rand(n) < label_noise, torch.randint(CLASSES, (n,)), y)


def loss_fn(model: nn.Module, batch: Data) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def finetune(
    student: nn.Sequential,
    train: Data,
    method: str,
    seed: int,
    *,
    steps: int = 300,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    r: int = 4,
    alpha: float = 8.0,
    dropout: float = 0.0,
    sigma: float = 0.6,
    schedule: str = "cosine",
    rho: float = 0.2,
) -> nn.Module:
    """The student with trained adapters, in evaluation mode. The seed fixes adapters and batches for every method."""
    torch.manual_seed(ADAPTERS + seed)
    model = inject_lora(copy.deepcopy(student), r, alpha, dropout)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=lr, weight_decay=weight_decay)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    picks = torch.randint(len(train[0]), (steps, BATCH), generator=torch.Generator().manual_seed(BATCHES + seed))
    for step, pick in enumerate(picks):
        batches = [(train[0][pick], train[1][pick])]
        if method in ("sam", "sam-full"):
            sam_step(model, loss_fn, batches, optimizer, rho, space="lora" if method == "sam" else "full")
        else:
            strength = sigma_at(step, steps, sigma, schedule) if method == "flat" else 0.0
            flat_lora_step(model, loss_fn, batches, optimizer, strength, seed=(seed, step))
        decay.step()
    return model.eval()


# ---- Measures ------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(model: nn.Module, splits: dict[str, Data], seed: int, samples: int = 10) -> dict[str, float]:
    """Losses, accuracies, and the sharpness at each of the STRENGTHS in each of the SPACES."""
    result = {}
    for name, (x, y) in splits.items():
        logits = model(x)
        result[f"{name}_loss"] = F.cross_entropy(logits, y).item()
        result[f"{name}_acc"] = 100 * (logits.argmax(1) == y).double().mean().item()
    for sigma in STRENGTHS:
        moved = result[f"moved_{sigma}"] = moved_by(model, sigma)
        for space, where, strength in (("lora", "lora", sigma), ("full", "full", sigma), ("equal", "full", moved)):
            result[f"{space}_{sigma}"] = sharpness(model, loss_fn, [splits["train"]], strength, samples, seed, where)
    return result


@torch.no_grad()
def moved_by(model: nn.Module, sigma: float) -> float:
    """How far noise of strength sigma on A and B moves the W' of all layers: the root of E|dW'|_F^2 / |W'|_F^2.

    It is also the sigma of noise on W' of that size. Noise b on B and a on A moves W' by s (b A + B a + b a). By eq. 7
    the entries in row i of b have variance vb_i, those in row k of a va_k. All have mean zero and are uncorrelated, so
    the three parts are too:

        E|dW'|_F^2 = s^2 (sum_i vb_i |A|_F^2 + n sum_k va_k |B_:k|^2 + n sum_i vb_i sum_k va_k)
    """
    moved = whole = 0.0
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            a, b, n = layer.lora_A, layer.lora_B, layer.in_features
            var_a, var_b = filter_std(a, sigma).square(), filter_std(b, sigma).square()  # (r, 1), (m, 1)
            by_one = var_b.sum() * a.square().sum() + n * (b.square().sum(0) @ var_a)
            by_both = n * var_b.sum() * var_a.sum()
            moved += layer.scaling**2 * float(by_one + by_both)
            whole += float(layer.weight.square().sum())
    return math.sqrt(moved / whole)


# ---- Report --------------------------------------------------------------------------------------------------

# 97.5 % points of Student's t for 1 to 30 degrees of freedom.
T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
T975 += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval. Above 31 values it is up to 4 % too wide, never too narrow."""
    t = T975[min(len(values) - 1, len(T975)) - 1]
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values))


def summarise(runs: list[dict[str, Any]], methods: list[str]) -> dict[str, Any]:
    """Means, paired differences to LoRA, and how much sharper LoRA's minima are in the full space at equal |dW'|."""
    by = {method: [run for run in runs if run["method"] == method] for method in methods}  # in the order of the seeds
    keys = [key for key in runs[0] if key not in ("method", "seed")]
    mean = {m: {key: statistics.fmean(run[key] for run in by[m]) for key in keys} for m in methods}
    pairs = {m: list(zip(by[m], by["lora"])) for m in methods if m != "lora"}
    difference = {m: {key: interval([a[key] - b[key] for a, b in pairs[m]]) for key in keys} for m in pairs}
    gap = interval([run[f"equal_{SHOWN}"] - run[f"lora_{SHOWN}"] for run in by["lora"]])
    return {"mean": mean, "difference": difference, "gap": gap}


def table(summary: dict[str, Any]) -> str:
    """LoRA's means, and the differences of the others to them."""
    mean, difference = summary["mean"]["lora"], summary["difference"]
    lines = [f"{'':<22}{'lora':>7}" + "".join(f"{m + ' - lora':>17}" for m in difference)]
    for key, label in ROWS.items():
        digits = 1 if label.endswith("%") else 4 if label.startswith("sharpness") else 3
        cells = [f"{d[key][0]:+.{digits}f} ± {d[key][1]:.{digits}f}" for d in difference.values()]
        lines.append(f"{label:<22}{mean[key]:>7.{digits}f}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def chart(mean: dict[str, dict[str, float]], height: int = 12) -> str:
    """The landscape as text: a panel per space, one scale, a letter per method, side by side. Falls stand at 0."""
    columns = [f"{space}_{sigma}" for space in SPACES for sigma in STRENGTHS]
    top = max(1e-9, *(mean[m][column] for m in mean for column in columns))
    lines = ["rise    " + "  ".join(f"{label:<20}" for label in SPACES.values()).rstrip()]
    for level in range(height, -1, -1):
        line = f"{top * level / height:.3f}"
        for i, column in enumerate(columns):
            levels = {METHODS[m]: round(max(0.0, rises[column]) / top * height) for m, rises in mean.items()}
            marks = "".join(letter if at == level else " " for letter, at in levels.items())
            line += f"{'' if i % len(STRENGTHS) else ' |'} {marks:<4}"
        lines.append(line.rstrip())
    axis = "".join(f" {sigma:<4g}" for sigma in STRENGTHS)
    return "\n".join([*lines, "sigma  " + "  ".join([axis] * len(SPACES)).rstrip()])


def verdict(summary: dict[str, Any]) -> str:
    """What the intervals allow to say."""
    lines = []
    for method, difference in summary["difference"].items():
        mean, half = difference["test_loss"]
        words = "not shown to differ from" if abs(mean) <= half else "lower than" if mean < 0 else "higher than"
        passes = "two passes" if method.startswith("sam") else "one pass"
        lines.append(f"Test loss of {method} ({passes} per step): {words} LoRA's.")
    low, full, equal, moved = (summary["mean"]["lora"][f"{key}_{SHOWN}"] for key in ("lora", "full", "equal", "moved"))
    gap, half = summary["gap"]
    words = "sharper, as in Figure 1" if gap > 0 else "flatter: Figure 1 is NOT supported here"
    words = words if abs(gap) > half else "not shown to differ: Figure 1 is neither supported nor refuted here"
    lines += [
        "\nFigure 1 of the paper: flat in LoRA space, yet sharp in the full space. At",
        f"LoRA's minima, noise of sigma {SHOWN} raises the loss",
        f"  by {low:.4f} on A and B, which moves W' by {100 * moved:.0f} % of its norm,",
        f"  by {full:.4f} on W', which moves it by {100 * SHOWN:.0f} %,",
        f"  by {equal:.4f} on W', weakened so as to move it by {100 * moved:.0f} % too.",
        f"The last less the first is {gap:+.4f} ± {half:.4f}: at equal |dW'| the full space",
        f"is {words}.",
    ]
    return "\n".join(lines)


def show(text: str) -> None:
    """Print what the stream has letters for: redirected on Windows, or under LANG=C, it may know ASCII only."""
    encoding = sys.stdout.encoding or "utf-8"
    if text.encode(encoding, "replace").decode(encoding) != text:
        text = text.replace("± ", "+-").encode(encoding, "replace").decode(encoding)
    print(text)


def main() -> None:
    formatter = RawDescriptionHelpFormatter
    parser = ArgumentParser(usage="%(prog)s [options]", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--methods", nargs="+", default=["flat", "sam"], choices=METHODS, help="what to compare with lora (flat sam)")
    add("--seeds", type=int, default=20, help="number of target tasks (20)")
    add("--out", type=Path, default=Path("out"), help="folder for toy.json (out)")
    add("--pretrain-steps", type=int, default=1500, help="steps on the source task (1500)")
    add("--steps", type=int, default=300, help="optimizer steps of each fine-tuning (300)")
    add("--lr", type=float, default=1e-3, help="AdamW's learning rate, decayed along a cosine (1e-3)")
    add("--r", type=int, default=4, help="rank of the adapters (4)")
    add("--alpha", type=float, default=8, help="their scaling is alpha / r (8)")
    add("--dropout", type=float, default=0.0, help="on the input of the adapters (0)")
    add("--sigma", type=float, default=0.6, help="flat: strength of the noise; a large model takes 0.05 to 0.1 (0.6)")
    add("--schedule", default="cosine", choices=["cosine", "linear", "constant"], help="flat: its growth (cosine)")
    add("--rho", type=float, default=0.2, help="sam: radius on A and B; sam-full: on W' (0.2)")
    try:
        run(**vars(parser.parse_args()))
    except (ValueError, FloatingPointError, OSError) as error:
        raise SystemExit(f"train_toy.py: {error}") from None


def run(methods: list[str], seeds: int, out: Path, pretrain_steps: int, **settings: Any) -> None:
    """Train, write toy.json, print. `settings` are those of `finetune`."""
    torch.set_num_threads(1)  # the layers are too small to share, and one thread gives the same sums everywhere
    methods = list(dict.fromkeys(["lora", *methods]))
    config = {"methods": methods, "seeds": seeds, "pretrain_steps": pretrain_steps, **settings}
    for name, low in (("seeds", 2), ("pretrain_steps", 2), ("steps", 2), ("lr", 0), ("sigma", 0), ("rho", 0)):
        if not low <= config[name] < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low} and finite, got {config[name]}")
    inject_lora(mlp(), settings["r"], settings["alpha"], settings["dropout"])  # bad ones end here, not in a minute
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()  # and so does a folder that cannot be written
    teacher, student = source_task(pretrain_steps)
    runs = []
    for seed in tqdm(range(seeds), desc="fine-tune on target tasks", leave=False):
        splits = target_task(teacher, seed)
        for method in methods:
            model = finetune(student, splits["train"], method, seed, **settings)
            runs.append({"method": method, "seed": seed, **measure(model, splits, seed)})
    summary = summarise(runs, methods)
    content = {"config": config, "torch": torch.__version__, "summary": summary, "runs": runs}
    temporary = out / f"toy.{os.getpid()}.tmp"  # renamed when whole: an earlier toy.json survives a full disk
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, out / "toy.json")
    show(f"\nMean over {seeds} target tasks, ± 95 % interval of the paired difference:\n\n{table(summary)}")
    show(f"\nLandscape, the rise of the training loss under noise (the sharpness):\n\n{chart(summary['mean'])}")
    show(f"\n{verdict(summary)}\n\nAll numbers: {out / 'toy.json'}")


if __name__ == "__main__":
    main()
