"""The tables of README.md are those of the JSON files, and the arithmetic behind them is right."""

from __future__ import annotations

import importlib
import json
import math
import re
from pathlib import Path

import pytest
import study
import torch
from stats import estimate, holm_levels, p_value, t_quantile
from tasks import Setting, ablated, prune_rows, round_rows

import flatlora


@pytest.mark.parametrize("df, t", [(1, 12.706205), (2, 4.302653), (9, 2.262157), (19, 2.093024), (120, 1.979930)])
def test_t_quantile_against_printed_tables(df: int, t: float) -> None:
    assert t_quantile(0.05, df) == pytest.approx(t, abs=1e-6)


@pytest.mark.parametrize("df", [1, 2, 3, 8, 9])
def test_p_value_against_the_integral_of_the_density(df: int) -> None:
    x = torch.linspace(0, 2.5, 100_001, dtype=torch.float64)
    scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    inside = 2 * scale * torch.trapezoid((1 + x**2 / df) ** (-(df + 1) / 2), x).item()
    assert p_value(2.5, df) == p_value(-2.5, df) == pytest.approx(1 - inside, abs=1e-8)


def test_estimate_by_hand() -> None:
    found = estimate([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5 and found.n == 4
    assert found.half == pytest.approx(
        3.182446 * math.sqrt(5 / 3) / 2, abs=1e-5
    )  # t of 3, standard deviation, root of n
    assert estimate([1.0, 1.0]).p == 0 and estimate([0.0, 0.0]).p == 1
    with pytest.raises(ValueError, match="two values, got 1"):
        estimate([1.0])


def test_holm_by_hand() -> None:
    # In order .001 .012 .04 .2 against .05 / 4, / 3, / 2: the third fails, so the fourth does too.
    assert holm_levels([0.001, 0.2, 0.012, 0.04]) == pytest.approx([0.05 / 4, 0.05 / 2, 0.05 / 3, 0.05 / 2])


def test_every_method_is_tuned_alike() -> None:
    for name in study.SEEDS:
        tried = study.candidates(name)
        for method in study.OPTION:
            rates = [setting.lr for title, setting in tried if title == method]
            low, *_, high = study.RATES[name]
            assert len(rates) == 3 * len(study.RATES[name]) and (min(rates), max(rates)) == (low, high)


def test_rounding_and_pruning_entry_by_entry() -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    rounded, pruned = round_rows(weight, 3), prune_rows(weight, 0.3)
    for i, row in enumerate(weight.tolist()):
        grid = [k * max(map(abs, row)) / 3 for k in range(-3, 4)]  # 3 bits, symmetric
        smallest = sorted(map(abs, row))[:12]  # 30 % of 40
        for j, w in enumerate(row):
            assert rounded[i, j].item() == pytest.approx(min(grid, key=lambda g, w=w: abs(g - w)), abs=1e-6)
            assert pruned[i, j].item() == (0.0 if abs(w) in smallest else w)


@pytest.mark.parametrize("change", [{"std": "matrix"}, {"normals": "fresh"}])
def test_an_ablation_has_noise_of_the_same_size(change: dict[str, str]) -> None:
    torch.manual_seed(0)
    layer = flatlora.LoRALinear(torch.nn.Linear(300, 200))
    layer.base.weight.data *= torch.linspace(0.1, 3, 200)[:, None]
    x, own, plain = torch.randn(7, 300, requires_grad=True), flatlora.filter_std, layer.weight.detach()
    with ablated(Setting(1e-3, **change)), flatlora.perturbed(layer, 0.2, seed=1):
        noisy = layer.weight.detach()
        (by_x,) = torch.autograd.grad(layer(x).sum(), x)
    noise = noisy - plain
    assert float(noise.norm() / plain.norm()) == pytest.approx(0.2, rel=0.03)
    assert torch.allclose(by_x, noisy.sum(0).expand_as(x), atol=1e-3)  # the backward had the noise of the forward
    by_row = noise.square().mean(1) / own(plain, 0.2).square().squeeze(1)  # 1 under eq. 7
    assert (by_row.max() < 2) == ("normals" in change)
    assert flatlora.filter_std is own


def test_the_cells_for_a_gpu_run_on_a_cpu() -> None:
    bench_cost = importlib.import_module("bench_cost")  # which imports PEFT, where it is installed
    threads = torch.get_num_threads()
    cell = bench_cost.LlamaCell(batch=1, context=8, micro_batches=2, width=64, depth=1, threads=1, device="cpu")
    times = bench_cost.llama_times(cell, seconds=0.0, title="tiny")
    parts = bench_cost.llama_parts(cell, seconds=0.0)
    torch.set_num_threads(threads)
    assert list(times["ratio"]) == ["lora", "flat", "add", "sam"]
    assert list(parts["ratio"]) == ["copy of W", "W + eps", "entering"]
    assert "overhead, Flat / add" in bench_cost.time_table({"tiny": times})
    assert "times a copy" in bench_cost.parts_table(parts)


PAGES = {study.HERE / "README.md": study.blocks(), study.ROOT / "README.md": study.front()}


@pytest.mark.parametrize("page", PAGES, ids=["evidence", "front"])
def test_the_pages_show_the_json_files(page: Path) -> None:
    text = page.read_text("utf-8")
    assert study.rendered(text, study.load_results(), PAGES[page]) == text, "study.py tables mends it"


@pytest.mark.parametrize("page", PAGES, ids=["evidence", "front"])
def test_an_edited_digit_is_seen(page: Path) -> None:
    results = study.load_results()
    text = study.rendered(page.read_text("utf-8"), results, PAGES[page])
    tables = re.findall(r"<!-- table .*?<!-- end -->", text, flags=re.S)
    for table in [table for table in tables if re.search(r"\d\.\d", table)]:
        edited = re.sub(r"(\d\.)(\d)", lambda found: found[1] + str((int(found[2]) + 1) % 10), table, count=1)
        assert edited != table and study.rendered(text.replace(table, edited), results, PAGES[page]) == text
    if page.parent == study.ROOT:
        return
    for name, content in results.items():
        for run in content["compare"]["runs"][:10] if "compare" in content else []:
            for metric in study.METRICS.keys() & run.keys():
                before, run[metric] = run[metric], run[metric] + 10
                assert study.rendered(text, results, PAGES[page]) != text, (name, run["row"], metric)
                run[metric] = before


def test_the_json_files_are_small() -> None:
    sizes = [path.stat().st_size for path in study.HERE.glob("*.json")]
    assert sum(sizes) < 500_000
    json.dumps(study.load_results(), allow_nan=False)
