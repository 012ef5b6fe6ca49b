"""The studies: their rows, and the runs of each.

    python tests/evidence/study.py movies       # or another: -h
    python tests/evidence/study.py movies --seeds 5 --rows "sigma 0" "sigma 0.1"
    python tests/evidence/study.py tables       # writes the tables of README.md from the runs

Each finished run is a line of JSON in the folder runs, with a hash of the code that made it. Repeat a stopped command
to resume it: finished runs are kept. If the code has changed since, the run is repeated, and its last line counts.
"""

from __future__ import annotations

import argparse
import functools
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
from typing import Any, NamedTuple

import torch
import training
import variance
from tqdm import tqdm
from training import ROOT, Setting, Task, fingerprint, run, short

HERE = Path(__file__).resolve().parent
RUNS = HERE / "runs"
Line = dict[str, Any]  # a run: row, seed, setting, code, and what was measured


# ---- Rows ----------------------------------------------------------------------------------------------------


def movies_rates_rows() -> dict[str, Setting]:
    """Nine rates of LoRA, six settings of the others."""
    rows = lora_rows(4e-4, 5e-4, 6e-4, 8e-4, 1e-3, 1.2e-3, 1.4e-3, 1.6e-3, 2e-3)
    for lr in (8e-4, 1.2e-3, 1.6e-3):
        rows |= flat_rows(lr, 0.05, 0.15)
        rows |= sam_rows(lr, 0.015, 0.05)
    return rows


def movies_rows() -> dict[str, Setting]:
    """Noise alone, at LoRA's best learning rate of tuning with version 0.1; then each method as tuned by its loss."""
    return sigma_rows(1.2e-3, 0, 0.05, 0.1, 0.15, 0.3) | tuned("movies_rates", by_loss)


def movies_accuracy_rates_rows() -> dict[str, Setting]:
    """Ten settings of each method."""
    rows = lora_rows(4e-4, 6e-4, 8e-4, 1e-3, 1.2e-3, 1.4e-3, 1.7e-3, 2e-3, 2.4e-3, 2.8e-3)
    for lr in (6e-4, 1e-3, 1.4e-3, 2e-3, 2.8e-3):
        rows |= flat_rows(lr, 0.05, 0.1)
        rows |= sam_rows(lr, 0.03, 0.1)
    return rows


def packages_rates_rows() -> dict[str, Setting]:
    return {f"lr {lr:g}": Setting(lr) for lr in (2.8e-3, 4e-3, 5.6e-3, 8e-3, 1.1e-2, 1.6e-2)}


def packages_rows() -> dict[str, Setting]:
    """Strengths of all methods at LoRA's best learning rate, then choices and another rank."""
    lr = 8e-3
    rows = rows_of_strengths(lr, rhos=(0.05, 0.15, 0.45), rhos_merged=(0.015, 0.05, 0.15), dropouts=(0.1, 0.3, 0.6))
    rows["trained in 3 bits"] = Setting(lr, bits=3)
    for sigma in (0, 0.1):
        rows[f"rank 8, sigma {sigma:g}"] = Setting(lr, r=8, sigma=sigma)
    return rows


def packages_again_rows() -> dict[str, Setting]:
    """The rows of the claim on rounding, on other bases."""
    rows = packages_rows()
    return {row: rows[row] for row in ("sigma 0", "sigma 0.3")}


def packages_tuned_rates_rows() -> dict[str, Setting]:
    """Nine settings of each method."""
    rows = lora_rows(2e-3, 2.8e-3, 4e-3, 5.6e-3, 8e-3, 1.1e-2, 1.6e-2, 2.2e-2, 3.2e-2)
    for lr in (5.6e-3, 8e-3, 1.1e-2):
        rows |= flat_rows(lr, 0.01, 0.03, 0.1)
        rows |= sam_rows(lr, 0.005, 0.015, 0.05)
        for rho in (0.0015, 0.005, 0.015):
            rows[f"SAM on W', lr {lr:g}, rho {rho:g}"] = Setting(lr, rho_merged=rho)
    return rows


def toy_rows() -> dict[str, Setting]:
    rhos = (0.03, 0.1, 0.3, 0.9)
    return rows_of_strengths(7e-4, rhos, rhos, dropouts=(0.2, 0.5, 0.8))


def sigma_rows(lr: float, *sigmas: float) -> dict[str, Setting]:
    return {f"sigma {sigma:g}": Setting(lr, sigma=sigma) for sigma in sigmas}


def lora_rows(*lrs: float) -> dict[str, Setting]:
    return {f"LoRA, lr {lr:g}": Setting(lr) for lr in lrs}


def flat_rows(lr: float, *sigmas: float) -> dict[str, Setting]:
    return {f"Flat-LoRA, lr {lr:g}, sigma {sigma:g}": Setting(lr, sigma=sigma) for sigma in sigmas}


def sam_rows(lr: float, *rhos: float) -> dict[str, Setting]:
    return {f"SAM on (A, B), lr {lr:g}, rho {rho:g}": Setting(lr, rho=rho) for rho in rhos}


def rows_of_strengths(
    lr: float, rhos: Iterable[float], rhos_merged: Iterable[float], dropouts: Iterable[float]
) -> dict[str, Setting]:
    rows = sigma_rows(lr, 0, 0.05, 0.1, 0.15, 0.3, 0.6)
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


def tuned(name: str, score: Callable[[Line], tuple[float, ...]]) -> dict[str, Setting]:
    """Of each method the setting with the lowest mean score over the seeds of tuning; of equal ones the first.

    Empty until all rows and seeds of the tuning have run.
    """
    rows = STUDIES[name].rows()
    found: dict[str, list[tuple[float, ...]]] = {row: [] for row in rows}
    last = {(line["row"], line["seed"]): line for line in read_runs(name)}
    for (row, _), line in last.items():
        found[row].append(score(line))
    if any(len(values) < len(STUDIES[name].seeds) for values in found.values()):
        return {}

    best: dict[str, str] = {}
    means = {row: tuple(map(fmean, zip(*values))) for row, values in found.items()}
    for row in rows:
        method = row.partition(", lr ")[0]
        if method not in best or means[row] < means[best[method]]:
            best[method] = row
    return {f"{method}, tuned": rows[row] for method, row in best.items()}


def by_loss(line: Line) -> tuple[float]:
    return (line["test_loss"],)


def by_accuracy(line: Line) -> tuple[float, float]:
    return -line["test_acc"], line["test_loss"]


class Study(NamedTuple):
    rows: Callable[[], dict[str, Any]]
    seeds: range
    variant: dict[str, Any] | None = None  # of the task


STUDIES = {  # later studies use no seed of an earlier one on the same task
    "movies_rates": Study(movies_rates_rows, range(4)),
    "movies": Study(movies_rows, range(15)),
    "movies_epochs": Study(
        lambda: sigma_rows(5e-4, 0, 0.05, 0.15),  # the learning rate and, in the second row, the sigma of the paper
        range(100, 108),
        {"steps": 313, "brief": True},  # 313 x 16 snippets are ten times 500
    ),
    "movies_again": Study(lambda: sigma_rows(1.2e-3, 0, 0.1), range(200, 215), {"other_half": True, "brief": True}),
    "movies_accuracy_rates": Study(movies_accuracy_rates_rows, range(300, 304), {"tuning_test": 1000}),
    "movies_accuracy": Study(lambda: tuned("movies_accuracy_rates", by_accuracy), range(310, 325), {"brief": True}),
    "movies_more_data": Study(
        lambda: sigma_rows(1.2e-3, 0, 0.1), range(400, 408), {"snippets": 5072, "steps": 400, "brief": True}
    ),
    "packages_rates": Study(packages_rates_rows, range(4)),
    "packages": Study(packages_rows, range(10)),
    "packages_again": Study(packages_again_rows, range(10), {"first_base": 100}),
    "packages_tuned_rates": Study(packages_tuned_rates_rows, range(40, 44)),
    "packages_tuned": Study(lambda: tuned("packages_tuned_rates", by_loss), range(20, 30)),
    "toy": Study(toy_rows, range(20)),
    "variance": Study(variance.rows, range(10)),
}


# ---- Runs ----------------------------------------------------------------------------------------------------


@functools.cache
def load(name: str) -> Task:
    task = task_of(name)
    module = importlib.import_module(task)
    return getattr(module, task.capitalize())(**(STUDIES[name].variant or {}))


def task_of(name: str) -> str:
    return name.partition("_")[0]


@functools.cache
def code(name: str) -> str:
    """A fingerprint of the code behind a study: three files, and what they use of the scripts."""
    task = task_of(name)
    files = [ROOT / "flatlora.py", HERE / "training.py", HERE / f"{task}.py"]
    used = [*training.USED, *getattr(importlib.import_module(task), "USED", [])]
    return fingerprint([*(file.read_text("utf-8") for file in files), *map(inspect.getsource, used)])


def read_runs(name: str) -> list[Line]:
    path = RUNS / f"{name}.jsonl"
    if not path.exists():
        return []
    lines = path.read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]  # a kill may have cut one


def changed(setting: Any) -> dict[str, Any]:
    """The learning rate of a setting, and what differs from the defaults."""
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
    """Do the runs that are missing, seed by seed."""
    rows = STUDIES[name].rows()
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
    with (
        multiprocessing.get_context("spawn").Pool(workers, start_worker) as pool,
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*STUDIES, "tables"])
    parser.add_argument("--seeds", type=int, help="the first N seeds (all)")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="these alone")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs side by side (%(default)s)")
    args = parser.parse_args()
    if args.what == "tables":
        from tables import write_pages  # which imports this file

        return write_pages()
    perform(args.what, STUDIES[args.what].seeds[: args.seeds], args.rows, args.workers)


if __name__ == "__main__":
    main()
