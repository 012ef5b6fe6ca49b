"""The idea of Flat-LoRA in a minute, on a toy MLP: LoRA, Flat-LoRA and SAM.

    python train_toy.py    # ten seeds: tables, landscape, out/toy.json
    python train_toy.py --help

A random teacher network labels the source task, on which a student is trained
once. The target task is labelled by the teacher plus a change of low rank, so
that LoRA is the right model class; its training set is small and some of its
labels are wrong. Out of domain the inputs are shifted and wider. Every seed
draws a new target task; within a seed all methods start from the same adapters
and see the same batches.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import statistics
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from flatlora import flat_lora_step, inject_lora, lora_parameters, sam_step, sharpness, sigma_at

INPUTS, HIDDEN, CLASSES = 16, 64, 4
METHODS = {"lora": "L", "flat": "F", "sam": "S", "sam-full": "W"}  # and their letters in the landscape
STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # sigmas of the landscape
SHARP_AT = 0.3  # the one that the table calls sharpness
METRICS = {  # what the table shows: label, digits
    "train_loss": ("train loss", 3),
    "test_loss": ("test loss", 3),
    "ood_loss": ("out-of-domain loss", 3),
    "train_acc": ("train accuracy, %", 1),
    "test_acc": ("test accuracy, %", 1),
    "ood_acc": ("out-of-domain accuracy, %", 1),
    "sharp_lora": ("sharpness, LoRA space", 3),
    "sharp_full": ("sharpness, full space", 3),
    "time": ("time of a step / LoRA's", 2),
}
Data = tuple[Tensor, Tensor]  # inputs (N, INPUTS), labels (N,)

# ---- The task ------------------------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    hidden = [nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, CLASSES))


def random_teacher() -> nn.Sequential:
    teacher = mlp().requires_grad_(False)
    for layer in teacher[::2]:
        nn.init.normal_(layer.weight, std=1.4 / math.sqrt(layer.in_features))  # sqrt(2 / n) keeps ReLU variance
    return teacher


def low_rank_change(teacher: nn.Sequential, size: float, rank: int = 2) -> nn.Sequential:
    """The teacher of a target task: each weight moved by a random matrix of that rank and relative norm `size`."""
    changed = copy.deepcopy(teacher)
    for layer in changed[::2]:
        delta = torch.randn(layer.out_features, rank) @ torch.randn(rank, layer.in_features)  # (m, n)
        layer.weight += delta * (size * layer.weight.norm() / delta.norm())
    return changed


def draw(teacher: nn.Sequential, n: int, label_noise: float = 0.0, shifted: bool = False) -> Data:
    x = torch.randn(n, INPUTS)
    if shifted:
        x = 1.25 * x + 0.5 * math.sqrt(INPUTS) * F.normalize(torch.randn(INPUTS), dim=0)
    y = teacher(x).argmax(1)  # (n,)
    return x, torch.where(torch.rand(n) < label_noise, torch.randint(CLASSES, (n,)), y)


def loss_fn(model: nn.Module, batch: Data) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


# ---- Training ------------------------------------------------------------------------------------------------


def pretrain(teacher: nn.Sequential, steps: int) -> nn.Sequential:
    student = mlp()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in tqdm(range(steps), desc="pre-train the student", leave=False):
        flat_lora_step(student, loss_fn, [draw(teacher, 256)], optimizer, sigma=0, seed=step)
        decay.step()
    return student


def finetune(student: nn.Module, method: str, train: Data, args: argparse.Namespace, seed: int) -> tuple[Any, float]:
    """The model in evaluation mode and its median seconds a step. The seed fixes adapters, batches and noise."""
    torch.manual_seed(seed)
    model = inject_lora(copy.deepcopy(student), args.r, args.alpha)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=args.lr, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    picks = torch.randint(len(train[0]), (args.steps, args.batch_size))
    seconds = []
    for step in range(args.steps):
        batches = [(train[0][picks[step]], train[1][picks[step]])]
        start = time.perf_counter()
        if method in ("sam", "sam-full"):
            space, rho = ("lora", args.rho) if method == "sam" else ("full", args.rho_full)
            sam_step(model, loss_fn, batches, optimizer, rho, space)
        else:
            sigma = sigma_at(step, args.steps, args.sigma, args.schedule) if method == "flat" else 0.0
            # keep: in so small a model a second copy of the weights is nothing, and each draw counts.
            flat_lora_step(model, loss_fn, batches, optimizer, sigma, seed=(seed, step), keep=True)
        seconds.append(time.perf_counter() - start)
        decay.step()
    return model.eval(), statistics.median(seconds)


@torch.no_grad()
def measure(model: nn.Module, splits: dict[str, Data], samples: int, seed: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, (x, y) in splits.items():
        logits = model(x)
        result[f"{name}_loss"] = F.cross_entropy(logits, y).item()
        result[f"{name}_acc"] = 100 * (logits.argmax(1) == y).double().mean().item()
    for space in ("lora", "full"):
        rise = [sharpness(model, loss_fn, [splits["train"]], sigma, samples, seed, space) for sigma in STRENGTHS]
        result[f"landscape_{space}"] = rise
        result[f"sharp_{space}"] = rise[STRENGTHS.index(SHARP_AT)]
    return result


# ---- Report (train_gpt2.py prints its tables with this part) -------------------------------------------------

# 97.5 % points of Student's t for 1 to 30 degrees of freedom; above, the normal value is within 4 %.
T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
T975 += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


def interval(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean, half width of its 95 % interval (None for a single value) and n; None if a value is missing."""
    known, half = [v for v in values if v is not None], None
    n = len(known)
    if n < len(values):
        return None
    if n > 1:
        half = (T975[n - 2] if n <= 31 else 1.96) * statistics.stdev(known) / math.sqrt(n)
    return {"mean": statistics.fmean(known), "half": half, "n": n}


def minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def cell(stat: dict[str, Any] | None, digits: int, sign: str = "") -> str:
    if stat is None:
        return "-"
    half = "" if stat["half"] is None else f" ±{stat['half']:.{digits}f}"
    return f"{stat['mean']:{sign}.{digits}f}{half}"


def table(head: list[str], rows: list[list[str]]) -> str:
    width = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [[row[0].ljust(width[0])] + [c.rjust(w) for c, w in zip(row[1:], width[1:])] for row in [head, *rows]]
    lines.insert(1, ["-" * w for w in width])
    return "\n".join("  ".join(line).rstrip() for line in lines)


def report(
    runs: list[dict[str, Any]], methods: list[str], metrics: dict[str, tuple[str, int]], paired: Sequence[str]
) -> dict[str, Any]:
    """Print a table of every metric ({key: (label, digits)}), then one of the `paired` ones as differences to LoRA,
    seed by seed; return both as numbers. A run holds "method", "seed", and None for what it did not measure."""
    values = {m: {k: [run.get(k) for run in runs if run["method"] == m] for k in metrics} for m in methods}
    n = len({run["seed"] for run in runs})
    spread = f"mean ± 95 % interval over {n} seeds" if n > 1 else "one seed"
    summary: dict[str, Any] = {"mean": {m: {k: interval(v) for k, v in by.items()} for m, by in values.items()}}
    rows = [[label] + [cell(summary["mean"][m][k], digits) for m in methods] for k, (label, digits) in metrics.items()]
    print(f"\nResults ({spread}):\n\n{table(['', *methods], rows)}")
    others = [m for m in methods if m not in ("base", "lora")]
    if "lora" in methods and others:
        summary["minus_lora"] = {
            m: {k: interval([minus(a, b) for a, b in zip(values[m][k], values["lora"][k])]) for k in paired}
            for m in others
        }
        rows = [
            [metrics[k][0]] + [cell(summary["minus_lora"][m][k], metrics[k][1], "+") for m in others] for k in paired
        ]
        print(f"\nDifference to LoRA, paired by seed ({spread}):\n\n{table(['', *others], rows)}")
    return summary


def environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    write(path, (json.dumps(content, indent=1) + "\n").encode())


def write(path: Path, content: bytes) -> None:
    """Written beside, flushed and renamed: a kill or a full disk at any moment leaves the earlier file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# ---- The landscape and the command line ----------------------------------------------------------------------


def landscape(runs: list[dict[str, Any]], methods: list[str]) -> dict[str, dict[str, list[float]]]:
    """The curves of `chart`: the mean rise over the seeds."""
    spaces = {"LoRA space": "landscape_lora", "full space": "landscape_full"}
    return {
        space: {m: [statistics.fmean(at) for at in zip(*(r[key] for r in runs if r["method"] == m))] for m in methods}
        for space, key in spaces.items()
    }


def chart(curves: dict[str, dict[str, list[float]]], height: int = 12) -> str:
    """Rise of the loss, curves[space][method] over STRENGTHS: a panel a space, one scale, a letter a method. Falls
    stand at 0."""
    top = max(1e-9, *(max(rise) for panel in curves.values() for rise in panel.values()))
    methods = list(next(iter(curves.values())))
    points, group = range(len(STRENGTHS)), len(methods) + 1  # the methods stand side by side, so none hides another
    lines = [("rise   " + "".join(f"{space:<{group * len(STRENGTHS) + 3}}" for space in curves)).rstrip()]
    for level in range(height, -1, -1):
        line = f"{top * level / height:5.2f}"
        for panel in curves.values():
            heights = [[max(0, round(panel[m][i] / top * height)) for m in methods] for i in points]
            marks = ["".join(METHODS[m] if h == level else " " for m, h in zip(methods, at)) for at in heights]
            line += f" |{' '.join(marks)} "
        lines.append(line.rstrip())
    axis = "".join(f"{f'{s:g}':<{group}}" for s in STRENGTHS)
    lines.append("sigma  " + f"{axis}   {axis}".rstrip())
    return "\n".join(lines)


def verdict(runs: list[dict[str, Any]]) -> str:
    """Figure 1 of the paper (a minimum flat in LoRA space can be sharp in the full space) against these runs."""
    lora = [run for run in runs if run["method"] == "lora"]
    low, high = (statistics.fmean(run[f"sharp_{space}"] for run in lora) for space in ("lora", "full"))
    gap = interval([run["sharp_full"] - run["sharp_lora"] for run in lora])
    shown = gap["half"] is not None and gap["mean"] > gap["half"]
    return textwrap.fill(
        f"Figure 1 of the paper, a minimum that is flat in LoRA space but sharp in the full space, "
        f"is {'shown' if shown else 'NOT shown'} here: at sigma {SHARP_AT} the loss at LoRA's minimum rises by "
        f"{low:.3f} in LoRA space and by {high:.3f} in the full space (difference {cell(gap, 3, '+')}).",
        width=80,
    )


def main() -> None:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__, formatter_class=shape)
    add = parser.add_argument_group("comparison").add_argument
    add("--methods", nargs="+", default=["lora", "flat", "sam"], choices=METHODS, help="default: lora flat sam")
    add("--seeds", type=int, default=10, help="number of target tasks, each fine-tuned by every method (10)")
    add("--first-seed", type=int, default=0, help="the seeds count from here; tune on others than you report (0)")
    add("--samples", type=int, default=10, help="draws of noise a point of the landscape (10)")
    add("--out", type=Path, default=Path("out"), help="folder for toy.json (out)")
    add = parser.add_argument_group("target task").add_argument
    add("--train-size", type=int, default=300, help="training samples (300)")
    add("--label-noise", type=float, default=0.1, help="share of the training labels drawn at random (0.1)")
    add("--change", type=float, default=0.3, help="relative size of the low-rank change of the teacher (0.3)")
    add("--pretrain-steps", type=int, default=1500, help="steps on the source task (1500)")
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--steps", type=int, default=300, help="optimizer steps (300)")
    add("--batch-size", type=int, default=64, help="samples a step (64)")
    add("--lr", type=float, default=1e-3, help="AdamW learning rate, decayed along a cosine (1e-3)")
    add("--r", type=int, default=4, help="rank of the adapters (4)")
    add("--alpha", type=float, default=8, help="their scaling is alpha / r (8)")
    add("--sigma", type=float, default=0.6, help="flat: noise strength at the end of the ramp (0.6)")
    add("--schedule", default="cosine", help="flat: the ramp, cosine, linear or constant (cosine)")
    add("--rho", type=float, default=0.2, help="sam: radius on (A, B) (0.2)")
    add("--rho-full", type=float, default=0.2, help="sam-full: radius on the merged weight (0.2)")
    args = parser.parse_args()
    try:
        run(args)
    except (ValueError, FloatingPointError, OSError) as error:
        raise SystemExit(f"train_toy.py: {error}") from None


def run(args: argparse.Namespace) -> None:
    for name in ("seeds", "samples", "train_size", "pretrain_steps", "steps", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.label_noise <= 1:
        raise ValueError(f"--label-noise must be from 0 to 1, got {args.label_noise}")
    inject_lora(mlp(), args.r, args.alpha)  # bad values end here, before the work
    sigma_at(0, args.steps, args.sigma, args.schedule)
    torch.set_num_threads(1)  # the layers are too small to share, and one thread gives the same sums everywhere
    torch.manual_seed(0)
    teacher = random_teacher()
    student = pretrain(teacher, args.pretrain_steps)
    methods = [method for method in METHODS if method in args.methods]  # LoRA first: times are against its own
    runs = []
    with tqdm(total=args.seeds * len(methods), desc="fine-tune", leave=False) as bar:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            torch.manual_seed(seed)
            target = low_rank_change(teacher, args.change)
            splits = {"train": draw(target, args.train_size, args.label_noise), "test": draw(target, 4000)}
            splits["ood"] = draw(target, 4000, shifted=True)
            for method in methods:
                bar.set_postfix_str(f"seed {seed}, {method}")
                model, seconds = finetune(student, method, splits["train"], args, seed)
                result = measure(model, splits, args.samples, seed)
                runs.append({"method": method, "seed": seed, **result, "ms": 1000 * seconds})
                lora = [r for r in runs if r["seed"] == seed and r["method"] == "lora"]
                runs[-1]["time"] = runs[-1]["ms"] / lora[0]["ms"] if lora else None
                bar.update()
    summary = report(runs, methods, METRICS, list(METRICS)[:-1])
    drawing = chart(landscape(runs, methods))
    print(f"\nLandscape, the rise of the training loss under random noise ({', '.join(methods)}):\n\n{drawing}")
    if "lora" in methods:
        print(f"\n{verdict(runs)}")
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    content = {"config": config, "environment": environment(), "summary": summary, "runs": runs}
    write_json(args.out / "toy.json", content)
    print(f"\nAll numbers: {args.out / 'toy.json'}")


if __name__ == "__main__":
    main()
