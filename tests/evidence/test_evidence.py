"""The tables of README.md are those of the runs, and the arithmetic behind them is right."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import study
import tables
import torch
import training
from claims import CLAIMS, LATER, word, word_of_equality
from movies import with_typos
from stats import Estimate, error_of_crossed_mean, estimate, holm_levels
from torch import nn
from training import Data, Setting, fingerprint, loss_when_rounded, one_std_per_matrix, packed, round_rows

import flatlora


@pytest.fixture
def scipy() -> None:
    """For tests that need its distributions."""
    pytest.importorskip("scipy", reason='needs pip install -e ".[evidence]"')


# ---- Statistics ----------------------------------------------------------------------------------------------


def test_students_interval_by_hand(scipy: None) -> None:
    one = estimate(np.array([1.0, 2.0, 3.0, 4.0]))
    half = 3.182446 * math.sqrt(5 / 3) / 2  # t of 3 degrees of freedom, standard deviation, root of n
    assert (one.mean, one.n) == (2.5, 4)
    assert (one.low, one.high) == pytest.approx((2.5 - half, 2.5 + half), abs=1e-5)
    assert estimate(np.array([1.0, 2.0, 3.0, 4.0]), level=one.p).low == pytest.approx(0, abs=1e-9)


def test_equal_values_and_one_value() -> None:
    assert estimate(np.array([1.0, 1.0])) == Estimate(1.0, 0.0, 2, 0.0)
    assert estimate(np.zeros((2, 5))).p == 1
    with pytest.raises(ValueError, match="two seeds, got 1"):
        estimate(np.array([1.0]))


def made_up(rng: np.random.Generator, by_seed: float, by_example: float, rest: float) -> np.ndarray:
    """Values (15 seeds, 300 examples) with the mean 0, and effects of these standard deviations."""
    return rng.normal(0, by_seed, (15, 1)) + rng.normal(0, by_example, (1, 300)) + rng.normal(0, rest, (15, 300))


def test_the_crossed_error_is_that_of_the_mean() -> None:
    """Against the standard deviation of the means of many studies made up with all three effects."""
    rng = np.random.default_rng(0)
    studies = [made_up(rng, 0.05, 0.3, 1.0) for _ in range(1000)]
    true = math.sqrt(0.05**2 / 15 + 0.3**2 / 300 + 1.0**2 / (15 * 300))
    assert np.std([values.mean() for values in studies]) == pytest.approx(true, rel=0.1)
    errors = [error_of_crossed_mean(values)[0] for values in studies]
    assert np.mean(np.square(errors)) == pytest.approx(true**2, rel=0.1)


@pytest.mark.parametrize("by_seed, by_example", [(0.0, 0.0), (0.05, 0.0), (0.0, 0.3), (0.05, 0.3)])
def test_crossed_intervals_cover_the_mean_as_often_as_they_say(scipy: None, by_seed: float, by_example: float) -> None:
    """The rest holds the interaction of seeds and examples, whose variance must not be counted more than once."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(600):
        one = estimate(made_up(rng, by_seed, by_example, 1.0))
        covered += one.low <= 0 <= one.high
    assert 0.93 <= covered / 600 <= 0.99


def test_holm_by_hand() -> None:
    # In order .001 .012 .04 .2 against .05 / 4, / 3, / 2: the third fails, so the fourth does too.
    assert holm_levels([0.001, 0.2, 0.012, 0.04]) == pytest.approx([0.05 / 4, 0.05 / 2, 0.05 / 3, 0.05 / 2])


# ---- The rule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "low, high, gain, expected",
    [
        (0.1, 0.6, 0.5, "holds here"),
        (0.1, 0.2, 0.5, "holds here, smaller"),
        (-0.1, 0.2, 0.5, "less than half of it here"),
        (-0.1, 0.3, 0.5, "open"),
        (0.1, 0.2, None, "holds here"),
        (-0.1, 0.1, None, "open"),
        (-0.2, -0.1, None, "not here"),
    ],
)
def test_the_word_of_an_interval(low: float, high: float, gain: float | None, expected: str) -> None:
    assert word(low, high, gain) == expected


@pytest.mark.parametrize(
    "low, high, expected",
    [(-0.01, 0.04, "holds here"), (0.06, 0.1, "not here"), (-0.1, 0.01, "open"), (0.01, 0.1, "open")],
)
def test_the_word_for_a_number_that_is_to_be_zero(low: float, high: float, expected: str) -> None:
    assert word_of_equality(low, high) == expected


def test_every_claim_names_rows_that_its_study_runs() -> None:
    rows_of = {name: set(one.rows()) for name, one in study.STUDIES.items()}
    rows_of["cost"] = {title for title, _ in tables.load_results()["cost"]}
    for claim in [*CLAIMS, *LATER]:
        for _, row, _ in claim.terms:
            assert row in rows_of[claim.task] or row.endswith(", tuned")


def test_later_studies_use_new_seeds() -> None:
    for task in ("movies", "packages"):
        seeds = [one.seeds for name, one in study.STUDIES.items() if study.task_of(name) == task]
        earlier = {seed for of_study in seeds if of_study[0] == 0 for seed in of_study}  # the pilot's are 0 to 3
        later = [seed for of_study in seeds if of_study[0] > 0 for seed in of_study]
        assert later and len(set(later) - earlier) == len(later)


def test_each_method_takes_its_best_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """By accuracy, of equal ones by loss, of those the first."""
    found = {"LoRA, lr 0.0006": (80, 0.6), "LoRA, lr 0.002": (80, 0.5), "SAM on (A, B), lr 0.002, rho 0.1": (81, 0.9)}
    lines = []
    for row in study.movies_accuracy_rates_rows():
        for seed in study.STUDIES["movies_accuracy_rates"].seeds:
            accuracy, loss = found.get(row, (70, 0.4))
            lines.append({"row": row, "seed": seed, "test_acc": accuracy, "test_loss": loss})
    monkeypatch.setattr(study, "read_runs", lambda name: lines)
    assert study.STUDIES["movies_accuracy"].rows() == {
        "LoRA, tuned": Setting(2e-3),
        "Flat-LoRA, tuned": Setting(6e-4, sigma=0.05),
        "SAM on (A, B), tuned": Setting(2e-3, rho=0.1),
    }

    lines.pop()  # a seed has not run
    assert study.STUDIES["movies_accuracy"].rows() == {}


def test_a_contrast_by_hand() -> None:
    runs = {}
    for seed, (a, b) in enumerate([(3.0, 1.0), (5.0, 2.0), (9.0, 9.0)]):
        runs["a", seed] = {"test_loss": a}
        runs["b", seed] = {"test_loss": b}
    del runs["b", 2]  # a seed that one row lacks does not count
    assert tables.contrast(runs, [(1, "a", "test_loss"), (-2, "b", "test_loss")]).tolist() == [1.0, 1.0]


def test_answers_are_kept_for_each_example() -> None:
    right = torch.rand(2000, generator=torch.Generator().manual_seed(0)) < 0.7
    kept = tables.value({"test_right": packed(right)}, "test_right")
    assert np.array_equal(kept, 100 * right.numpy())


def test_claim_e_takes_the_rows_of_the_lowest_validation_loss() -> None:
    runs = tables.load_results()["packages"]
    in_claim_e = {row for claim in CLAIMS if claim.letter in ("E1", "E2") for _, row, _ in claim.terms}
    best = set()
    for family in ("sigma 0.", "SAM on (A, B), ", "SAM on W', "):
        losses = {}
        for row in study.packages_rows():
            if row.startswith(family):
                losses[row] = tables.contrast(runs, [(1, row, "val_loss")]).mean()
        best.add(min(losses, key=losses.get))
    assert best == in_claim_e


def test_the_number_of_a_claim_has_holms_interval(scipy: None) -> None:
    """Of two claims: studies made up so that M has a gain of one point in every seed, and R has none."""
    m, r = [claim for claim in LATER if claim.letter in "MR"]
    plain, better = [{"test_right": packed(torch.arange(200) < right)} for right in (100, 102)]
    results: tables.Results = {m.task: {}, r.task: {}}
    for seed in range(5):
        results[m.task]["sigma 0", seed] = results[r.task]["sigma 0", seed] = plain
        results[m.task]["sigma 0.05", seed] = better
        results[r.task]["sigma 0.1", seed] = plain

    _, gain = tables.decided([m, r], results)["M"]
    assert gain.mean == pytest.approx(1.0)
    assert gain == estimate(tables.contrast(results[m.task], m.terms), 0.05 / 2)


# ---- Training and measures -----------------------------------------------------------------------------------


class Tiny:
    """A task of a tenth of a second."""

    samples = 2

    def adapted(self, seed: int, setting: Setting) -> nn.Module:
        model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))
        return flatlora.inject_lora(model, setting.r or 4, 8, setting.dropout, targets=".*")

    def data(self, seed: int, tuning: bool) -> Data:
        x = torch.randn(64, 12, generator=torch.Generator().manual_seed(seed))  # (N, 12)
        batch = (x, x[:, :4].argmax(1))
        return Data([batch] * 20, [batch], [batch], {"test": [batch]}, [batch])


SETTINGS = [
    Setting(1e-2),
    Setting(1e-2, r=2),
    Setting(1e-2, dropout=0.3),
    Setting(1e-2, sigma=0.5),
    Setting(1e-2, sigma=0.5, schedule="constant"),
    Setting(1e-2, sigma=0.5, std="matrix"),
    Setting(1e-2, rho=0.1),
    Setting(1e-2, rho_merged=0.1),
    Setting(1e-2, bits=3),
]


def test_every_setting_trains_otherwise() -> None:
    losses = [training.run(Tiny(), setting, 0)["train_loss"] for setting in SETTINGS]
    for one, other in itertools.combinations(losses, 2):
        assert one != other


def test_a_run_is_repeated_bit_for_bit() -> None:
    first = training.run(Tiny(), SETTINGS[4], 0)
    second = training.run(Tiny(), SETTINGS[4], 0)
    assert first.pop("seconds") and second.pop("seconds")
    assert first == second


def test_rounding_entry_by_entry() -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    rounded = round_rows(weight, 3)
    for i, row in enumerate(weight.tolist()):
        largest = max(map(abs, row))
        grid = [k * largest / 3 for k in range(-3, 4)]  # 3 bits, symmetric
        for j, w in enumerate(row):
            nearest = min(grid, key=lambda point, w=w: abs(point - w))
            assert rounded[i, j].item() == pytest.approx(nearest, abs=1e-6)


def test_training_in_three_bits_takes_the_gradient_at_the_rounded_weight() -> None:
    torch.manual_seed(0)
    layer = flatlora.add_lora(nn.Linear(12, 4), r=2, alpha=4)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(8, 12)
    y = torch.randint(4, (8,))
    loss = loss_when_rounded(layer, (x, y), bits=3)
    loss.backward()

    weight = round_rows(layer.weight.detach(), 3).requires_grad_()
    dense = nn.functional.cross_entropy(nn.functional.linear(x, weight, layer.bias), y)
    dense.backward()
    assert torch.allclose(loss, dense, atol=1e-6)
    assert torch.allclose(layer.lora_A.grad, layer.scaling * layer.lora_B.detach().T @ weight.grad, atol=1e-6)


def test_one_std_per_matrix_has_noise_of_the_same_size() -> None:
    torch.manual_seed(0)
    layer = flatlora.add_lora(nn.Linear(300, 200))
    layer.frozen_weight.data *= torch.linspace(0.1, 3, 200)[:, None]
    plain = layer.weight.detach()
    by_row = flatlora.row_std(plain, 0.2)
    with one_std_per_matrix(True), flatlora.perturbed(layer, 0.2, seed=1):
        noise = layer.weight.detach() - plain

    assert float(noise.norm() / plain.norm()) == pytest.approx(0.2, rel=0.03)
    sizes = noise.square().mean(1).sqrt()  # (200,)
    assert sizes.max() < 1.5 * sizes.min()
    assert torch.equal(flatlora.row_std(plain, 0.2), by_row)


def test_typos_are_as_many_as_asked() -> None:
    text = "abcdefghij" * 1000
    wrong = with_typos(text, 0.06, np.random.default_rng(0))
    assert with_typos(text, 0.0, np.random.default_rng(0)) == text
    doubled = len(re.findall(r"(.)\1", wrong))
    assert doubled == pytest.approx(200, rel=0.2)  # a third of 600
    assert abs(len(wrong) - len(text)) < 100  # as many are dropped


def test_a_fingerprint_is_that_of_the_code_alone() -> None:
    plain = "def f(x):\n    return x + 1\n"
    other = '"""Words."""\ndef f(x):  # words\n    """Words."""\n    return (x +\n        1)\n'
    assert fingerprint([plain]) == fingerprint([other])
    assert fingerprint([plain]) != fingerprint([plain.replace("1", "2")])
    assert fingerprint([plain]) != fingerprint([plain.replace("x + 1", "x - 1")])


def test_the_bench_for_a_gpu_runs_on_a_cpu() -> None:
    import bench_cost  # here, since it needs a Unix

    cell = bench_cost.llama_cell(context=8, micro_batches=2, width=64, depth=1, device="cpu")
    times = bench_cost.times_of_steps(cell, seconds=0.0, title="tiny")
    assert times["rounds"] == 3
    times["peaks"] = {"lora": 20_000_000_000, "flat": 20_120_000_000, "add": 21_000_000_000, "sam": 20_000_000_000}
    *_, row = tables.cost_table({"machine": "a card", "cells": {"1, 2 x 8": times}}).splitlines()
    cells = re.split(r" *\| *", row.strip("| "))
    assert cells[0] == "1, 2 x 8"
    assert cells[5:] == ["+120", "+1000", "+0", "3"]


# ---- Pages ---------------------------------------------------------------------------------------------------

PAGES = tables.pages()
PAGE = (study.HERE / "README.md").read_text("utf-8")
BETWEEN_MARKS = r"<!-- table .*?<!-- end -->"


@pytest.mark.parametrize("page", PAGES, ids=["evidence", "front"])
def test_the_pages_show_the_runs(scipy: None, page: Path) -> None:
    text = page.read_text("utf-8")
    assert tables.rendered(text, tables.load_results(), PAGES[page]) == text, "repair it by study.py tables"


@pytest.mark.parametrize("page", PAGES, ids=["evidence", "front"])
def test_numbers_in_sentences_are_those_of_tables(page: Path) -> None:
    shown = "".join(re.findall(BETWEEN_MARKS, PAGE, flags=re.S))
    sentences = re.sub(BETWEEN_MARKS, "", page.read_text("utf-8"), flags=re.S)
    for number in re.findall(r"[-+][\d.]+\s±[\d.]+\d", sentences):
        assert f" {number.replace(chr(10), ' ')} " in shown, number


def test_the_sentence_about_the_run_that_failed(scipy: None) -> None:
    runs = tables.load_results()["movies_accuracy"]
    of_lora = sorted((run["test_acc"], seed) for (row, seed), run in runs.items() if row == "LoRA, tuned")
    (worst, seed), (low, _), *_, (high, _) = of_lora
    others = {key: run for key, run in runs.items() if key[1] != seed}
    p, q = [estimate(tables.contrast(others, one.terms), 0.05 / 7) for one in LATER if one.letter in "PQ"]
    ends = f"one of LoRA's {len(of_lora)} runs ended at {worst:.1f} %, the others at {low:.2f} to {high:.2f} %"
    without = f"P would be {p.low:+.2f} to {p.high:+.2f} and Q {q.low:+.2f} to {q.high:+.2f}"
    assert f"{ends}. Without its seed, {without}" in " ".join(PAGE.split())


def test_the_sentences_about_tuning() -> None:
    def lowest_loss(name: str, method: str) -> tuple[float, str]:
        runs = {(line["row"], line["seed"]): line for line in study.read_runs(name)}
        rows = [row for row in study.STUDIES[name].rows() if row.startswith(method)]
        return min((tables.contrast(runs, [(1, row, "test_loss")]).mean(), row) for row in rows)

    _, best = lowest_loss("movies_accuracy_rates", "LoRA")
    assert best == "LoRA, lr 0.0024"
    assert lowest_loss("packages_tuned_rates", "Flat-LoRA") > lowest_loss("packages_tuned_rates", "LoRA")


def test_links_to_rows_and_sections_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", PAGE, flags=re.M)
    targets = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    targets.update(re.findall(r'<a id="(\w+)">', PAGE))
    links = re.findall(r"\]\(#([^)]+)\)", PAGE)
    assert links and targets.issuperset(links)


def test_a_table_is_written_between_its_marks() -> None:
    page = "a\n<!-- table one -->\n1.5\n<!-- end -->\nb"
    text = tables.rendered(page, {}, {"one": lambda results: "2.5"})
    assert text == page.replace("1.5", "2.5")


def test_a_table_of_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="must have the tables"):
        tables.rendered("<!-- table none -->\n<!-- end -->", {}, {})


def test_the_runs_are_small_and_complete() -> None:
    paths = [*study.RUNS.glob("*.jsonl"), *study.HERE.glob("*.json")]
    assert sum(path.stat().st_size for path in paths) < 2_000_000
    json.dumps([study.read_runs(name) for name in study.STUDIES], allow_nan=False)
