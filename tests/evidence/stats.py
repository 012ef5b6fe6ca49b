"""Student's t and Holm's correction: what the tables of the studies are computed with."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean over n runs, the half width of its interval, and the two-sided p value of "the true mean is 0"."""

    mean: float
    half: float
    n: int
    p: float


def p_value(t: float, df: int) -> float:
    """P(|T| > |t|) of Student's t with `df` degrees of freedom: the finite series for whole degrees of freedom
    (Abramowitz and Stegun, 26.7.3 and 26.7.4), so no table and no approximation."""
    angle = math.atan(abs(t) / math.sqrt(df))
    odd, total = df % 2, 0.0
    term = math.cos(angle) if odd else 1.0
    for k in range(odd, df - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k + 1) / (k + 2)
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return max(0.0, 1 - inside)


@functools.cache
def t_quantile(level: float, df: int) -> float:
    """The t with P(|T| > t) = level, by bisection: level 0.05 gives the factor of a 95 % interval."""
    low, high = 0.0, 1.0
    while p_value(high, df) > level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, df) > level else (low, middle)
    return (low + high) / 2


def estimate(values: Sequence[float], level: float = 0.05) -> Estimate:
    """Mean and interval that misses the true mean in a share `level` of all studies. ValueError below two values."""
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs at least two values, got {n}")
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(n)
    p = p_value(mean / error, n - 1) if error else float(mean == 0)
    return Estimate(mean, t_quantile(level, n - 1) * error, n, p)


def holm_levels(ps: Sequence[float], level: float = 0.05) -> list[float]:
    """The level at which the interval of each claim is to be taken, so that the chance of any false claim is `level`.

    Holm: the smallest p is held against level / m, the next against level / (m - 1), and so on until the first one
    that is not below; that one and all larger ones are not shown, and all stay at its level, where their intervals
    contain 0. So an interval at these levels leaves out 0 exactly where Holm rejects.
    """
    levels, current, failed = [0.0] * len(ps), 0.0, False
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        current = current if failed else level / (len(ps) - rank)
        failed = failed or ps[index] >= current
        levels[index] = current
    return levels
