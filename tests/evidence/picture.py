"""The picture: what each method changes against LoRA, on the tasks with a pre-trained base that are measured.

    python tests/evidence/picture.py    # writes change-light.png and change-dark.png beside this file

Reads movies.json and packages.json, which study.py writes. Needs matplotlib.
"""

from __future__ import annotations

import statistics
from typing import Any

from stats import estimate
from study import HERE, Results, differences, load_results, values

PASSES = {"dropout": 1, "weight decay": 1, "Flat-LoRA": 1, "Flat-LoRA, LoRA's rate": 1, "SAM": 2}  # per step
TASKS = {"movies": "MiniLM, film reviews", "packages": "small GPT-2, source code"}
PANELS = {"test_loss": "Test", "other_loss": "Other domains"}
COLOURS = {"light": ("white", "#24292f", "#0969da", "#bc4c00"), "dark": ("#0d1117", "#e6edf3", "#58a6ff", "#f0883e")}


def draw(pyplot: Any, results: Results, theme: str) -> None:
    """One panel per test: mean and 95 % interval of the paired change of the loss, in per cent of LoRA's loss."""
    back, ink, *task_colours = COLOURS[theme]
    style = {key: ink for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")}
    with pyplot.rc_context(style | {"figure.facecolor": back, "axes.facecolor": back, "font.size": 9}):
        figure, panels = pyplot.subplots(1, 2, figsize=(7.4, 3.4), sharey=True, layout="constrained")
        for panel, (metric, title) in zip(panels, PANELS.items()):
            measured = [(name, label) for name, label in TASKS.items() if "compare" in results.get(name, {})]
            for shift, colour, (name, label) in zip((-0.15, 0.15), task_colours, measured):
                unit = statistics.fmean(values(results, name, "LoRA", metric)) / 100
                found = [estimate(differences(results, name, row, "LoRA", metric)) for row in PASSES]
                means, halves = [one.mean / unit for one in found], [one.half / unit for one in found]
                places = [place + shift for place in range(len(PASSES))]
                panel.errorbar(means, places, xerr=halves, fmt="o", color=colour, markersize=4, capsize=2, label=label)
            panel.axvline(0, color=ink, linewidth=0.8)
            panel.set_title(title)
            panel.set_xlabel("loss against LoRA's, % (left is better)")
            panel.spines[["top", "right"]].set_visible(False)
        words = [f"{row}\n{count} pass{'es' * (count > 1)} per step" for row, count in PASSES.items()]
        panels[0].set_yticks(range(len(PASSES)), words)
        panels[0].set_ylim(len(PASSES) - 0.6, -0.4)  # from the top down
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(HERE / f"change-{theme}.png", dpi=130)
        pyplot.close(figure)


def main() -> None:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit('picture.py: matplotlib is not installed: pip install -e ".[evidence]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = load_results()
    if not any("compare" in results.get(name, {}) for name in TASKS):
        raise SystemExit("picture.py: nothing is measured: python tests/evidence/study.py compare packages")
    for theme in COLOURS:
        draw(pyplot, results, theme)


if __name__ == "__main__":
    main()
