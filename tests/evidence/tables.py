"""The tables of README.md here and of the project's front page, from the runs that study.py has written."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from claims import CLAIMS, Claim, Term, word, word_of_equality
from stats import Estimate, estimate, holm_levels
from study import HERE, ROOT, ROWS, SEEDS, changed, code, movies_tuned, read_runs

Runs = dict[tuple[str, int], dict[str, Any]]  # row and seed: what was measured
Results = dict[str, Runs]  # by study
Column = tuple[str, tuple[tuple[float, str], ...], int]  # heading; metrics with weights, to be added; digits

FRONT = ("A", "B", "C", "E2", "K")  # the claims on the front page
FAMILIES = {  # of which a claim takes the best row: the beginning of its rows
    "best Flat-LoRA": "sigma ",
    "best SAM on (A, B)": "SAM on (A, B), ",
    "best SAM on W'": "SAM on W', ",
}
ACCURACY: list[Column] = [
    ("test, %", ((1, "test_right"),), 2),
    ("typos 1", ((1, "typos_1_right"),), 2),
    ("typos 3", ((1, "typos_3_right"),), 2),
    ("typos 5", ((1, "typos_5_right"),), 2),
    (
        "3 other domains",
        ((1 / 3, "amazonReviewSnippets_right"), (1 / 3, "nytEditorialSnippets_right"), (1 / 3, "tweets_right")),
        2,
    ),
]
TEST: Column = ("test loss", ((1, "test_loss"),), 4)
OTHER: Column = ("other domain", ((1, "other_loss"),), 4)
OLD: Column = ("old text", ((1, "old_loss"),), 4)
ROUNDED: Column = ("test, 3 bits", ((1, "test_loss"), (1, "rise_3_bits")), 4)
RISE_BITS: Column = ("rise, 3 bits", ((1, "rise_3_bits"),), 4)
GAP: Column = ("test - training", ((1, "test_loss"), (-1, "train_loss")), 4)
TRAINING: Column = ("training loss", ((1, "train_loss"),), 4)
SHARP: Column = ("rise, sigma 0.1", ((1, "rise_0.1"),), 4)
SHARPER: Column = ("rise, sigma 0.3", ((1, "rise_0.3"),), 4)
LORA = "sigma 0"  # the row of plain LoRA
OTHER_TASKS = [  # claim, what is measured on every task, and the row that is held against LoRA
    ("C", SHARP, "sigma 0.1"),
    ("C", SHARPER, "sigma 0.3"),
    ("D", TRAINING, "sigma 0.1"),
    ("D", GAP, "sigma 0.1"),
    ("K", RISE_BITS, "sigma 0.3"),
]


# ---- Numbers -------------------------------------------------------------------------------------------------


def load_results() -> Results:
    """Of each row and seed the last run."""
    found: Results = {}
    for name in SEEDS:
        found[name] = {(line["row"], line["seed"]): line for line in read_runs(name)}

    cost = json.loads((HERE / "cost.json").read_text())
    found["cost"] = {}
    for title, cell in cost["llama"].items():
        for round, ratio in enumerate(cell["flat"]):
            found["cost"][title, round] = {"extra": 100 * (ratio - 1), "of_paper": 2.5}  # % of LoRA's time
    return found


def value(run: dict[str, Any], metric: str) -> np.ndarray:
    """A number, or of the answers a number per example: 100 if it was right."""
    given = run[metric]
    if not metric.endswith("_right"):
        return np.asarray(given)
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(given), np.uint8))  # (examples,)
    return 100.0 * bits


def contrast(runs: Runs, terms: Sequence[Term]) -> np.ndarray:
    """The sum of the terms, for each seed of which all their rows have run: (seeds,) or (seeds, examples)."""
    rows = {row for _, row, _ in terms}
    seeds = sorted({seed for _, seed in runs if all((row, seed) in runs for row in rows)})
    sums = []
    for seed in seeds:
        sums.append(sum(weight * value(runs[row, seed], metric) for weight, row, metric in terms))
    return np.array(sums)


def best(runs: Runs, family: str) -> str:
    """The row of a family with the lowest mean validation loss."""
    means = {}
    for row in dict.fromkeys(row for row, _ in runs):
        if row.startswith(FAMILIES[family]) and row != LORA:
            means[row] = contrast(runs, [(1, row, "val_loss"), (-1, LORA, "val_loss")]).mean()
    return min(means, key=means.get, default=family)


def values_of(claim: Claim, results: Results) -> np.ndarray:
    runs = results[claim.task]
    terms = []
    for weight, row, metric in claim.terms:
        terms.append((weight, best(runs, row) if row in FAMILIES else row, metric))
    return contrast(runs, terms)


def decided(results: Results) -> dict[str, tuple[str, str, str]]:
    """Of each claim that was tested the word, the number with Holm's interval, and the number of runs."""
    measured = {}
    for claim in CLAIMS:
        values = values_of(claim, results)
        if len(values) > 1:
            measured[claim] = values
    levels = holm_levels([estimate(values).p for values in measured.values()])

    found = {}
    for (claim, values), level in zip(measured.items(), levels):
        one = estimate(values, level)
        found[claim.letter] = (said_of(claim, one), f"{interval(one, claim.digits)} {claim.unit}".strip(), str(one.n))
    return found


def said_of(claim: Claim, one: Estimate) -> str:
    if claim.letter == "I":
        return word_of_equality(one.low, one.high)
    said = word(one.low, one.high, claim.gain)
    if said == "undecided":
        said += f", about {runs_needed(one, claim.gain)} runs"
    return said


def runs_needed(one: Estimate, gain: float | None) -> str:
    """So many that the interval would be clear of 0, or of half the paper's gain, if the mean stays."""
    limit = gain / 2 if gain else 0.0
    clear = max(one.mean, limit - one.mean)
    needed = math.ceil(one.n * (one.half / clear) ** 2) if clear > 0 else math.inf
    return f"{needed:,}" if needed <= 10_000 else "more than 10,000"


# ---- Tables --------------------------------------------------------------------------------------------------


def markdown(head: Sequence[str], body: Sequence[Sequence[str]], words: int = 1) -> str:
    """An aligned table whose first columns are `words`, the others numbers."""
    widths = [max(3, *map(len, column)) for column in zip(head, *body)]
    rule = ["-" * width for width in widths[:words]]
    rule += ["-" * (width - 1) + ":" for width in widths[words:]]
    lines = []
    for row in [head, rule, *body]:
        cells = list(map(str.ljust, row[:words], widths[:words]))
        cells += map(str.rjust, row[words:], widths[words:])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(one: Estimate, digits: int) -> str:
    return f"{one.mean:+.{digits}f} ({one.low:+.{digits}f} to {one.high:+.{digits}f})"


def claims_table(results: Results) -> str:
    found = decided(results)
    body = []
    for claim in CLAIMS:
        said, number, n = found.get(claim.letter, ("not tested", "", ""))
        body.append([claim.letter, claim.says, claim.test, f"**{said}**", number, n])
    return markdown(["", "the paper says", "tested here", "word", "number, 95 % interval", "n"], body, words=4)


def front_claims(results: Results) -> str:
    found = decided(results)
    body = []
    for claim in CLAIMS:
        if claim.letter in FRONT:
            said, number, _ = found.get(claim.letter, ("not tested", "", ""))
            body.append([claim.says, f"**{said}**", number])
    return markdown(["claim", "here", "number, 95 % interval"], body, words=2)


def rows_table(results: Results, name: str, columns: Sequence[Column], wanted: str = "") -> str:
    """The means of LoRA, then what the other rows differ from them, paired by seed, with 95 % intervals.

    `wanted` is a regular expression for the rows to show.
    """
    runs = results[name]
    if not runs:
        return "Not measured yet."
    body = []
    for row in ROWS[name]():
        if row != LORA and not re.match(wanted, row):
            continue
        base = LORA
        if row.startswith("rank"):
            base = row.replace("sigma 0.1", "sigma 0")  # LoRA of the same rank, whose own row has its means
        cells = cells_of(runs, row, base, columns)
        if cells:
            body.append(["LoRA" if row == LORA else row, *cells])
    head = [f"{name}, change against LoRA", *(title for title, _, _ in columns), "n"]
    return markdown(head, body) + "\n\n" + caption(results, name)


def cells_of(runs: Runs, row: str, base: str, columns: Sequence[Column]) -> list[str]:
    cells = []
    for _, metrics, digits in columns:
        terms = [(weight, row, metric) for weight, metric in metrics]
        if row != base:
            terms += [(-weight, base, metric) for weight, metric in metrics]
        values = contrast(runs, terms)
        if len(values) < 2:
            return []
        one = estimate(values)
        cells.append(f"{one.mean:.{digits}f}" if row == base else f"{one.mean:+.{digits}f} ±{one.half:.{digits}f}")
    return [*cells, str(len(values))]


def other_tasks(results: Results) -> str:
    """Claims that are decided on one task, on all."""
    tasks = ("movies", "packages", "toy")
    body = []
    for letter, column, row in OTHER_TASKS:
        cells = [letter, column[0], row]
        for task in tasks:
            number, *_ = cells_of(results[task], row, LORA, [column]) or [""]
            cells.append(number)
        body.append(cells)
    return markdown(["", "change against LoRA", "trained at", *tasks], body, words=3)


def tuning_table(results: Results) -> str:
    """The mean loss of each setting over the seeds of tuning: a column per learning rate."""
    losses: dict[str, dict[str, str]] = {}
    for row, setting in ROWS["movies_rates"]().items():
        rate = f"{setting.lr:g}"
        values = contrast(results["movies_rates"], [(1, row, "test_loss")])
        of_strength = losses.setdefault(row.replace(f", lr {rate}", ""), {})
        of_strength[rate] = f"{values.mean():.4f}" if len(values) else ""

    rates = list(losses["LoRA"])
    body = []
    for strength, by_rate in losses.items():
        body.append([strength, *(by_rate.get(rate, "") for rate in rates)])
    return markdown(["movies, tuning: loss", *rates], body) + "\n\n" + caption(results, "movies_rates")


def tuned_table(results: Results) -> str:
    """Each method as it was tuned: LoRA's means, then what the others differ from them."""
    rows = ROWS["movies"]()
    names = {}
    for method, setting in movies_tuned().items():
        names[method] = next(row for row in rows if rows[row] == setting)

    columns = [*ACCURACY, TEST, RISE_BITS]
    body = []
    for method, name in names.items():
        values = [f"{key} {value:g}" for key, value in changed(rows[name]).items()]
        cells = cells_of(results["movies"], name, names["LoRA"], columns)
        if cells:
            body.append([f"{method}: {', '.join(values)}", *cells])
    head = ["movies, each method tuned", *(title for title, _, _ in columns), "n"]
    return markdown(head, body) + "\n\n" + caption(results, "movies")


def caption(results: Results, name: str) -> str:
    older = sum(run["code"] != code(name) for run in results[name].values())
    text = f"`study.py {name}`"
    if older:
        text += f"; **{older} of {len(results[name])} runs are older than the code**"
    return text + "."


def variance_table(results: Results) -> str:
    body = []
    for row in ROWS["variance"]():
        values = contrast(results["variance"], [(1, row, "growth")])
        if len(values) > 1:
            one = estimate(values)
            body.append([row, f"{one.mean:.3f} ±{one.half:.3f}", str(len(values))])
    return markdown(["inputs", "growth of the variance / sigma^2", "n"], body) + "\n\n" + caption(results, "variance")


def cost(results: Results) -> str:
    """Of the benchmark, the rows and shapes for the front page."""
    found = json.loads((HERE / "cost.json").read_text())
    shapes = ("512 tokens", "2,048 tokens", "8 x 512 tokens")
    largest = 16 * found["cell"]["width"] ** 2  # bytes of the largest weight
    memory = next(iter(found["memory"].values()))
    body = []
    for method, label in (("flat", "Flat-LoRA"), ("add", "add and subtract"), ("sam", "SAM on (A, B)")):
        times = [f"{found['time'][shape]['ratio'][method][1]:.2f}" for shape in shapes]
        above = (memory[method]["peak"] - memory["lora"]["peak"]) / largest
        drift = f"{100 * found['drift'][method]['bf16']:.2g} %"
        body.append([label, *times, f"{above:.2f}", drift])
    head = ["", *shapes, "memory", f"drift, {found['steps']} steps"]
    return markdown(head, body)


def all_costs(results: Results) -> str:
    """What the benchmark printed."""
    from bench_cost import report  # imports PEFT, where it is installed, which takes a while

    return f"```\n{report(json.loads((HERE / 'cost.json').read_text()))}\n```"


def printed(results: Results) -> str:
    """The whole of what train_gpt2.py prints but the texts."""
    content = json.loads((HERE / "gpt2.json").read_text())
    return f"```\n{content['report']}\n```"


# ---- Pages ---------------------------------------------------------------------------------------------------

Tables = dict[str, Callable[[Results], str]]


def front() -> Tables:
    """The tables of the README.md of the project, marked alike."""
    return {"claims": front_claims, "cost": cost, "printed": printed}


def blocks() -> Tables:
    """The tables of README.md here: between `<!-- table NAME -->` and `<!-- end -->`."""
    table = functools.partial
    curves = "sigma|SAM|dropout|trained"
    choices = "constant|one std|sigma 0.[136]$|rank"
    losses = [TEST, TRAINING, GAP, SHARP, SHARPER, RISE_BITS]
    return {
        "claims": claims_table,
        "other tasks": other_tasks,
        "movies": table(rows_table, name="movies", columns=ACCURACY, wanted="sigma"),
        "movies losses": table(rows_table, name="movies", columns=losses, wanted="sigma"),
        "movies tuning": tuning_table,
        "movies tuned": tuned_table,
        "packages": table(rows_table, name="packages", columns=[TEST, OTHER, OLD, RISE_BITS, ROUNDED], wanted=curves),
        "packages gaps": table(rows_table, name="packages", columns=[TRAINING, GAP, SHARP, SHARPER], wanted=curves),
        "packages choices": table(rows_table, name="packages", columns=[TEST, OTHER, ROUNDED], wanted=choices),
        "packages again": table(rows_table, name="packages_again", columns=[TEST, OTHER, RISE_BITS, ROUNDED]),
        "toy": table(rows_table, name="toy", columns=[TEST, OTHER, GAP, SHARP, ROUNDED], wanted=curves),
        "variance": variance_table,
        "all costs": all_costs,
    }


def rendered(readme: str, results: Results, tables: Tables) -> str:
    """README.md with every table as the runs say it. ValueError: a table is missing in it, or unknown."""
    parts = re.split(r"(<!-- table ([\w ]+) -->\n).*?(<!-- end -->)", readme, flags=re.S)
    if sorted(parts[2::4]) != sorted(tables):
        raise ValueError(f"README.md must have the tables {sorted(tables)} once each, it has {sorted(parts[2::4])}")
    text = parts[0]
    for opening, name, end, rest in zip(parts[1::4], parts[2::4], parts[3::4], parts[4::4]):
        text += f"{opening}{tables[name](results)}\n{end}{rest}"
    return text


def pages() -> dict[Path, Tables]:
    return {HERE / "README.md": blocks(), ROOT / "README.md": front()}


def write_pages() -> None:
    results = load_results()
    for page, tables in pages().items():
        page.write_text(rendered(page.read_text("utf-8"), results, tables), "utf-8")
