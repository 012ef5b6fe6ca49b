"""Intervals and Holm's correction: what the tables of the studies are computed with."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean, its interval, the runs behind it, and the two-sided p value of "the true mean is 0"."""

    mean: float
    low: float
    high: float
    n: int
    p: float

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


def p_value(t: float, df: int) -> float:
    """P(|T| > |t|) of Student's t with `df` degrees of freedom.

    By the finite series for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4), with
    tan(angle) = |t| / sqrt(df).
    """
    angle = math.atan(abs(t) / math.sqrt(df))
    cosine = math.cos(angle)
    total = 0.0
    if df % 2:
        term = cosine
        for k in range(1, df - 1, 2):
            total += term
            term *= cosine**2 * (k + 1) / (k + 2)
        inside = 2 / math.pi * (angle + math.sin(angle) * total)
    else:
        term = 1.0
        for k in range(0, df - 1, 2):
            total += term
            term *= cosine**2 * (k + 1) / (k + 2)
        inside = math.sin(angle) * total
    return max(0.0, 1 - inside)


@functools.cache
def t_quantile(level: float, df: int) -> float:
    """The t with P(|T| > t) = level, by bisection: level 0.05 gives the factor of a 95 % interval."""
    low = 0.0
    high = 1.0
    while p_value(high, df) > level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if p_value(middle, df) > level:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def by_t(values: Sequence[float], level: float = 0.05) -> Estimate:
    """Student's interval, which misses the true mean in a share `level` of all studies. ValueError below two values."""
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs at least two values, got {n}")
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(n)
    if error == 0:
        return Estimate(mean, mean, mean, n, float(mean == 0))
    half = t_quantile(level, n - 1) * error
    return Estimate(mean, mean - half, mean + half, n, p_value(mean / error, n - 1))


@functools.cache
def drawn_again(n: int, draws: int, seed: int) -> np.ndarray:
    """How often each of n things is among n drawn with replacement, as shares: (draws, n)."""
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    return (counts / n).astype(np.float32)


def by_bootstrap(values: np.ndarray, level: float = 0.05, draws: int = 10_000) -> Estimate:
    """For values (seeds, examples), where all seeds share the examples: both are drawn again, each by itself.

    The interval and the p value are those of the means of these draws (Owen 2007, "The pigeonhole bootstrap").
    """
    seeds, examples = values.shape
    by_example = drawn_again(seeds, draws, 0) @ values.astype(np.float32)  # (draws, examples)
    means = (by_example * drawn_again(examples, draws, 1)).sum(1)  # (draws,)
    low, high = np.quantile(means, [level / 2, 1 - level / 2])
    below = (1 + (means <= 0).sum()) / (1 + draws)
    above = (1 + (means >= 0).sum()) / (1 + draws)
    p = min(1.0, 2 * float(min(below, above)))
    return Estimate(float(values.mean()), float(low), float(high), seeds, p)


def estimate(values: np.ndarray, level: float = 0.05) -> Estimate:
    """By Student's t for values (seeds,), by the bootstrap for values (seeds, examples)."""
    if values.ndim == 2:
        return by_bootstrap(values, level)
    return by_t(values.tolist(), level)


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
