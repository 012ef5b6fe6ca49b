"""The idea of Flat-LoRA in a minute, on a toy MLP: LoRA, Flat-LoRA and SAM.

    python train_toy.py    # twenty seeds: tables, landscape, out/toy.json
    python train_toy.py --methods flat flat:sigma=0.3 flat:noise=matrix
    python train_toy.py --plot out/toy.json    # pictures, with matplotlib

A random teacher network labels the source task, on which a student is trained
once. The target task is labelled by the teacher plus a change of low rank, so
that LoRA is the right model class; its training set is small and some of its
labels are wrong. Out of domain the inputs are shifted and wider. Every seed
draws a new target task; within a seed all methods start from the same adapters
and see the same batches. METHOD:OPTION=VALUE,... is a method with fine-tuning
options of its own, so that a list of these is a grid, a sweep or an ablation.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import re
import statistics
import textwrap
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from flatlora import (
    LossFn,
    filter_std,
    flat_lora_step,
    inject_lora,
    lora_parameters,
    perturbed,
    sam_step,
    sharpness,
    sigma_at,
)

INPUTS, HIDDEN, CLASSES = 16, 64, 4
METHODS = {"lora": "L", "flat": "F", "sam": "S", "sam-full": "W"}  # and their letters in the landscape
METRICS = {  # what the table shows: label, digits
    "train_loss": ("train loss", 3),
    "test_loss": ("test loss", 3),
    "ood_loss": ("out of domain", 3),
    "train_acc": ("train accuracy, %", 1),
    "test_acc": ("test accuracy, %", 1),
    "ood_acc": ("out of domain, %", 1),
    "sharp_lora": ("sharpness, LoRA", 3),
    "sharp_full": ("sharpness, full", 3),
    "grad_noise": ("gradient noise", 3),
    "time": ("time / LoRA's", 2),
}
BRIEF = ["test_loss", "ood_loss", "sharp_lora", "sharp_full", "grad_noise", "time"]  # shown of five methods or more
VARIABLE = [  # the options that METHOD:OPTION=VALUE may set
    "steps", "batch_size", "grad_accum", "lr", "weight_decay", "r", "alpha", "lora_dropout", "sigma", "schedule",
    "noise", "draws", "rho", "rho_full",
]  # fmt: skip
PAIRED = [key for key in METRICS if key != "time"]  # shown as differences too
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


def adapt(student: nn.Sequential, args: argparse.Namespace) -> nn.Module:
    """LoRA on every layer. Where one has fewer rows or columns than r, it gets as much rank, and the same scaling."""
    model: nn.Module = copy.deepcopy(student)
    for name, layer in [(str(i), layer) for i, layer in enumerate(student) if isinstance(layer, nn.Linear)]:
        r = min(args.r, *layer.weight.shape)
        inject_lora(model, r, args.alpha * r / args.r, args.lora_dropout, [name])
    return model


def finetune(student: nn.Sequential, train: Data, args: argparse.Namespace, seed: int) -> tuple[nn.Module, float]:
    """The model in evaluation mode and its median seconds a step. The seed fixes adapters, batches and noise."""
    torch.manual_seed(seed)
    model = adapt(student, args)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=args.lr, weight_decay=args.weight_decay)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    picks = pick(train, args.steps, args, seed)
    seconds = []
    for step, batches in enumerate(picks):
        start = time.perf_counter()
        if args.method in ("sam", "sam-full"):
            space, rho = ("lora", args.rho) if args.method == "sam" else ("full", args.rho_full)
            sam_step(model, loss_fn, batches, optimizer, rho, space)
        else:
            sigma = sigma_at(step, args.steps, args.sigma, args.schedule) if args.method == "flat" else 0.0
            noisy_loss_fn, sigma = ablated(loss_fn, sigma, (seed, step), args)
            # keep: in so small a model a second copy of the weights is nothing, and each draw counts.
            flat_lora_step(model, noisy_loss_fn, batches, optimizer, sigma, seed=(seed, step), keep=True)
        seconds.append(time.perf_counter() - start)
        decay.step()
    return model.eval(), statistics.median(seconds)


def pick(train: Data, steps: int, args: argparse.Namespace, seed: int) -> list[list[Data]]:
    """The micro-batches of each step, from a generator that no method can disturb."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(train[0]), (steps, args.batch_size), generator=generator)
    return [[(train[0][part], train[1][part]) for part in at.chunk(args.grad_accum)] for at in picks]


@torch.no_grad()
def measure(model: nn.Module, splits: dict[str, Data], args: argparse.Namespace, seed: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, (x, y) in {"test": splits["test"]}.items() if args.tune else splits.items():
        logits = model(x)
        result[f"{name}_loss"] = F.cross_entropy(logits, y).item()
        result[f"{name}_acc"] = 100 * (logits.argmax(1) == y).double().mean().item()
    if args.tune:
        return result
    for space in ("lora", "full"):
        measured = [splits["train"]]
        rise = [sharpness(model, loss_fn, measured, at, args.samples, seed, space) for at in args.sharpness_sigma]
        result |= {f"sharp_{space}": rise[0], f"landscape_{space}": dict(zip(map(str, args.sharpness_sigma), rise))}
    if args.gradient_draws and args.method == "flat":
        batches = pick(splits["train"], args.gradient_draws, args, seed)
        result["grad_noise"] = gradient_noise(model, loss_fn, batches, args, seed)
    return result


# ---- Ablations (train_gpt2.py runs them with this part) ------------------------------------------------------

NOISE = {  # the std of each row; eq. 7 is "rows"
    "rows": lambda layer, sigma: filter_std(layer.merged_weight(), sigma),
    "base": lambda layer, sigma: filter_std(layer.weight, sigma),
    "matrix": lambda layer, sigma: rms(filter_std(layer.merged_weight(), sigma)),
    "undivided": lambda layer, sigma: filter_std(layer.merged_weight(), sigma) * math.sqrt(layer.in_features),
}
DRAWS = ("window", "micro-batch", "antithetic")


def rms(std: Tensor) -> Tensor:
    """One std for all rows, (m, 1), that gives noise of the same expected Frobenius norm."""
    return std.square().mean().sqrt().expand_as(std)


def ablated(loss_fn: LossFn, sigma: float, seed: Any, args: argparse.Namespace) -> tuple[LossFn, float]:
    """What flat_lora_step is to get. Of the ablations, a loss under noise of its own, and sigma = 0.

    "micro-batch": each micro-batch draws anew. "antithetic": the first of two has eps, the second -eps.
    """
    if sigma == 0 or (args.noise, args.draws) == ("rows", "window"):
        return loss_fn, sigma
    calls = 0

    def noisy_loss_fn(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        draw = {"window": 0, "micro-batch": calls, "antithetic": calls // 2}[args.draws]
        sign = -1 if args.draws == "antithetic" and calls % 2 else 1
        calls += 1
        own = seed if args.draws == "window" else (seed, draw)
        with perturbed(model, sigma, own, keep=True, law=lambda layer, s: sign * NOISE[args.noise](layer, s)):
            return loss_fn(model, batch)

    return noisy_loss_fn, 0.0


def check_shared(args: argparse.Namespace) -> None:
    """The options that both scripts have and nothing else checks."""
    for name, allowed in (("noise", NOISE), ("draws", DRAWS)):
        if getattr(args, name) not in allowed:
            raise ValueError(f"--{name} must be one of {', '.join(allowed)}, got {getattr(args, name)}")
    if not all(0 <= sigma < math.inf for sigma in args.sharpness_sigma):
        raise ValueError(f"--sharpness-sigma must be at least 0 and finite, got {args.sharpness_sigma}")
    if args.gradient_draws < 0 or args.gradient_draws == 1:
        raise ValueError(f"--gradient-draws must be 0 or at least 2, for a variance, got {args.gradient_draws}")


@torch.enable_grad()
def gradient_noise(
    model: nn.Module, loss_fn: LossFn, steps: Sequence[Sequence[Any]], args: argparse.Namespace, seed: int
) -> float:
    """Variance of the gradient by A and B over draws of eps in one step, as a fraction of that over steps without."""

    def gradient(batches: Sequence[Any], sigma: float, draw: int) -> Tensor:
        noisy_loss_fn, rest = ablated(loss_fn, sigma, (seed, draw), args)  # the noise is in one of the two
        with perturbed(model, rest, (seed, draw)):
            loss = torch.stack([noisy_loss_fn(model, batch) for batch in batches]).mean()
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, lora_parameters(model))])

    by_data = torch.stack([gradient(batches, 0.0, 0) for batches in steps])  # (draws, parameters)
    by_noise = torch.stack([gradient(steps[0], args.sigma, draw) for draw in range(len(steps))])
    return float(by_noise.var(0).sum() / by_data.var(0).sum())


# ---- Report (train_gpt2.py prints its tables with this part) -------------------------------------------------

# 97.5 % points of Student's t for 1 to 30 degrees of freedom; above, the normal value is within 4 %.
T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
T975 += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


def interval(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean, half width of its 95 % interval (None for a single value) and n; None if a value is missing or infinite."""
    known, half = [v for v in values if v is not None and math.isfinite(v)], None
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


def partner(title: str, titles: Sequence[str]) -> str:
    """What a method is compared with: LoRA with the same options if that ran, else the first of all."""
    same = ":".join(["lora", *title.split(":")[1:]])
    return same if same in titles and same != title else titles[0]


def report(
    runs: list[dict[str, Any]],
    titles: Sequence[str],
    metrics: dict[str, tuple[str, int]],
    paired: Collection[str],
    brief: Collection[str],
) -> dict[str, Any]:
    """Print a table of every metric ({key: (label, digits)}), then one of the `paired` ones as differences, seed by
    seed; return both as numbers. A run holds "method" (its title), "seed", and None or nothing for what it did not
    measure; its "time" is set here. Five titles or more stand one below the other, with the `brief` metrics only."""
    by = {title: {run["seed"]: run for run in runs if run["method"] == title} for title in titles}
    against = {title: partner(title, [t for t in titles if t != "base"]) for title in titles if title != "base"}
    for title, other in against.items():
        for seed, run in by[title].items():
            run["time"] = run["ms"] / by[other][seed]["ms"] if other.startswith("lora") else None
    n = len({run["seed"] for run in runs})
    spread = f"mean ± 95 % interval over {n} seeds" if n > 1 else "one seed"
    keys = [k for k in metrics if any(run.get(k) is not None for run in runs) and (len(titles) < 5 or k in brief)]

    def show(stats: Mapping[str, Mapping[str, Any]], keys: Sequence[str], sign: str = "") -> str:
        rows = [[name, *(cell(by_key[k], metrics[k][1], sign) for k in keys)] for name, by_key in stats.items()]
        head = ["", *(metrics[k][0] for k in keys)]
        return table(head, rows) if len(titles) > 4 else table(*turned(head, rows))

    means = {t: {k: interval([run.get(k) for run in by[t].values()]) for k in keys} for t in titles}
    print(f"\nResults ({spread}):\n\n{show(means, keys)}")
    differences = {}
    for title, other in against.items():
        if title != other:
            pairs = [(run, by[other][seed]) for seed, run in by[title].items()]
            name = title if other == next(iter(against)) else f"{title} - {other.partition(':')[0]}"
            differences[name] = {k: interval([minus(a.get(k), b.get(k)) for a, b in pairs]) for k in paired}
    if differences:
        shown = show(differences, [k for k in keys if k in paired], "+")
        print(f"\nDifference to {next(iter(against))}, paired by seed ({spread}):\n\n{shown}")
    return {"mean": means, "difference": differences}


def turned(head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    first, *others = ([*column] for column in zip(head, *rows))
    return first, others


def choice(runs: list[dict[str, Any]], titles: Sequence[str], key: str, digits: int) -> str:
    """A table of the best settings of each method by the mean of `key` over the seeds."""
    grids: dict[str, list[str]] = {}
    for title in titles:
        grids.setdefault(re.sub(r"=[^,]*", "", title), []).append(title)
    means = {title: interval([run[key] for run in runs if run["method"] == title]) for title in titles}
    rows = []
    for grid, members in grids.items():
        best = min(members, key=lambda title: (means[title] or {"mean": math.inf})["mean"])  # None: it diverged
        rows.append([grid, str(len(members)), best.partition(":")[2], cell(means[best], digits)])
    n = len({run["seed"] for run in runs})
    return f"Best of each grid by validation loss ({n} seeds):\n\n{table(['', 'tried', 'best', 'validation'], rows)}"


def variants(
    parser: argparse.ArgumentParser, args: argparse.Namespace, methods: Collection[str], variable: Sequence[str]
) -> dict[str, argparse.Namespace]:
    """The options of each entry of --methods, by its title: METHOD or METHOD:OPTION=VALUE,OPTION=VALUE."""
    found = {}
    for title in args.methods:
        method, _, words = title.partition(":")
        pairs = dict(word.partition("=")[::2] for word in words.split(",") if word)
        if method not in methods or not pairs.keys() <= {*variable}:
            raise ValueError(
                f"--methods takes {', '.join(methods)}, alone or as METHOD:OPTION=VALUE,... with the options "
                f"{', '.join(variable)}, got {title}"
            )
        own = parser.parse_args([f"--{key.replace('_', '-')}={value}" for key, value in pairs.items()])
        found[title] = argparse.Namespace(**vars(args) | {key: getattr(own, key) for key in pairs}, method=method)
    return found


def environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Eight digits of a number, and what holds no more than numbers on a line of its own."""
    short = json.loads(json.dumps(content, default=str), parse_float=lambda digits: float(f"{float(digits):.8g}"))
    flat = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda m: re.sub(r"\n\s*", " ", m[0]), json.dumps(short, indent=1))
    write(path, f"{flat}\n".encode())


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


# ---- Pictures, the landscape and the command line ------------------------------------------------------------


INKS = {"light": ("#ffffff", "#1f2328"), "dark": ("#0d1117", "#e6edf3")}  # paper and ink of GitHub's two modes
STYLES = {  # color and marker of each method of the two scripts
    "lora": ("#8b949e", "o"), "flat": ("#2f81f7", "s"), "sam": ("#db6d28", "^"), "sam-full": ("#c2569b", "v"),
    "full": ("#3fb950", "D"),
}  # fmt: skip
DRAWN = {"test_loss": "test loss", "ood_loss": "loss out of domain", "sharp_full": "sharpness, full space"}


def plot(files: Sequence[Path], folder: Path) -> None:
    """NAME-landscape-light.png, NAME-differences-light.png and their dark forms, NAME that of the first run file: a
    row of panels for each file, and no landscape where a file has the sharpness at one strength only."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError('matplotlib is not installed: pip install -e ".[plot]"') from None
    found = {path.stem: read_run(path) for path in files}
    deep = all(len(content["runs"][0].get("landscape_full", {})) > 1 for content in found.values())
    pictures = [("landscape", landscape_row, 2)] * deep + [("differences", difference_row, 3)]
    folder.mkdir(parents=True, exist_ok=True)
    for mode, (paper, ink) in INKS.items():
        colors: Any = {f"{part}.color": ink for part in ("text", "xtick", "ytick")} | {"axes.labelcolor": ink}
        colors |= {"axes.edgecolor": ink, "axes.facecolor": paper, "figure.facecolor": paper}
        with plt.rc_context({**colors, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
            for name, draw_row, columns in pictures:
                size = (8.5, 2.7 * len(found))
                figure, panels = plt.subplots(len(found), columns, figsize=size, squeeze=False, layout="constrained")
                for row, (run, content) in zip(panels, found.items()):
                    draw_row(row, run, content)
                path = folder / f"{files[0].stem}-{name}-{mode}.png"
                figure.savefig(path, dpi=160)
                plt.close(figure)
                print(path)


def read_run(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if content["summary"]["difference"]:
            return content
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"--plot: {path} is no JSON of a run with several methods")


def landscape_row(row: Any, run: str, content: dict[str, Any]) -> None:
    """The rise of the training loss over the strength of the noise, mean and 95 % band over the seeds."""
    titles = list(dict.fromkeys(r["method"] for r in content["runs"]))
    first = {method: next((t for t in titles if t.partition(":")[0] == method), None) for method in STYLES}
    for panel, (space, curves) in zip(row, landscape(content["runs"], list(filter(None, first.values()))).items()):
        for title, points in curves.items():
            color, marker = STYLES[title.partition(":")[0]]
            x, y = list(points), [stat["mean"] for stat in points.values()]
            panel.plot(x, y, color=color, marker=marker, markersize=4, label=title)
            edges = [[s["mean"] + sign * (s["half"] or 0.0) for s in points.values()] for sign in (-1, 1)]
            panel.fill_between(x, *edges, color=color, alpha=0.2, linewidth=0)
        panel.set(title=f"{run}: noise in {space}", xlabel="sigma")
    row[0].set_ylabel("rise of the training loss")
    row[0].legend(frameon=False)
    row[0].sharey(row[1])


def difference_row(row: Any, run: str, content: dict[str, Any]) -> None:
    """The paired differences with their 95 % intervals, a panel a metric."""
    differences = content["summary"]["difference"]
    for panel, (key, label) in zip(row, DRAWN.items()):
        for at, (title, stats) in enumerate(differences.items()):
            color, marker = STYLES[title.partition(":")[0]]
            if stat := stats.get(key):
                panel.errorbar(stat["mean"], -at, xerr=stat["half"] or 0.0, color=color, marker=marker, capsize=3)
        panel.axvline(0, color=STYLES["lora"][0], linewidth=1, linestyle="--")
        panel.set_yticks([-at for at in range(len(differences))], [*differences] if panel is row[0] else [])
        panel.set(title=label, ylim=(0.5 - len(differences), 0.5))
        panel.set_xlabel("difference (left is better)")
        panel.locator_params(axis="x", nbins=3)
    row[0].set_ylabel(run)


def landscape(runs: list[dict[str, Any]], titles: Sequence[str]) -> dict[str, dict[str, dict[float, Any]]]:
    """The rise of the training loss, space: title: strength: interval over the seeds."""
    found: dict[str, dict[str, dict[float, Any]]] = {}
    for space, key in (("LoRA space", "landscape_lora"), ("full space", "landscape_full")):
        for title in titles:
            rises = [{"0": 0.0, **run[key]} for run in runs if run["method"] == title]
            points = {float(at): interval([rise[at] for rise in rises]) for at in rises[0]}
            found.setdefault(space, {})[title] = dict(sorted(points.items()))
    return found


def chart(panels: dict[str, dict[str, dict[float, Any]]], height: int = 12) -> str:
    """What `landscape` found, as text: a panel a space, one scale, a letter a method. Falls stand at 0."""
    curves = {
        space: {t: [stat["mean"] for stat in points.values()] for t, points in by.items()}
        for space, by in panels.items()
    }
    strengths = list(next(iter(next(iter(panels.values())).values())))
    top = max(1e-9, *(max(rise) for panel in curves.values() for rise in panel.values()))
    titles = list(next(iter(curves.values())))
    group = max(4, len(titles) + 1)  # the methods stand side by side, so that none hides another
    lines = [("rise   " + "".join(f"{space:<{group * len(strengths) + 3}}" for space in curves)).rstrip()]
    for level in range(height, -1, -1):
        line = f"{top * level / height:5.2f}"
        for panel in curves.values():
            heights = [[max(0, round(panel[t][i] / top * height)) for t in titles] for i in range(len(strengths))]
            letters = [METHODS[t.partition(":")[0]] for t in titles]
            marks = ["".join(m if h == level else " " for m, h in zip(letters, at)) for at in heights]
            line += f" |{''.join(mark.ljust(group) for mark in marks)}"
        lines.append(line.rstrip())
    axis = "".join(f"{f'{s:g}':<{group}}" for s in strengths)
    lines.append("sigma  " + f"{axis}  {axis}".rstrip())
    return "\n".join(lines)


def verdict(runs: list[dict[str, Any]]) -> str:
    """Figure 1 of the paper (a minimum flat in LoRA space can be sharp in the full space) against these runs."""
    lora = [run for run in runs if run["method"] == "lora"]
    low, high = (statistics.fmean(run[f"sharp_{space}"] for run in lora) for space in ("lora", "full"))
    gap = interval([run["sharp_full"] - run["sharp_lora"] for run in lora])
    shown = gap["half"] is not None and gap["mean"] > gap["half"]
    at = next(iter(lora[0]["landscape_full"]))
    return textwrap.fill(
        f"Figure 1 of the paper, a minimum that is flat in LoRA space but sharp in the full space, "
        f"is {'shown' if shown else 'NOT shown'} here: at sigma {at} the loss at LoRA's minimum rises by "
        f"{low:.3f} in LoRA space and by {high:.3f} in the full space (difference {cell(gap, 3, '+')}).",
        width=80,
    )


def main() -> None:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__, formatter_class=shape)
    add = parser.add_argument_group("comparison").add_argument
    words = f"any of {', '.join(METHODS)}, also as METHOD:OPTION=VALUE,... (lora flat sam)"
    add("--methods", nargs="+", default=["lora", "flat", "sam"], metavar="METHOD", help=words)
    add("--seeds", type=int, default=20, help="number of target tasks, each fine-tuned by every method (20)")
    add("--first-seed", type=int, default=0, help="the seeds count from here; tune on others than you report (0)")
    add("--tune", action="store_true", help="only the losses, and the best settings of each method; no landscape")
    strengths = [0.3, 0.1, 0.2, 0.4, 0.5, 0.6]
    words = "noise strengths of the landscape, the first for the table's sharpness (0.3 0.1 0.2 0.4 0.5 0.6)"
    add("--sharpness-sigma", type=float, nargs="+", default=strengths, metavar="SIGMA", help=words)
    add("--samples", type=int, default=10, help="draws of noise a point of the landscape (10)")
    add("--gradient-draws", type=int, default=0, help="draws to measure the gradient's noise with; 0: not (0)")
    add("--out", type=Path, default=Path("out"), help="folder for toy.json or the pictures (out)")
    add("--plot", type=Path, nargs="+", metavar="JSON", help="only draw what these runs of either script found")
    add = parser.add_argument_group("target task").add_argument
    add("--train-size", type=int, default=300, help="training samples (300)")
    add("--label-noise", type=float, default=0.1, help="share of the training labels drawn at random (0.1)")
    add("--change", type=float, default=0.3, help="relative size of the low-rank change of the teacher (0.3)")
    add("--pretrain-steps", type=int, default=1500, help="steps on the source task (1500)")
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--steps", type=int, default=300, help="optimizer steps (300)")
    add("--batch-size", type=int, default=64, help="samples a step (64)")
    add("--grad-accum", type=int, default=1, help="micro-batches among which they are dealt (1)")
    add("--lr", type=float, default=1e-3, help="AdamW learning rate, decayed along a cosine (1e-3)")
    add("--weight-decay", type=float, default=0.0, help="AdamW's (0)")
    add("--r", type=int, default=4, help="rank of the adapters (4)")
    add("--alpha", type=float, default=8, help="their scaling is alpha / r (8)")
    add("--lora-dropout", type=float, default=0.0, help="on the input of the adapters (0)")
    add("--sigma", type=float, default=0.6, help="flat: noise strength at the end of the ramp (0.6)")
    add("--schedule", default="cosine", help="flat: the ramp, cosine, linear or constant (cosine)")
    add("--noise", default="rows", help=f"flat: the law, {', '.join(NOISE)} (rows)")
    add("--draws", default="window", help=f"flat: one eps for {', '.join(DRAWS)} (window)")
    add("--rho", type=float, default=0.2, help="sam: radius on (A, B) (0.2)")
    add("--rho-full", type=float, default=0.2, help="sam-full: radius on the merged weight (0.2)")
    args = parser.parse_args()
    try:
        plot(args.plot, args.out) if args.plot else run(args, variants(parser, args, METHODS, VARIABLE))
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        raise SystemExit(f"train_toy.py: {error}") from None


def run(args: argparse.Namespace, own: dict[str, argparse.Namespace]) -> None:
    for options in [args, *own.values()]:
        check(options)
    torch.set_num_threads(1)  # the layers are too small to share, and one thread gives the same sums everywhere
    torch.manual_seed(0)
    teacher = random_teacher()
    student = pretrain(teacher, args.pretrain_steps)
    runs = []
    with tqdm(total=args.seeds * len(own), desc="fine-tune", leave=False) as bar:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            torch.manual_seed(seed)
            target = low_rank_change(teacher, args.change)
            splits = {"train": draw(target, args.train_size, args.label_noise), "test": draw(target, 4000)}
            splits["ood"] = draw(target, 4000, shifted=True)
            for title, options in own.items():
                bar.set_postfix_str(f"seed {seed}, {title}")
                model, seconds = finetune(student, splits["train"], options, seed)
                result = measure(model, splits, options, seed)
                runs.append({"method": title, "seed": seed, **result, "ms": 1000 * seconds})
                bar.update()
    titles = list(own)
    content = {"config": vars(args), "environment": environment(), "runs": runs}
    if args.tune:
        print(f"\n{choice(runs, titles, 'test_loss', 4)}")
    else:
        content["summary"] = report(runs, titles, METRICS, PAIRED, BRIEF)
    if len(own) < 5 and not args.tune:
        drawing = chart(landscape(runs, titles))
        print(f"\nLandscape, the rise of the training loss under random noise ({', '.join(titles)}):\n\n{drawing}")
        if "lora" in titles:
            print(f"\n{verdict(runs)}")
    write_json(args.out / "toy.json", content)
    print(f"\nAll numbers: {args.out / 'toy.json'}")


def check(args: argparse.Namespace) -> None:
    for name in ("seeds", "samples", "train_size", "pretrain_steps", "steps", "batch_size", "grad_accum"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.label_noise <= 1:
        raise ValueError(f"--label-noise must be from 0 to 1, got {args.label_noise}")
    check_shared(args)
    with torch.device("meta"):
        inject_lora(mlp(), args.r, args.alpha, args.lora_dropout, ["2"])  # the layer that has room for most ranks
    sigma_at(0, args.steps, args.sigma, args.schedule)


if __name__ == "__main__":
    main()
