"""Intervals and Holm's correction: what the tables of the studies are computed with. Needs scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean, half of its interval, the runs behind it, and the two-sided p value of "the true mean is 0"."""

    mean: float
    half: float
    n: int
    p: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def estimate(values: np.ndarray, level: float = 0.05) -> Estimate:
    """The interval that misses the true mean in a share `level` of all studies.

    By Student's t for values (seeds,), by crossed random effects for values (seeds, examples). ValueError: one seed.
    """
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two seeds, got {len(values)}")
    error, df = error_of_mean(values) if values.ndim == 1 else error_of_crossed_mean(values)
    mean = float(values.mean())
    if error == 0:
        return Estimate(mean, 0.0, len(values), float(mean == 0))

    from scipy.stats import t  # here, since the page's sentences are tested without it

    return Estimate(mean, t.isf(level / 2, df) * error, len(values), 2 * t.sf(abs(mean) / error, df))


def error_of_mean(values: np.ndarray) -> tuple[float, float]:
    """The standard error of the mean of independent values (seeds,), and its degrees of freedom."""
    return values.std(ddof=1) / math.sqrt(len(values)), len(values) - 1


def error_of_crossed_mean(values: np.ndarray) -> tuple[float, float]:
    """The same for values (seeds, examples), where all seeds share the examples.

    A value is the mean plus an effect of its seed, one of its example, and a residual, which holds the interaction of
    both: value_ij = mean + s_i + e_j + r_ij. From the mean squares of an analysis of variance

        E[MS_seeds] = var(r) + examples var(s),   E[MS_examples] = var(r) + seeds var(e),   E[MS_rest] = var(r)

    the variance of the mean, var(s) / seeds + var(e) / examples + var(r) / (seeds examples), is estimated without bias
    by (MS_seeds + MS_examples - MS_rest) / (seeds examples). The first two are taken to be at least MS_rest, since no
    variance is negative. The degrees of freedom are Satterthwaite's.
    """
    seeds, examples = values.shape
    of_seed = values.mean(1, keepdims=True) - values.mean()  # (seeds, 1)
    of_example = values.mean(0, keepdims=True) - values.mean()  # (1, examples)
    rest = values - values.mean() - of_seed - of_example  # (seeds, examples)

    df_rest = (seeds - 1) * (examples - 1)
    ms_rest = (rest**2).sum() / df_rest
    ms_seeds = max(ms_rest, examples * (of_seed**2).sum() / (seeds - 1))
    ms_examples = max(ms_rest, seeds * (of_example**2).sum() / (examples - 1))

    total = ms_seeds + ms_examples - ms_rest
    if total == 0:
        return 0.0, 1.0
    spread = ms_seeds**2 / (seeds - 1) + ms_examples**2 / (examples - 1) + ms_rest**2 / df_rest
    return math.sqrt(total / values.size), total**2 / spread


def holm_levels(ps: Sequence[float], level: float = 0.05) -> list[float]:
    """The level at which the interval of each claim is to be taken, so that the chance of any false claim is `level`.

    Holm: the smallest p is held against level / m, the next against level / (m - 1), and so on until the first one
    that is not below; that one and all larger ones are not shown, and all stay at its level, where their intervals
    contain 0. So an interval at these levels leaves out 0 exactly where Holm rejects.
    """
    levels = [0.0] * len(ps)
    current = 0.0
    failed = False
    by_size = sorted(range(len(ps)), key=lambda i: ps[i])
    for rank, index in enumerate(by_size):
        if not failed:
            current = level / (len(ps) - rank)
        failed = failed or ps[index] >= current
        levels[index] = current
    return levels
