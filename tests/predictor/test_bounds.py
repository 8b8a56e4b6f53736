from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from harli.types import HarliError
from predictor.base import Floats
from predictor.bounds import Bounds


def rows(points: int, steps: int, seed: int, between: float = 0.04) -> tuple[Floats, NDArray[np.int64], Floats]:
    """Ratios actual / predicted with an error of every point's own, the points, and loads."""
    rng = np.random.default_rng(seed)
    point = np.repeat(np.arange(points), steps)
    ratio = np.exp(rng.normal(0.0, between, points)[point] + rng.normal(0.0, 0.03, len(point)))
    return ratio, point, rng.uniform(10.0, 80.0, points)[point]


def calibrated(points: int, seed: int, coverage: float = 0.99) -> Bounds:
    ratio, point, load = rows(points, 20, seed)
    return Bounds.calibrate(
        np.ones(len(ratio)), ratio, load, point, coverage, 0, split=np.zeros(len(ratio), dtype=bool)
    )


@pytest.mark.parametrize("coverage", [0.9, 0.99])
def test_new_points_are_covered_on_average(coverage: float) -> None:
    ratio, _, load = rows(3000, 5, 99)
    covered = [
        np.mean(ratio <= calibrated(60, seed, coverage).factor(load, np.zeros(len(load), dtype=bool)))
        for seed in range(20)
    ]
    assert np.mean(covered) >= coverage
    assert np.mean(np.array(covered) >= coverage - 0.01) >= 0.75


def test_no_factor_is_below_the_row_wise_quantile_or_one() -> None:
    ratio, point, load = rows(40, 20, 3)
    everything = np.zeros(len(ratio), dtype=bool)
    bounds = Bounds.calibrate(np.ones(len(ratio)), ratio, load, point, 0.9, 0, split=everything)
    assert min(bounds.solo_factors) >= np.quantile(ratio, 0.9)
    fast = Bounds.calibrate(np.ones(len(ratio)), ratio * 0.5, load, point, 0.9, 0, split=everything)
    assert min(fast.solo_factors) == 1.0


def test_noisier_loads_and_sides_have_larger_factors() -> None:
    rng = np.random.default_rng(0)
    point = np.repeat(np.arange(200), 40)
    load = np.linspace(10.0, 100.0, 200)[point]
    split = point % 2 == 1
    noise = np.where(load > 55.0, 0.10, 0.02) * np.where(split, 2.0, 1.0)
    ratio = np.exp(rng.normal(0.0, 1.0, len(point)) * noise)
    bounds = Bounds.calibrate(np.ones(len(ratio)), ratio, load, point, 0.99, 0, split=split)
    assert len(bounds.solo_factors) > 1
    low, high, low_split = bounds.factor(np.array([12.0, 99.0, 12.0]), np.array([False, False, True]))
    assert 1.0 < low < low_split < high


def test_few_points_make_one_bucket_and_a_rare_side_shares_it() -> None:
    ratio, point, load = rows(12, 10, 1)
    bounds = Bounds.calibrate(np.ones(len(ratio)), ratio, load, point, 0.95, 0, split=point == 0)
    assert len(bounds.solo_factors) == 1
    assert bounds.split_factors[0] >= np.quantile(ratio, 0.95)


def test_impossible_demands_are_refused() -> None:
    with pytest.raises(HarliError, match="coverage must be"):
        calibrated(20, 0, 1.0)
    with pytest.raises(HarliError, match="4 operating points are too few to calibrate a bound: 5 are needed"):
        calibrated(4, 0)


def test_the_same_seed_gives_the_same_bounds() -> None:
    assert calibrated(40, 0) == calibrated(40, 0)
