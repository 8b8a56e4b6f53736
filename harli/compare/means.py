"""Means over rounds, with t-intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95

Interval = tuple[float, float]


def arithmetic(values: Sequence[float]) -> tuple[float, Interval | None]:
    """Mean and interval; one value has no interval, and neither have values with NaN among them."""
    from scipy import stats

    mean = float(np.mean(values))
    if len(values) < 2 or math.isnan(mean):
        return mean, None
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * stats.sem(values))
    return mean, (mean - half, mean + half)


def geometric(values: Sequence[float]) -> tuple[float, Interval | None]:
    """Mean of values that are not negative, and the interval of their logarithms; 0 without one if a value is 0."""
    if not all(values):
        return 0.0, None
    mean, interval = arithmetic([math.log(value) for value in values])
    return math.exp(mean), interval and (math.exp(interval[0]), math.exp(interval[1]))
