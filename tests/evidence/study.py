"""The studies: settings, runs, and the tables of README.md in this folder.

    python tests/evidence/study.py tune movies      # each method's settings, on data that the results do not use
    python tests/evidence/study.py compare movies   # the methods at these settings, seed by seed
    python tests/evidence/study.py ablate movies    # Flat-LoRA with one of its choices changed
    python tests/evidence/study.py tables           # writes the tables of README.md anew from the JSON files

The tasks are movies, packages and toy (see tasks.py), in this order of commands. Each finished run is noted under
out/evidence: the same command goes on where a stopped one was. The runs that are there are used again only if the
code is the same to the byte.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import re
import signal
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import tasks
import torch
from stats import estimate, holm_levels
from tasks import OUT, ROOT, Setting
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
OPTION = {  # the strength that is tuned beside the learning rate
    "LoRA": None,
    "dropout": "dropout",
    "weight decay": "weight_decay",
    "Flat-LoRA": "sigma",
    "Flat-LoRA, constant": "sigma",
    "SAM": "rho",
}
RATES = {
    "movies": (7e-4, 1.4e-3, 2.8e-3),
    "packages": (2e-3, 4e-3, 8e-3, 1.6e-2),
    "toy": (3.5e-4, 7e-4, 1.4e-3, 2.8e-3, 5.6e-3),
}
SIGMAS, DROPOUTS = (0.05, 0.15, 0.45), (0.1, 0.3, 0.6)
STRENGTHS = {  # each with each rate; LoRA gets as many learning rates in the same range
    "movies": {"dropout": DROPOUTS, "weight_decay": (1, 4, 16), "sigma": SIGMAS, "rho": (0.05, 0.15, 0.45)},
    "packages": {"dropout": DROPOUTS, "weight_decay": (0.5, 2, 8), "sigma": SIGMAS, "rho": (0.15, 0.45, 1.35)},
    "toy": {"dropout": (0.2, 0.5, 0.8), "weight_decay": (1, 4, 16), "sigma": SIGMAS, "rho": (0.1, 0.3, 0.9)},
}
SEEDS = {"movies": (2, 10), "packages": (2, 10), "toy": (5, 20)}  # in tuning, and in the results

# ---- Runs ----------------------------------------------------------------------------------------------------


def candidates(name: str) -> list[tuple[str, Setting]]:
    """(method, setting) of all that tuning tries: as many of each method."""
    rates, found = RATES[name], []
    for method, option in OPTION.items():
        if option is None:
            found += [(method, Setting(float(f"{lr:.3g}"))) for lr in np.geomspace(rates[0], rates[-1], 3 * len(rates))]
            continue
        schedule = "constant" if "constant" in method else "cosine"
        for lr, strength in itertools.product(rates, STRENGTHS[name][option]):
            found.append((method, Setting(lr, schedule=schedule, **{option: strength})))
    return found


def tuned(runs: Sequence[dict[str, Any]]) -> dict[str, tuple[Setting, float]]:
    """The setting of each method with the lowest mean validation loss, and that loss."""
    losses: dict[tuple[str, Setting], list[float]] = {}
    for run in runs:
        losses.setdefault((run["row"], Setting(**run["setting"])), []).append(run["val_loss"])
    best: dict[str, tuple[Setting, float]] = {}
    for (method, setting), values in losses.items():
        mean = statistics.fmean(values)
        if method not in best or mean < best[method][1]:
            best[method] = (setting, mean)
    return best


def rows(name: str, stage: str, tuning: Sequence[dict[str, Any]]) -> dict[str, Setting]:
    """The rows of the results and their settings."""
    found = {method: setting for method, (setting, _) in tuned(tuning).items()}
    constant, lora, flat = found.pop("Flat-LoRA, constant"), found["LoRA"], found["Flat-LoRA"]
    if stage == "ablate":
        return {
            "constant strength": constant,
            "one std per matrix": replace(flat, std="matrix"),
            "fresh normals": replace(flat, normals="fresh"),
            "new eps per quarter batch": replace(flat, draw="quarter"),
        }
    found["Flat-LoRA, four times the noise"] = replace(flat, sigma=4 * flat.sigma)
    found["Flat-LoRA, LoRA's rate"] = replace(flat, lr=lora.lr)  # the noise alone, should the rates differ
    if name == "packages":  # where the loss in the other domain rewards a low rate
        found["LoRA, half the rate"] = replace(lora, lr=lora.lr / 2)
        found["Flat-LoRA, half the rate"] = replace(flat, lr=flat.lr / 2)
    return found


def code(name: str) -> str:
    """Tells versions of the code that a task measures apart."""
    own = {"packages": ["train_gpt2.py"], "toy": ["train_toy.py"]}.get(name, [])
    files = [HERE / "tasks.py", *(ROOT / file for file in ["flatlora.py", *own])]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def start_worker() -> None:
    torch.set_num_threads(1)  # two runs side by side are faster than one on two threads, and sums do not depend on it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent


def work(job: tuple[str, str, str, Setting, int, bool]) -> dict[str, Any]:
    name, stage, row, setting, seed, quick = job
    changed = {key: value for key, value in asdict(setting).items() if key == "lr" or value != getattr(Setting, key)}
    result = tasks.run(name, setting, seed, tuning=stage == "tune", quick=quick)
    needed = {*SHOWN[name], *DAMAGED, *SHARPNESS, "sharp_full", "val_loss", "seconds"}
    metrics = {key: value for key, value in result.items() if key in needed}
    return {"row": row, "seed": seed, "setting": changed, **metrics}


def perform(name: str, stage: str, quick: bool) -> None:
    """Do the runs that are not there yet, several at a time, and write NAME.json when all are."""
    OUT.mkdir(parents=True, exist_ok=True)
    path, version = (OUT if quick else HERE) / f"{name}.json", code(name)
    content = json.loads(path.read_text()) if path.exists() and stage != "tune" else {}
    if stage != "tune" and not content:
        raise SystemExit(f"study.py: {path} is missing: run tune {name} first")
    pairs = candidates(name) if stage == "tune" else list(rows(name, stage, content["tune"]["runs"]).items())
    seeds = 2 if quick else SEEDS[name][stage != "tune"]
    log = OUT / f"{name}-{stage}-{version}{'-quick' if quick else ''}.jsonl"
    torch.set_num_threads(1)  # the base too is to be the same on every machine
    tasks.load(name)  # pre-trains, or stops with a message, before any process starts
    done = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        if line.endswith("}"):  # a kill may have cut the last one
            run = json.loads(line)
            done[run["row"], Setting(**run["setting"]), run["seed"]] = run
    keys = [(row, setting, seed) for seed in range(seeds) for row, setting in pairs]
    jobs = [(name, stage, *key, quick) for key in keys if key not in done]
    os.environ["TQDM_DISABLE"] = "1"  # in the processes that start now
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(os.cpu_count(), start_worker) as pool,
        open(log, "a") as file,
        tqdm(desc=f"{stage} {name}", total=len(keys), initial=len(keys) - len(jobs), smoothing=0) as bar,
    ):
        for run in pool.imap_unordered(work, jobs):
            file.write("\n" + json.dumps(run))
            file.flush()
            done[run["row"], Setting(**run["setting"]), run["seed"]] = run
            bar.update()
        pool.close()
        pool.join()
    runs = [done[key] for key in keys]
    minutes = sum(run.pop("seconds") for run in runs) / 60 / os.cpu_count()
    where = f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    content[stage] = {"code": version, "minutes": round(minutes, 1), "where": where, "runs": runs}
    path.write_text(json.dumps(content).replace('{"row"', '\n{"row"') + "\n")


# ---- Tables --------------------------------------------------------------------------------------------------

Results = dict[str, dict[str, Any]]  # task: content of its JSON file
METRICS = {  # label, digits
    "test_loss": ("test loss", 4),
    "other_loss": ("other domains", 4),
    "test_acc": ("test, %", 1),
    "other_acc": ("others, %", 1),
    "update": ("update, %", 1),
    "rise_8_bits": ("8 bits", 4),
    "rise_4_bits": ("4 bits", 4),
    "rise_3_bits": ("3 bits", 4),
    "rise_pruned": ("30 % pruned", 4),
    "old_loss": ("old text", 4),
    "sharp_full": ("sharpness", 4),
}
SHOWN = {
    "movies": ("test_loss", "other_loss", "test_acc", "other_acc", "update"),
    "packages": ("test_loss", "other_loss", "old_loss", "update"),
    "toy": ("test_loss", "other_loss", "test_acc", "other_acc", "update"),
}
DAMAGED = ("rise_8_bits", "rise_4_bits", "rise_3_bits", "rise_pruned")
SHARPNESS = {
    "sharp_lora": "noise 0.3 on A, B",
    "sharp_matched": "as large, on W'",
}
CLAIMED = {
    "test_loss": "lower test loss",
    "other_loss": "lower loss in other domains",
    "sharp_full": "flatter around W'",
    "rise_3_bits": "loses less at 3 bits",
}
Claim = tuple[str, str, str]
CLAIMS: list[Claim] = [  # row, metric, against
    ("SAM", "test_loss", "LoRA"),
    ("dropout", "test_loss", "LoRA"),
    ("weight decay", "test_loss", "LoRA"),
    ("Flat-LoRA", "test_loss", "LoRA"),
    ("Flat-LoRA, LoRA's rate", "test_loss", "LoRA"),
    ("SAM", "other_loss", "LoRA"),
    ("Flat-LoRA", "other_loss", "LoRA"),
    ("Flat-LoRA, LoRA's rate", "other_loss", "LoRA"),
    ("dropout", "other_loss", "LoRA"),
    ("weight decay", "other_loss", "LoRA"),
    ("Flat-LoRA", "sharp_full", "LoRA"),
    ("SAM", "sharp_full", "LoRA"),
    ("Flat-LoRA, four times the noise", "rise_3_bits", "LoRA"),
    ("Flat-LoRA, four times the noise", "rise_3_bits", "SAM"),
    ("Flat-LoRA, four times the noise", "rise_3_bits", "dropout"),
    ("constant strength", "test_loss", "Flat-LoRA"),
    ("one std per matrix", "test_loss", "Flat-LoRA"),
]
FRONT = [CLAIMS[i] for i in (0, 1, 3, 10, 12)]  # on the front page
COST_SHAPES = ("512 tokens", "2,048 tokens", "8 x 512 tokens")


def load_results(folder: Path = HERE) -> Results:
    files = {name: folder / f"{name}.json" for name in SEEDS}
    return {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}


def values(results: Results, name: str, row: str, metric: str) -> list[float]:
    """By seed."""
    stages = [results[name][stage]["runs"] for stage in ("compare", "ablate") if stage in results[name]]
    return [run[metric] for runs in stages for run in runs if run["row"] == row]


def differences(results: Results, name: str, row: str, against: str, metric: str) -> list[float]:
    """Paired by seed."""
    pairs = zip(values(results, name, row, metric), values(results, name, against, metric), strict=True)
    return [a - b for a, b in pairs]


def markdown(head: Sequence[str], body: Sequence[Sequence[str]], words: int = 1) -> str:
    """An aligned table whose first columns are `words`, the others numbers."""
    width = [max(3, *(len(row[i]) for row in (head, *body))) for i in range(len(head))]
    rule = ["-" * w if i < words else "-" * (w - 1) + ":" for i, w in enumerate(width)]
    lines = [
        [cell.ljust(w) if i < words else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, width))]
        for row in (head, rule, *body)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured(results: Results, *stages: str) -> list[str]:
    return [name for name in results if results[name].keys() >= {*stages}]


def caption(results: Results, stage: str, names: Sequence[str]) -> str:
    parts = [(name, results[name][stage]) for name in names]
    said = [f"`study.py {stage} {name}`, {part['minutes']:.1f} minutes on {part['where']}" for name, part in parts]
    return "\n\n" + "; ".join(said or ["Not measured yet"]) + "."


def changes(results: Results, name: str, stage: str, metrics: Sequence[str], first: str = "LoRA") -> list[list[str]]:
    """The means of the row `first`, then what the other rows of the stage differ from it, with 95 % intervals."""
    body = []
    for row in dict.fromkeys([first, *(run["row"] for run in results[name][stage]["runs"])]):
        cells = []
        for metric in metrics:
            digits = METRICS[metric][1]
            if row == first:
                cells.append(f"{statistics.fmean(values(results, name, row, metric)):.{digits}f}")
            else:
                found = estimate(differences(results, name, row, first, metric))
                cells.append(f"{found.mean:+.{digits}f} ±{found.half:.{digits}f}")
        body.append([row, *cells])
    return body


def comparison(name: str, results: Results) -> str:
    if name not in measured(results, "compare"):
        return "Not measured yet."
    head = [f"{name}, change against LoRA", *(METRICS[metric][0] for metric in SHOWN[name])]
    return markdown(head, changes(results, name, "compare", SHOWN[name])) + caption(results, "compare", [name])


def damaged(results: Results) -> str:
    metrics, names = (*DAMAGED, "sharp_full"), measured(results, "compare")
    body = [[name, *row] for name in names for row in changes(results, name, "compare", metrics)]
    return markdown(["task", "change against LoRA", *(METRICS[metric][0] for metric in metrics)], body, words=2)


def settings(results: Results) -> str:
    body, names = [], measured(results, "tune")
    for name in names:
        for method, (setting, loss) in tuned(results[name]["tune"]["runs"]).items():
            tried, strength = {setting.lr: RATES[name]}, ""
            if option := OPTION[method]:
                value = getattr(setting, option)
                tried[value], strength = STRENGTHS[name][option], f"{option} {value:g}"
            ends = ", ".join(f"{value:g}" for value, grid in tried.items() if value in (grid[0], grid[-1]))
            body.append([name, method, strength, ends, f"{setting.lr:g}", f"{loss:.4f}"])
    head = ["task", "method", "strength", "at an end of the range", "learning rate", "validation loss"]
    return markdown(head, body, words=4) + caption(results, "tune", names)


def flatness(results: Results) -> str:
    """Means with 95 % intervals, not differences: the columns are there to be compared too."""
    body = []
    for name in measured(results, "compare"):
        for row in ("LoRA", "Flat-LoRA", "SAM"):
            found = [estimate(values(results, name, row, metric)) for metric in SHARPNESS]
            body.append([name, row, *(f"{one.mean:.4f} ±{one.half:.4f}" for one in found)])
    return markdown(["task", "method", *SHARPNESS.values()], body, words=2)


def ablation(results: Results) -> str:
    metrics = ("test_loss", "other_loss", "rise_3_bits")
    names = measured(results, "compare", "ablate")
    body = [[name, *row] for name in names for row in changes(results, name, "ablate", metrics, "Flat-LoRA")]
    head = ["task", "change against Flat-LoRA", *(METRICS[metric][0] for metric in metrics)]
    return markdown(head, body, words=2) + caption(results, "ablate", names)


def worded(claim: Claim) -> str:
    row, metric, against = claim
    return f"{row}: {CLAIMED[metric]} than {against}"


def asked_and_found(results: Results) -> list[list[str]]:
    """Claim, task, verdict and change of all CLAIMS, with intervals by Holm's correction over all of them."""
    names = measured(results, "compare")
    asked = [(name, *claim) for claim in CLAIMS for name in names if values(results, name, *claim[:2])]
    found = [differences(results, name, row, against, metric) for name, row, metric, against in asked]
    levels = holm_levels([estimate(pairs).p for pairs in found])
    body = []
    for (name, row, metric, against), pairs, level in zip(asked, found, levels):
        mean, half, *_ = estimate(pairs, level)
        verdict = "yes" if mean + half < 0 else "no, the reverse" if mean - half > 0 else "not shown"
        digits = METRICS[metric][1]
        body.append([worded((row, metric, against)), name, verdict, f"{mean:+.{digits}f} ±{half:.{digits}f}"])
    return body


def findings(results: Results, claims: Sequence[Claim] = FRONT) -> str:
    """Verdict and change of each claim on each task, at the level that Holm's correction over all CLAIMS leaves."""
    names = measured(results, "compare")
    found = {(words, name): f"{verdict}, {change}" for words, name, verdict, change in asked_and_found(results)}
    head = ["claim", *(f"{name}, n = {len(values(results, name, 'LoRA', 'test_loss'))}" for name in names)]
    body = [[words, *(found.get((words, name), "not measured") for name in names)] for words in map(worded, claims)]
    return markdown(head, body)


def all_findings(results: Results) -> str:
    """Those in which a rival of Flat-LoRA wins come first."""
    rivals = ("SAM", "dropout", "weight decay")
    wins = {words for words, _, verdict, _ in asked_and_found(results) if verdict == "yes" and words.startswith(rivals)}
    return findings(results, sorted(CLAIMS, key=lambda claim: worded(claim) not in wins))


def cost(results: Results) -> str:
    """Of the benchmark, the rows and shapes for the front page."""
    found = json.loads((HERE / "cost.json").read_text())
    largest, (memory,) = 16 * found["cell"]["width"] ** 2, list(found["memory"].values())[:1]
    body = []
    for method, label in (("flat", "Flat-LoRA"), ("add", "add and subtract"), ("sam", "SAM on (A, B)")):
        times = [f"{found['time'][shape]['ratio'][method][1]:.2f}" for shape in COST_SHAPES]
        above = (memory[method]["peak"] - memory["lora"]["peak"]) / largest
        body.append([label, *times, f"{above:.2f}", f"{100 * found['drift'][method]['bf16']:.2g} %"])
    head = ["", *COST_SHAPES, "memory", f"drift, {found['steps']} steps"]
    return f"{markdown(head, body)}\n\n{found['machine']}."


def all_costs(results: Results) -> str:
    """What the benchmark printed."""
    from bench_cost import report  # imports PEFT, where it is installed, which takes a while

    return f"```\n{report(json.loads((HERE / 'cost.json').read_text()))}\n```"


def printed(results: Results) -> str:
    """The last two parts of what train_gpt2.py prints: differences to LoRA, and the verdict."""
    path = HERE / "gpt2.json"
    parts = json.loads(path.read_text())["report"].split("\n\n")[-2:] if path.exists() else ["Not measured yet."]
    return "```\n" + "\n\n".join(parts) + "\n```"


def front() -> dict[str, Callable[[Results], str]]:
    """The tables of the README.md of the project, marked alike."""
    return {"findings": findings, "cost": cost, "printed": printed}


def blocks() -> dict[str, Callable[[Results], str]]:
    """The tables of README.md: between `<!-- table NAME -->` and `<!-- end -->`."""
    found: dict[str, Callable[[Results], str]] = {"claims": all_findings, "settings": settings, "damaged": damaged}
    found |= {"flatness": flatness, "ablation": ablation, "all costs": all_costs}
    return found | {name: functools.partial(comparison, name) for name in SEEDS}


def rendered(readme: str, results: Results, tables: dict[str, Callable[[Results], str]]) -> str:
    """README.md with every table as the JSON files say it. ValueError: a table is missing in it, or unknown."""
    parts = re.split(r"(<!-- table ([\w ]+) -->\n).*?(<!-- end -->)", readme, flags=re.S)
    if sorted(parts[2::4]) != sorted(tables):
        raise ValueError(f"README.md must have the tables {sorted(tables)} once each, it has {sorted(parts[2::4])}")
    text = parts[0]
    for opening, name, end, rest in zip(parts[1::4], parts[2::4], parts[3::4], parts[4::4]):
        text += f"{opening}\n{tables[name](results)}\n\n{end}{rest}"
    return text


# ---- Command line --------------------------------------------------------------------------------------------


def main() -> None:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("what", choices=("tune", "compare", "ablate", "tables"))
    parser.add_argument("task", choices=tuple(SEEDS), nargs="?", help="for all but tables")
    parser.add_argument("--quick", action="store_true", help="two seeds and three steps, to try the code; JSON in out")
    args = parser.parse_args()
    if args.what != "tables":
        if args.task is None:
            parser.error(f"{args.what} needs a task: {', '.join(SEEDS)}")
        try:
            perform(args.task, args.what, args.quick)
        except KeyboardInterrupt:
            raise SystemExit("study.py: stopped; the same command goes on") from None
    results = load_results(OUT if args.quick else HERE)
    for name, table in blocks().items():
        print(f"\n---- {name}\n\n{table(results)}")
    for folder, tables in [] if args.quick else [(HERE, blocks()), (ROOT, front())]:
        page = folder / "README.md"
        page.write_text(rendered(page.read_text("utf-8"), results, tables), "utf-8")


if __name__ == "__main__":
    main()
