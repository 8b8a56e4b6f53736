"""How good a predictor is on groups that it has not seen, and whether another is better.

Errors within a group resemble each other: its points have the same batch and contexts, and were measured within the
same seconds. So intervals come from a bootstrap that draws whole groups (Davison and Hinkley, "Bootstrap Methods and
their Application", 1997, section 3.8).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from predictor.base import Floats
from predictor.dataset import Dataset

RESAMPLES = 2000
CONFIDENCE_PERCENT = (2.5, 97.5)


@dataclass(frozen=True)
class Judged:
    """What a model said about steps that it was not fitted on: arrays of shape [rows]."""

    data: Dataset
    predicted_ms: Floats
    bound_ms: Floats


@dataclass(frozen=True)
class Errors:
    """Relative errors |predicted / actual - 1| over rows; NaN where there are no rows."""

    mape: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Scores:
    """One model on the judged rows; fractions, not percent."""

    all: Errors
    solo: Errors
    """Decode alone."""
    corun: Errors
    """Decode beside finetuning."""
    under_rate: float
    """How often the gap was longer than predicted."""
    coverage: float
    """How often the gap was within the bound."""
    coverage_low: float
    """95% interval of the coverage, over groups."""
    coverage_high: float
    width: float
    """Median of bound / predicted."""


@dataclass(frozen=True)
class Difference:
    """By how much a rival's MAPE is above the candidate's, with its 95% interval over groups."""

    mean: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        return self.low > 0.0 or self.high < 0.0


def score(judged: Judged, seed: int) -> Scores:
    """All scores of ``judged``."""
    gap_ms, solo = judged.data.gap_ms, judged.data.solo
    error = relative_error(judged.predicted_ms, gap_ms)
    covered = (gap_ms <= judged.bound_ms).astype(np.float64)
    low, high = np.percentile(_resampled_means(covered, judged.data.group, seed), CONFIDENCE_PERCENT)
    return Scores(
        all=_errors(error),
        solo=_errors(error[solo]),
        corun=_errors(error[~solo]),
        under_rate=float(np.mean(gap_ms > judged.predicted_ms)),
        coverage=float(covered.mean()),
        coverage_low=float(low),
        coverage_high=float(high),
        width=float(np.median(judged.bound_ms / judged.predicted_ms)),
    )


def difference(rival: Judged, candidate: Judged, rows: NDArray[np.bool_], seed: int) -> Difference:
    """The rival's MAPE minus the candidate's over ``rows`` (a mask) of the same data; paired by group."""
    actual_ms, group = candidate.data.gap_ms[rows], candidate.data.group[rows]
    errors = [relative_error(judged.predicted_ms[rows], actual_ms) for judged in (rival, candidate)]
    error = errors[0] - errors[1]
    low, high = np.percentile(_resampled_means(error, group, seed), CONFIDENCE_PERCENT)
    return Difference(float(error.mean()), float(low), float(high))


def noise_floor(data: Dataset) -> Errors:
    """The errors of a model that knows the median gap of every operating point; meant for points of one state."""
    medians = np.empty(len(data))
    for rows in rows_by_point(data.point):
        medians[rows] = np.median(data.gap_ms[rows])
    return _errors(relative_error(medians, data.gap_ms))


def rows_by_point(point: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The row numbers of each operating point, points in ascending order."""
    order = np.argsort(point, kind="stable")
    _, first = np.unique(point[order], return_index=True)
    return np.split(order, first[1:]) if len(order) else []


def relative_error(predicted_ms: Floats, actual_ms: Floats) -> Floats:
    return np.abs(predicted_ms / actual_ms - 1.0)


def _errors(error: Floats) -> Errors:
    if not error.size:
        return Errors(np.nan, np.nan, np.nan)
    p90, p99 = np.percentile(error, [90, 99])
    return Errors(float(error.mean()), float(p90), float(p99))


def _resampled_means(values: Floats, group: NDArray[np.int64], seed: int) -> Floats:
    """Means of ``values`` over rows, for ``RESAMPLES`` draws of whole groups with replacement."""
    _, index = np.unique(group, return_inverse=True)
    rows, sums = np.bincount(index), np.bincount(index, weights=values)
    groups = len(rows)
    drawn = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1.0 / groups), RESAMPLES)
    means: Floats = (drawn @ sums) / (drawn @ rows)
    return means
