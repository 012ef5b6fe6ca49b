"""Proposition 3.2: how much the noise on W' adds to the variance of a layer's outputs, for widths and input means.

For inputs of mean 0 the variance grows by the factor 1 + sigma^2 whatever the width n. A run is a row of a layer of
normal weights, many inputs and many draws of the noise; growth is (variance with noise / without - 1) / sigma^2.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from training import flatlora

SIGMA = 0.5
WIDTHS = (64, 4096)
MEANS = (0, 1)


@dataclass(frozen=True)
class Case:
    mean: int  # of the inputs
    n: int  # width


def rows() -> dict[str, Case]:
    found = {}
    for mean in MEANS:
        for n in WIDTHS:
            found[f"mean {mean}, n {n}"] = Case(mean, n)
    return found


@torch.no_grad()
def growth(case: Case, seed: int) -> dict[str, Any]:
    """Of a layer of 256 outputs, over 64 draws of the noise with 256 inputs each."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(256, case.n, generator=generator)
    parts = []
    for draw in range(64):
        x = case.mean + torch.randn(256, case.n, generator=generator)  # (N, n)
        noise = flatlora.draw_noise(weight, SIGMA, (seed, draw), name="")
        plain = x @ weight.T  # (N, 256)
        noisy = x @ noise.added_to(weight).T  # (N, 256)
        expected = case.mean * weight.sum(1)  # (256,)
        ratio = (noisy - expected).square().mean() / (plain - expected).square().mean()
        parts.append(ratio.item())
    return {"growth": (statistics.fmean(parts) - 1) / SIGMA**2}
