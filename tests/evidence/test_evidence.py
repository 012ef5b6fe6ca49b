"""The tables of README.md are those of the runs, and the arithmetic behind them is right."""

from __future__ import annotations

import importlib
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
from claims import CLAIMS, Claim, word, word_of_equality
from movies import with_typos
from stats import by_bootstrap, by_t, holm_levels, p_value, t_quantile
from torch import nn
from training import Data, Setting, loss_when_rounded, one_std_per_matrix, packed, round_rows

import flatlora

# ---- Statistics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("df, t", [(1, 12.706205), (2, 4.302653), (9, 2.262157), (19, 2.093024), (120, 1.979930)])
def test_t_quantile_against_printed_tables(df: int, t: float) -> None:
    assert t_quantile(0.05, df) == pytest.approx(t, abs=1e-6)


@pytest.mark.parametrize("df", [1, 2, 3, 8, 9])
def test_p_value_against_the_integral_of_the_density(df: int) -> None:
    x = torch.linspace(0, 2.5, 100_001, dtype=torch.float64)
    scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    density = scale * (1 + x**2 / df) ** (-(df + 1) / 2)
    inside = 2 * torch.trapezoid(density, x).item()
    assert p_value(2.5, df) == p_value(-2.5, df) == pytest.approx(1 - inside, abs=1e-8)


def test_students_interval_by_hand() -> None:
    one = by_t([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3) / 2  # t of 3 degrees of freedom, standard deviation, root of n
    assert (one.mean, one.n) == (2.5, 4)
    assert (one.low, one.high) == pytest.approx((2.5 - half, 2.5 + half), abs=1e-5)


def test_the_p_value_of_equal_values() -> None:
    assert by_t([1.0, 1.0]).p == 0
    assert by_t([0.0, 0.0]).p == 1


def test_one_value_has_no_interval() -> None:
    with pytest.raises(ValueError, match="two values, got 1"):
        by_t([1.0])


def test_the_bootstrap_knows_the_variance_of_both_seeds_and_examples() -> None:
    rng = np.random.default_rng(0)
    by_seed = rng.normal(0, 1, (40, 1))
    by_example = rng.normal(0, 3, (1, 200))
    one = by_bootstrap(5 + by_seed + by_example)
    error = math.sqrt(by_seed.var() / 40 + by_example.var() / 200)
    assert one.half == pytest.approx(1.96 * error, rel=0.05)
    assert one.mean == pytest.approx(5 + by_seed.mean() + by_example.mean(), rel=1e-6)


def test_the_bootstraps_p_value_is_the_share_beyond_zero() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (10, 300))
    values += by_bootstrap(values).half - values.mean()  # 0 lies at the edge of the interval
    assert by_bootstrap(values).p == pytest.approx(0.05, abs=0.01)


def test_holm_by_hand() -> None:
    # In order .001 .012 .04 .2 against .05 / 4, / 3, / 2: the third fails, so the fourth does too.
    assert holm_levels([0.001, 0.2, 0.012, 0.04]) == pytest.approx([0.05 / 4, 0.05 / 2, 0.05 / 3, 0.05 / 2])


# ---- The rule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "low, high, gain, expected",
    [
        (0.1, 0.6, 0.5, "reproduced"),
        (0.1, 0.2, 0.5, "reproduced, smaller"),
        (-0.1, 0.2, 0.5, "contradicted"),
        (-0.1, 0.3, 0.5, "undecided"),
        (0.1, 0.2, None, "reproduced"),
        (-0.1, 0.1, None, "undecided"),
        (-0.2, -0.1, None, "contradicted"),
    ],
)
def test_the_word_of_an_interval(low: float, high: float, gain: float | None, expected: str) -> None:
    assert word(low, high, gain) == expected


@pytest.mark.parametrize(
    "low, high, expected",
    [(-0.01, 0.04, "reproduced"), (0.06, 0.1, "contradicted"), (-0.1, 0.01, "undecided"), (0.01, 0.1, "undecided")],
)
def test_the_word_for_a_number_that_is_to_be_zero(low: float, high: float, expected: str) -> None:
    assert word_of_equality(low, high) == expected


def test_runs_needed_make_the_interval_clear_of_zero() -> None:
    one = by_t([1.0, -1.0, 2.0, 0.0])  # mean 0.5
    needed = int(tables.runs_needed(one, None))
    assert one.half * math.sqrt(one.n / needed) <= 0.5 < one.half * math.sqrt(one.n / (needed - 1))


def test_every_claim_names_rows_that_its_study_runs() -> None:
    rows_of = {name: rows() for name, rows in study.ROWS.items()}
    rows_of["cost"] = {title for title, _ in tables.load_results()["cost"]}
    for claim in CLAIMS:
        rows = rows_of[claim.task]
        for _, row, _ in claim.terms:
            assert row in rows or row in tables.FAMILIES


def test_each_method_takes_its_best_setting_or_lora_at_a_shared_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"LoRA, lr 0.0005": 1.0, "LoRA, lr 0.0012": 2.0, "SAM on (A, B), lr 0.0016, rho 0.05": 1.5}
    lines = []
    for row in study.movies_rates_rows():
        for seed in range(4):
            lines.append({"row": row, "seed": seed, "test_loss": best.get(row, 3.0)})
    monkeypatch.setattr(study, "read_runs", lambda name: lines)
    expected = {"LoRA": Setting(5e-4), "Flat-LoRA": Setting(1.2e-3), "SAM on (A, B)": Setting(1.6e-3, rho=0.05)}
    assert study.movies_tuned() == expected

    lines.pop()  # a seed has not run
    assert study.movies_tuned() == {}


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


def test_the_best_row_is_that_of_the_lowest_validation_loss() -> None:
    runs = {}
    for row, losses in {"sigma 0": (0.0, 0.0), "sigma 0.1": (2.0, 2.0), "sigma 0.3": (1.0, 1.5)}.items():
        for seed, loss in enumerate(losses):
            runs[row, seed] = {"val_loss": loss}
    assert tables.best(runs, "best Flat-LoRA") == "sigma 0.3"


# ---- Training and measures -----------------------------------------------------------------------------------


class Tiny:
    """A task of a tenth of a second."""

    samples = 2

    def adapted(self, seed: int, setting: Setting) -> nn.Module:
        model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))
        return flatlora.inject_lora(model, setting.r or 4, 8, setting.dropout)

    def data(self, seed: int, tuning: bool) -> Data:
        x = torch.randn(64, 12, generator=torch.Generator().manual_seed(seed))  # (N, 12)
        batch = (x, x[:, :4].argmax(1))
        return Data([batch] * 20, [batch], [batch], {"test": [batch]}, [batch])


SETTINGS = [
    Setting(1e-2),
    Setting(1e-2, r=2),
    Setting(1e-2, dropout=0.3),
    Setting(1e-2, weight_decay=4.0),
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
    layer = flatlora.LoRALinear(nn.Linear(12, 4), r=2, alpha=4)
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
    layer = flatlora.LoRALinear(nn.Linear(300, 200))
    layer.base.weight.data *= torch.linspace(0.1, 3, 200)[:, None]
    plain = layer.weight.detach()
    by_row = flatlora.filter_std(plain, 0.2)
    with one_std_per_matrix(True), flatlora.perturbed(layer, 0.2, seed=1):
        noise = layer.weight.detach() - plain

    assert float(noise.norm() / plain.norm()) == pytest.approx(0.2, rel=0.03)
    sizes = noise.square().mean(1).sqrt()  # (200,)
    assert sizes.max() < 1.5 * sizes.min()
    assert torch.equal(flatlora.filter_std(plain, 0.2), by_row)


def test_typos_are_as_many_as_asked() -> None:
    text = "abcdefghij" * 1000
    wrong = with_typos(text, 0.06, np.random.default_rng(0))
    assert with_typos(text, 0.0, np.random.default_rng(0)) == text
    doubled = len(re.findall(r"(.)\1", wrong))
    assert doubled == pytest.approx(200, rel=0.2)  # a third of 600
    assert abs(len(wrong) - len(text)) < 100  # as many are dropped


def test_the_cells_for_a_gpu_run_on_a_cpu() -> None:
    bench_cost = importlib.import_module("bench_cost")  # which imports PEFT, where it is installed
    cell = bench_cost.llama_cell(context=8, micro_batches=2, width=64, depth=1, device="cpu")
    times = bench_cost.times_of_steps(cell, bench_cost.LLAMA_METHODS, seconds=0.0, title="tiny")
    assert times["rounds"] == 3
    assert list(times["ratio"]) == ["lora", "flat", "add", "sam"]
    times["peaks"] = {"lora": 20_000_000_000, "flat": 20_120_000_000, "add": 21_000_000_000, "sam": 20_000_000_000}
    lines = bench_cost.report({"card": "a card", "llama": {"tiny": times}}).splitlines()
    rows = [re.split("  +", line) for line in lines]
    assert [row[0] for row in rows[6:10]] == ["LoRA, ms", "Flat-LoRA", "add and subtract", "SAM on (A, B)"]
    assert rows[-4:] == [
        ["LoRA", "20.00"],
        ["Flat-LoRA", "+0.12"],
        ["add and subtract", "+1.00"],
        ["SAM on (A, B)", "+0.00"],
    ]


# ---- Pages ---------------------------------------------------------------------------------------------------

PAGES = tables.pages()


@pytest.mark.parametrize("page", PAGES, ids=["evidence", "front"])
def test_the_pages_show_the_runs(page: Path) -> None:
    text = page.read_text("utf-8")
    assert tables.rendered(text, tables.load_results(), PAGES[page]) == text, "study.py tables mends it"


@pytest.mark.parametrize("page", PAGES, ids=["evidence", "front"])
def test_numbers_in_sentences_are_those_of_tables(page: Path) -> None:
    between_marks = r"<!-- table .*?<!-- end -->"
    shown = "".join(re.findall(between_marks, (study.HERE / "README.md").read_text("utf-8"), flags=re.S))
    sentences = re.sub(between_marks, "", page.read_text("utf-8"), flags=re.S)
    for number in re.findall(r"[-+][\d.]+\s±[\d.]+\d", sentences):
        assert f" {number.replace(chr(10), ' ')} " in shown, number


def test_a_table_is_written_anew_between_its_marks() -> None:
    page = "a\n<!-- table one -->\n1.5\n<!-- end -->\nb"
    text = tables.rendered(page, {}, {"one": lambda results: "2.5"})
    assert text == page.replace("1.5", "2.5")


def test_a_table_of_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="must have the tables"):
        tables.rendered("<!-- table none -->\n<!-- end -->", {}, {})


def test_a_claim_that_was_not_run_is_not_tested() -> None:
    empty: tables.Results = {claim.task: {} for claim in CLAIMS}
    assert "**not tested**" in tables.claims_table(empty)


def test_the_runs_are_small_and_whole() -> None:
    paths = [*study.RUNS.glob("*.jsonl"), *study.HERE.glob("*.json")]
    assert sum(path.stat().st_size for path in paths) < 2_000_000
    json.dumps([study.read_runs(name) for name in study.SEEDS], allow_nan=False)


def test_claims_are_settled_by_their_own_numbers() -> None:
    """A study made up so that claim A has a gain of one point in every seed."""
    right = torch.zeros(200, dtype=torch.bool)
    right[:100] = True
    better = right.clone()
    better[100:102] = True
    runs = {}
    for seed in range(5):
        runs["sigma 0", seed] = {"test_right": packed(right)}
        runs["sigma 0.1", seed] = {"test_right": packed(better)}
    claim: Claim = CLAIMS[0]
    assert tables.values_of(claim, {"movies": runs}).mean() == pytest.approx(1.0)
