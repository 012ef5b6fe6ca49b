"""The tables of README.md here and of the project's front page, from the runs that study.py has written."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from claims import CLAIMS, LATER, Claim, Term, word_for
from stats import Estimate, estimate, holm_levels
from study import HERE, ROOT, STUDIES, changed, code, read_runs

Runs = dict[tuple[str, int], dict[str, Any]]  # row and seed: what was measured
Results = dict[str, Runs]  # by study
Column = tuple[str, tuple[tuple[float, str], ...], int]  # heading; metrics with weights, to be added; digits
Part = tuple[str, str, str]  # study, the row that others are compared with, a regular expression for these
Found = dict[str, Any]  # what bench_cost.py has measured

METHODS = {"lora": "LoRA", "flat": "Flat-LoRA", "add": "add and subtract", "sam": "SAM on (A, B)"}  # of the bench
OTHERS = {method: METHODS[method] for method in METHODS if method != "lora"}
LORA = "sigma 0"  # the row of plain LoRA

ACCURACY: Column = ("test, %", ((1, "test_right"),), 2)
TYPOS: Column = ("typos 5, %", ((1, "typos_5_right"),), 2)
DOMAINS = ("amazonReviewSnippets_right", "nytEditorialSnippets_right", "tweets_right")
TEST: Column = ("test loss", ((1, "test_loss"),), 4)
OTHER: Column = ("other domain", ((1, "other_loss"),), 4)
ROUNDED: Column = ("test, 3 bits", ((1, "test_loss"), (1, "rise_3_bits")), 4)
RISE_BITS: Column = ("rise, 3 bits", ((1, "rise_3_bits"),), 4)
GAP: Column = ("test - training", ((1, "test_loss"), (-1, "train_loss")), 4)
TRAINING: Column = ("training loss", ((1, "train_loss"),), 4)
SHARP: Column = ("rise, sigma 0.1", ((1, "rise_0.1"),), 4)
SHARPER: Column = ("rise, sigma 0.3", ((1, "rise_0.3"),), 4)
BRIEF = [ACCURACY, TYPOS, TEST, TRAINING, SHARP]
MOVIES: list[Column] = [
    ACCURACY,
    *[(f"typos {severity}", ((1, f"typos_{severity}_right"),), 2) for severity in (1, 5)],
    ("3 other domains", tuple((1 / 3, domain) for domain in DOMAINS), 2),
    *[TEST, TRAINING, SHARP],
]
FLATNESS = [SHARP, SHARPER, TRAINING, GAP, RISE_BITS]
PACKAGES: list[Column] = [TEST, OTHER, ("old text", ((1, "old_loss"),), 4), RISE_BITS, ROUNDED]


# ---- Numbers -------------------------------------------------------------------------------------------------


def load_results() -> Results:
    """Of each row and seed the last run."""
    found: Results = {}
    for name in STUDIES:
        found[name] = {(line["row"], line["seed"]): line for line in read_runs(name)}

    found["cost"] = {}
    for title, cell in load_cost()["cuda"]["cells"].items():
        for round, ratio in enumerate(cell["flat"]):
            found["cost"][title, round] = {"extra": 100 * (ratio - 1), "of_paper": 2.5}  # % of LoRA's time
    return found


def load_cost() -> Found:
    return json.loads((HERE / "cost.json").read_text("utf-8"))


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


def decided(claims: Sequence[Claim], results: Results) -> dict[str, tuple[str, Estimate]]:
    """By letter: the word and the number, with an interval at Holm's level among all of the claims."""
    measured = [contrast(results[claim.task], claim.terms) for claim in claims]
    levels = holm_levels([estimate(values).p for values in measured])
    found = {}
    for claim, values, level in zip(claims, measured, levels):
        one = estimate(values, level)
        found[claim.letter] = word_for(claim, one.low, one.high), one
    return found


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


def plus_minus(one: Estimate, digits: int) -> str:
    return f"{one.mean:+.{digits}f} ±{one.half:.{digits}f}"


def claims_table(results: Results, claims: Sequence[Claim]) -> str:
    found = decided(claims, results)
    body = []
    for claim in claims:
        said, one = found[claim.letter]
        anchor = f'<a id="{claim.letter}"></a>{claim.letter}{"°" * claim.seen}'
        texts = [claim.says, claim.test, claim.number, f"**{said}**"]
        body.append([anchor, *texts, plus_minus(one, claim.digits), str(one.n)])
    return markdown(["", "the paper says", "tested here", "the number is the", "word", "number", "n"], body, words=5)


def rows_table(results: Results, columns: Sequence[Column], *parts: Part) -> str:
    """The means of the first row of each part, then how the others differ from it, with 95 % intervals."""
    body = []
    for name, base, wanted in parts:
        settings = STUDIES[name].rows()
        for row in [base, *(row for row in settings if row != base and re.match(wanted, row))]:
            label = "LoRA" if row == LORA else row
            if row.endswith(", tuned"):
                chosen = changed(settings[row]).items()
                label += ": " + ", ".join(f"{key.removesuffix('_merged')} {value:g}" for key, value in chosen)
            body.append([name, label, *cells_of(results[name], row, base, columns)])
    head = ["study", "change against the first row", *(title for title, _, _ in columns), "n"]
    return markdown(head, body, words=2) + warnings(results, *(name for name, _, _ in parts))


def cells_of(runs: Runs, row: str, base: str, columns: Sequence[Column]) -> list[str]:
    cells = []
    for _, metrics, digits in columns:
        terms = [(weight, row, metric) for weight, metric in metrics]
        if row != base:
            terms += [(-weight, base, metric) for weight, metric in metrics]
        values = contrast(runs, terms)
        cells.append(f"{values.mean():.{digits}f}" if row == base else plus_minus(estimate(values), digits))
    return [*cells, str(len(values))]


def tuning_table(results: Results) -> str:
    """The mean accuracy of each setting over the seeds of tuning: a column per learning rate."""
    name = "movies_accuracy_rates"
    means: dict[str, dict[str, str]] = {}
    for row, setting in STUDIES[name].rows().items():
        rate = f"{setting.lr:g}"
        strength = row.replace(f", lr {rate}", "")
        mean = contrast(results[name], [(1, row, "test_acc")]).mean()
        means.setdefault(strength, {})[rate] = f"{mean:.2f}"

    rates = list(means["LoRA"])
    body = []
    for strength, by_rate in means.items():
        body.append([strength, *(by_rate.get(rate, "") for rate in rates)])
    return markdown(["accuracy, %, at the rate", *rates], body) + warnings(results, name)


def variance_table(results: Results) -> str:
    body = []
    for row in STUDIES["variance"].rows():
        one = estimate(contrast(results["variance"], [(1, row, "growth")]))
        body.append([row, f"{one.mean:.3f} ±{one.half:.3f}", str(one.n)])
    return markdown(["inputs", "growth of the variance / sigma^2", "n"], body) + warnings(results, "variance")


def warnings(results: Results, *names: str) -> str:
    """A line for each study that has runs of older code."""
    lines = ""
    for name in dict.fromkeys(names):
        older = sum(run["code"] != code(name) for run in results[name].values())
        if older:
            lines += f"\n\n**{older} of {len(results[name])} runs of {name} are older than the code.**"
    return lines


# ---- Cost ----------------------------------------------------------------------------------------------------


def costs(results: Results) -> str:
    found = load_cost()
    drift = found["cpu"]["drift of adding, %, after 100 steps"]
    text = f"By rounding, adding and subtracting moves a frozen bfloat16 W by {drift:.2f} % of its norm in 100 steps."
    return f"{cost_table(found['cuda'])}\n\n{cost_table(found['cpu'])}\n\n{text}"


def cost_table(found: Found) -> str:
    """A row per benchmark: times as multiples of LoRA's, median and quartiles, and peak memory above LoRA's."""
    body = []
    for title, cell in found["cells"].items():
        row = [title, f"{cell['ms']:.0f}"]
        for method in OTHERS:
            low, median, high = cell["ratio"][method]
            row.append(f"{median:.2f} ({low:.2f}-{high:.2f})")
        for method in OTHERS:
            above = (cell["peaks"][method] - cell["peaks"]["lora"]) / 1e6 if "peaks" in cell else None
            row.append("" if above is None else f"{above:+.0f}")
        body.append([*row, str(cell["rounds"])])
    memory = [f"{method}, MB" for method in OTHERS.values()]
    head = ["blocks, sequences x tokens", "LoRA, ms", *OTHERS.values(), *memory, "rounds"]
    return f"{found['machine']}:\n\n{markdown(head, body)}"


def brief_costs(results: Results) -> str:
    """The medians of both cost tables in one, without the rows of micro-batches."""
    body = []
    for device, machine in {"cuda": "H200", "cpu": "CPU"}.items():
        for title, cell in load_cost()[device]["cells"].items():
            if "micro" not in title:
                body.append([f"{machine}: {title}", *(f"{cell['ratio'][method][1]:.2f}" for method in OTHERS)])
    return markdown(["blocks, sequences x tokens", *OTHERS.values()], body)


def printed(results: Results) -> str:
    """All that train_gpt2.py prints but the texts."""
    content = json.loads((HERE / "gpt2.json").read_text("utf-8"))
    return f"```\n{content['report']}\n```"


# ---- Pages ---------------------------------------------------------------------------------------------------

Tables = dict[str, Callable[[Results], str]]


def front() -> Tables:
    """The tables of the README.md of the project, between the same marks."""
    return {"cost": brief_costs, "printed": printed}


def blocks() -> Tables:
    """The tables of README.md here: between `<!-- table NAME -->` and `<!-- end -->`."""
    shown = r"sigma 0.(05|1|3|6)$|SAM.*0.(05|015)$|trained|constant, sigma 0.3|one std.*0.3"
    return {
        "claims": functools.partial(claims_table, claims=CLAIMS),
        "later claims": functools.partial(claims_table, claims=LATER),
        "all tasks": rows(FLATNESS, *((task, LORA, r"sigma 0\.1$") for task in ("movies", "packages", "toy"))),
        "movies": rows(MOVIES, ("movies", LORA, "sigma|SAM")),
        "movies later": rows(
            BRIEF,
            ("movies_epochs", LORA, ""),
            ("movies_again", LORA, ""),
            ("movies_more_data", LORA, ""),
            ("movies", "LoRA, tuned", ".*tuned"),
            ("movies_accuracy", "LoRA, tuned", ""),
        ),
        "movies tuning": tuning_table,
        "packages": rows(PACKAGES, ("packages", LORA, shown)),
        "packages later": rows(
            PACKAGES,
            ("packages", "constant, sigma 0.3", "sigma 0.6"),
            ("packages", "rank 8, sigma 0", "rank 8"),
            ("packages_again", LORA, ""),
            ("packages_tuned", "LoRA, tuned", ""),
        ),
        "variance": variance_table,
        "cost": costs,
    }


def rows(columns: Sequence[Column], *parts: Part) -> Callable[[Results], str]:
    return lambda results: rows_table(results, columns, *parts)


def rendered(readme: str, results: Results, tables: Tables) -> str:
    """README.md with every table as the runs have it. ValueError: a table is missing in it, or unknown."""
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
