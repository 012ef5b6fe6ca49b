"""The picture: what more strength does, for each method, on packages.

    python tests/evidence/picture.py    # writes strength-light.png and strength-dark.png beside this file

Reads the runs of study.py. Needs matplotlib.
"""

from __future__ import annotations

from typing import Any

from stats import estimate
from study import HERE, packages_rows
from tables import Runs, contrast, load_results

CURVES = {  # beginning of the rows, in order of strength
    "Flat-LoRA, sigma": "sigma ",
    "SAM on (A, B), rho": "SAM on (A, B), rho ",
    "SAM on W', rho": "SAM on W', rho ",
    "dropout": "dropout ",
}
THEMES = {  # background, ink, and a colour per curve
    "light": ("white", "#24292f", ["#0969da", "#bc4c00", "#8250df", "#1a7f37"]),
    "dark": ("#0d1117", "#e6edf3", ["#58a6ff", "#f0883e", "#d2a8ff", "#3fb950"]),
}
Point = tuple[float, float]  # mean change against LoRA, and half its 95 % interval


def change(runs: Runs, row: str, *metrics: str) -> Point:
    terms = [(1, row, metric) for metric in metrics]
    terms += [(-1, "sigma 0", metric) for metric in metrics]
    one = estimate(contrast(runs, terms))
    return one.mean, one.half


def rows_of(runs: Runs, beginning: str) -> list[str]:
    """The rows of a curve that have run, the weakest first."""
    ran = {row for row, _ in runs}
    return [row for row in packages_rows() if row.startswith(beginning) and row in ran and row != "sigma 0"]


def lowest_validation(runs: Runs, rows: list[str]) -> int:
    """The place of the row that its validation loss would choose; 0 is LoRA."""
    changes = [0.0, *(change(runs, row, "val_loss")[0] for row in rows)]
    return changes.index(min(changes))


def draw_strengths(panel: Any, runs: Runs, colours: list[str], metric: str) -> None:
    """Each curve from LoRA, at strength 0, to its strongest row."""
    for (name, beginning), colour in zip(CURVES.items(), colours):
        rows = rows_of(runs, beginning)
        points = [(0.0, 0.0), *(change(runs, row, metric) for row in rows)]
        means, halves = zip(*points)
        panel.errorbar(range(len(points)), means, yerr=halves, color=colour, marker="o", markersize=3, label=name)
        chosen = lowest_validation(runs, rows)
        panel.plot(chosen, means[chosen], "o", color=colour, markersize=7)
        strongest = rows[-1].removeprefix(beginning)  # the others' labels would lie on each other
        end = (len(rows), means[-1])
        panel.annotate(strongest, end, xytext=(4, 3), textcoords="offset points", color=colour, fontsize=7)
    panel.set_xlabel("strength, from none to the strongest, which is named;\nlarge dot: chosen by the validation loss")
    panel.set_xticks([])


def draw_trade(panel: Any, runs: Runs, colours: list[str]) -> None:
    """The loss after rounding against that before."""
    for beginning, colour in zip(CURVES.values(), colours):
        before = [0.0]
        after = [0.0]
        for row in rows_of(runs, beginning):
            before.append(change(runs, row, "test_loss")[0])
            after.append(change(runs, row, "test_loss", "rise_3_bits")[0])
        panel.plot(before, after, color=colour, marker="o", markersize=3)
    if ("trained in 3 bits", 0) in runs:
        x, _ = change(runs, "trained in 3 bits", "test_loss")
        y, _ = change(runs, "trained in 3 bits", "test_loss", "rise_3_bits")
        panel.plot(x, y, "s", color=panel.spines["left"].get_edgecolor(), markersize=4)
        panel.annotate("trained in 3 bits", (x, y), xytext=(-5, 4), textcoords="offset points", fontsize=7, ha="right")
    panel.set_xlabel("before rounding: test loss, change against LoRA's;\nup: the same after rounding")


def draw(pyplot: Any, runs: Runs, theme: str) -> None:
    back, ink, colours = THEMES[theme]
    style = dict.fromkeys(["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], ink)
    style |= {"figure.facecolor": back, "axes.facecolor": back, "legend.facecolor": back, "font.size": 8}
    with pyplot.rc_context(style):
        figure, panels = pyplot.subplots(1, 3, figsize=(9.6, 3.6), layout="constrained")
        draw_strengths(panels[0], runs, colours, "test_loss")
        draw_strengths(panels[1], runs, colours, "other_loss")
        draw_trade(panels[2], runs, colours)
        panels[0].set_title("Test loss, change against LoRA's")
        panels[1].set_title("The same on the next package")
        panels[2].set_title("After rounding to 3 bits, against before")
        for panel in panels:
            panel.axhline(0, color=ink, linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(HERE / f"strength-{theme}.png", dpi=130)
        pyplot.close(figure)


def main() -> None:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit('picture.py: matplotlib is not installed: pip install -e ".[evidence]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = load_results()["packages"]
    if not runs:
        raise SystemExit("picture.py: nothing is measured: python tests/evidence/study.py packages")
    for theme in THEMES:
        draw(pyplot, runs, theme)


if __name__ == "__main__":
    main()
