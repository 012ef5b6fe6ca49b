"""The studies: their rows, and the runs of each.

    python tests/evidence/study.py movies       # or another: -h
    python tests/evidence/study.py movies --seeds 5 --rows "sigma 0" "sigma 0.1"
    python tests/evidence/study.py tables       # writes the tables of README.md anew from the runs

Each finished run is a line of JSON in the folder runs, with the hash of the code that made it. A stopped command goes
on where it was, and one more seed or row only adds. A line of other code stays: its run is done again beside it.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import variance
from tqdm import tqdm
from training import ROOT, Setting, Task, run, short, train_gpt2

HERE = Path(__file__).resolve().parent
RUNS = HERE / "runs"
SEEDS = {  # no number twice among the later five studies of a task, nor those of its earlier studies
    "movies_rates": range(4),
    "movies": range(15),
    "packages_rates": range(4),
    "packages": range(10),
    "packages_again": range(10),
    "toy": range(20),
    "variance": range(10),
    "movies_epochs": range(100, 108),
    "movies_again": range(200, 215),
    "movies_accuracy_rates": range(300, 304),
    "movies_accuracy": range(310, 325),
    "movies_more_data": range(400, 408),
    "packages_tuned_rates": range(40, 44),
    "packages_tuned": range(20, 30),
}
VARIANTS: dict[str, dict[str, Any]] = {  # of a task, by study
    "packages_again": {"first_base": 100},
    "movies_epochs": {"steps": 313, "brief": True},  # 313 x 16 snippets are ten times 500
    "movies_again": {"other_half": True, "brief": True},
    "movies_accuracy_rates": {"tuning_test": 1000},
    "movies_accuracy": {"brief": True},
    "movies_more_data": {"snippets": 5072, "steps": 400, "brief": True},
}
Line = dict[str, Any]  # a run: row, seed, setting, code, and what was measured


# ---- Rows ----------------------------------------------------------------------------------------------------


def movies_rates_rows() -> dict[str, Setting]:
    """Nine settings of each method, on snippets of their own. At three of its rates LoRA is the strength 0 of all."""
    lrs = (4e-4, 5e-4, 6e-4, 8e-4, 1e-3, 1.2e-3, 1.4e-3, 1.6e-3, 2e-3)
    rows = {f"LoRA, lr {lr:g}": Setting(lr) for lr in lrs}
    for lr in (8e-4, 1.2e-3, 1.6e-3):
        for sigma in (0.05, 0.15):
            rows[f"Flat-LoRA, lr {lr:g}, sigma {sigma:g}"] = Setting(lr, sigma=sigma)
        for rho in (0.015, 0.05):
            rows[f"SAM on (A, B), lr {lr:g}, rho {rho:g}"] = Setting(lr, rho=rho)
    return rows


def movies_tuned() -> dict[str, Setting]:
    """Of each method the setting with the lowest mean loss in tuning, after all of it has run."""
    rows = movies_rates_rows()
    losses = {row: [] for row in rows}
    for line in read_runs("movies_rates"):
        losses[line["row"]].append(line["test_loss"])
    if any(len(values) < len(SEEDS["movies_rates"]) for values in losses.values()):
        return {}

    found = {}
    strength_0 = ("LoRA, lr 0.0008", "LoRA, lr 0.0012", "LoRA, lr 0.0016")
    for method in ("LoRA", "Flat-LoRA", "SAM on (A, B)"):
        own = [row for row in rows if row.startswith((f"{method}, ", *strength_0))]
        best = min(own, key=lambda row: fmean(losses[row]))
        found[method] = rows[best]
    return found


def movies_rows() -> dict[str, Setting]:
    """Noise alone, at LoRA's best learning rate of tuning with version 0.1; then each method as it is tuned now."""
    rows = {f"sigma {sigma:g}": Setting(1.2e-3, sigma=sigma) for sigma in (0, 0.05, 0.1, 0.15, 0.3)}
    for method, setting in movies_tuned().items():
        if setting not in rows.values():
            rows[f"{method}, tuned"] = setting
    return rows


def movies_epochs_rows() -> dict[str, Setting]:
    """Ten passes over the snippets, at the learning rate and, of the second row, the sigma of the paper for GLUE."""
    return {f"sigma {sigma:g}": Setting(5e-4, sigma=sigma) for sigma in (0, 0.05, 0.15)}


def movies_again_rows() -> dict[str, Setting]:
    """The two rows of movies that hinted at a gain under typos, on other snippets and seeds."""
    return {f"sigma {sigma:g}": Setting(1.2e-3, sigma=sigma) for sigma in (0, 0.1)}


def movies_accuracy_rates_rows() -> dict[str, Setting]:
    """Ten settings of each method."""
    lrs = (4e-4, 6e-4, 8e-4, 1e-3, 1.2e-3, 1.4e-3, 1.7e-3, 2e-3, 2.4e-3, 2.8e-3)
    rows = {f"LoRA, lr {lr:g}": Setting(lr) for lr in lrs}
    for lr in (6e-4, 1e-3, 1.4e-3, 2e-3, 2.8e-3):
        for sigma in (0.05, 0.1):
            rows[f"Flat-LoRA, lr {lr:g}, sigma {sigma:g}"] = Setting(lr, sigma=sigma)
        for rho in (0.03, 0.1):
            rows[f"SAM on (A, B), lr {lr:g}, rho {rho:g}"] = Setting(lr, rho=rho)
    return rows


def movies_accuracy_rows() -> dict[str, Setting]:
    return tuned("movies_accuracy_rates", lambda line: (-line["test_acc"], line["test_loss"]))


def packages_tuned_rates_rows() -> dict[str, Setting]:
    """Nine settings of each method."""
    lrs = (2e-3, 2.8e-3, 4e-3, 5.6e-3, 8e-3, 1.1e-2, 1.6e-2, 2.2e-2, 3.2e-2)
    rows = {f"LoRA, lr {lr:g}": Setting(lr) for lr in lrs}
    for lr in (5.6e-3, 8e-3, 1.1e-2):
        for sigma in (0.01, 0.03, 0.1):
            rows[f"Flat-LoRA, lr {lr:g}, sigma {sigma:g}"] = Setting(lr, sigma=sigma)
        for rho in (0.005, 0.015, 0.05):
            rows[f"SAM on (A, B), lr {lr:g}, rho {rho:g}"] = Setting(lr, rho=rho)
        for rho in (0.0015, 0.005, 0.015):
            rows[f"SAM on W', lr {lr:g}, rho {rho:g}"] = Setting(lr, rho_merged=rho)
    return rows


def packages_tuned_rows() -> dict[str, Setting]:
    return tuned("packages_tuned_rates", lambda line: (line["test_loss"],))


def tuned(name: str, badness: Callable[[Line], tuple[float, ...]]) -> dict[str, Setting]:
    """Of each method the setting whose mean badness over all seeds of tuning is least, the first such row if several.

    Nothing, before all rows and seeds of the tuning have run.
    """
    rows = ROWS[name]()
    found: dict[str, list[tuple[float, ...]]] = {row: [] for row in rows}
    for line in read_runs(name):
        found[line["row"]].append(badness(line))
    if any(len(values) < len(SEEDS[name]) for values in found.values()):
        return {}
    best: dict[str, str] = {}
    means = {row: tuple(map(fmean, zip(*values))) for row, values in found.items()}
    for row in rows:
        method = row.partition(", lr ")[0]
        if method not in best or means[row] < means[best[method]]:
            best[method] = row
    return {f"{method}, tuned": rows[row] for method, row in best.items()}


def packages_rates_rows() -> dict[str, Setting]:
    """LoRA's learning rates, on packages that the results do not use."""
    return {f"lr {lr:g}": Setting(lr) for lr in (2.8e-3, 4e-3, 5.6e-3, 8e-3, 1.1e-2, 1.6e-2)}


def packages_rows() -> dict[str, Setting]:
    """Strength curves of all methods at LoRA's best learning rate, then choices and ranks."""
    lr = 8e-3
    rows = strength_curves(lr, rhos=(0.05, 0.15, 0.45), rhos_merged=(0.015, 0.05, 0.15), dropouts=(0.1, 0.3, 0.6))
    rows["trained in 3 bits"] = Setting(lr, bits=3)
    for rank in (8, 1, 4, 64):
        rows[f"rank {rank}, sigma 0"] = Setting(lr, r=rank)
        rows[f"rank {rank}, sigma 0.1"] = Setting(lr, r=rank, sigma=0.1)
    return rows


def packages_again_rows() -> dict[str, Setting]:
    """The rows of the claim on rounding, on other bases."""
    rows = packages_rows()
    return {row: rows[row] for row in ("sigma 0", "sigma 0.3")}


def toy_rows() -> dict[str, Setting]:
    rhos = (0.03, 0.1, 0.3, 0.9)
    return strength_curves(7e-4, rhos, rhos, dropouts=(0.2, 0.5, 0.8))


def strength_curves(
    lr: float, rhos: Iterable[float], rhos_merged: Iterable[float], dropouts: Iterable[float]
) -> dict[str, Setting]:
    rows = {f"sigma {sigma:g}": Setting(lr, sigma=sigma) for sigma in (0, 0.05, 0.1, 0.15, 0.3, 0.6)}
    for rho in rhos:
        rows[f"SAM on (A, B), rho {rho:g}"] = Setting(lr, rho=rho)
    for rho in rhos_merged:
        rows[f"SAM on W', rho {rho:g}"] = Setting(lr, rho_merged=rho)
    for rate in dropouts:
        rows[f"dropout {rate:g}"] = Setting(lr, dropout=rate)
    for sigma in (0.3, 0.6):
        rows[f"constant, sigma {sigma:g}"] = Setting(lr, sigma=sigma, schedule="constant")
        rows[f"one std per matrix, sigma {sigma:g}"] = Setting(lr, sigma=sigma, std="matrix")
    return rows


ROWS = {
    "movies_rates": movies_rates_rows,
    "movies": movies_rows,
    "packages_rates": packages_rates_rows,
    "packages": packages_rows,
    "packages_again": packages_again_rows,
    "toy": toy_rows,
    "variance": variance.rows,
    "movies_epochs": movies_epochs_rows,
    "movies_again": movies_again_rows,
    "movies_accuracy_rates": movies_accuracy_rates_rows,
    "movies_accuracy": movies_accuracy_rows,
    "movies_more_data": movies_again_rows,
    "packages_tuned_rates": packages_tuned_rates_rows,
    "packages_tuned": packages_tuned_rows,
}


# ---- Runs ----------------------------------------------------------------------------------------------------


@functools.cache
def load(name: str) -> Task:
    task = task_of(name)
    module = importlib.import_module(task)
    return getattr(module, task.capitalize())(**VARIANTS.get(name, {}))


def task_of(name: str) -> str:
    return name.partition("_")[0]


@functools.cache
def code(name: str) -> str:
    """Tells versions of the code that a study runs apart: all files but those of which it uses little."""
    task = task_of(name)
    files = [ROOT / "flatlora.py", HERE / "training.py", HERE / f"{task}.py"]
    parts = [file.read_text("utf-8") for file in files]
    used = [train_gpt2.learning_rate]
    if task == "packages":
        used += [train_gpt2.GPT, train_gpt2.Block, train_gpt2.package_sources, train_gpt2.split, train_gpt2.windows]
    parts += [inspect.getsource(one) for one in used]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


def read_runs(name: str) -> list[Line]:
    path = RUNS / f"{name}.jsonl"
    if not path.exists():
        return []
    lines = path.read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]  # a kill may have cut one


def changed(setting: Any) -> dict[str, Any]:
    """What a setting says beside the defaults, and its learning rate."""
    return {key: value for key, value in asdict(setting).items() if value != getattr(type(setting), key, None)}


def start_worker() -> None:
    torch.set_num_threads(1)  # two runs side by side are faster than one on two threads, and sums do not depend on it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent


def work(job: tuple[str, str, Any, int]) -> Line:
    name, row, setting, seed = job
    if name == "variance":
        result = variance.growth(setting, seed)
    else:
        result = run(load(name), setting, seed, tuning=name.endswith("_rates"))
    metrics = {key: short(value) for key, value in result.items()}
    return {"row": row, "seed": seed, "setting": changed(setting), "code": code(name), **metrics}


def perform(name: str, seeds: Sequence[int], only: list[str], workers: int) -> None:
    """Do the runs that are not there yet, all rows of a seed after each other."""
    rows = ROWS[name]()
    unknown = set(only) - rows.keys()
    if unknown:
        raise SystemExit(f"study.py: --rows has {sorted(unknown)}, {name} has {list(rows)}")
    if name != "variance":
        load(name)  # stops with a message, before any process starts

    done = {(line["row"], line["seed"], line["code"]) for line in read_runs(name)}
    jobs = []
    for seed in seeds:
        for row in only or rows:
            if (row, seed, code(name)) not in done:
                jobs.append((name, row, rows[row], seed))

    RUNS.mkdir(exist_ok=True)
    os.environ["TQDM_DISABLE"] = "1"  # in the processes that start now
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(workers, start_worker) as pool,
        open(RUNS / f"{name}.jsonl", "a", encoding="utf-8") as file,
        tqdm(jobs, desc=name, smoothing=0) as bar,
    ):
        for line in pool.imap_unordered(work, jobs):
            file.write(json.dumps(line) + "\n")
            file.flush()
            bar.update()
        pool.close()
        pool.join()


# ---- Command line --------------------------------------------------------------------------------------------


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("what", choices=[*ROWS, "tables"])
    parser.add_argument("--seeds", type=int, help="the first N seeds (all)")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="these alone")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs side by side (%(default)s)")
    args = parser.parse_args()
    if args.what == "tables":
        from tables import write_pages  # which imports this file

        return write_pages()
    try:
        perform(args.what, SEEDS[args.what][: args.seeds], args.rows, args.workers)
    except KeyboardInterrupt:
        raise SystemExit("study.py: stopped; the same command goes on") from None


if __name__ == "__main__":
    main()
