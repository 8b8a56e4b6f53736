from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from harli.types import HarliError
from predictor.base import Floats
from predictor.bounds import Bounds


def rows(groups: int, steps: int, seed: int, between: float = 0.04) -> tuple[Floats, NDArray[np.int64], Floats]:
    """Ratios actual / predicted with an error of every group's own, the groups, and loads."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), steps)
    ratio = np.exp(rng.normal(0.0, between, groups)[group] + rng.normal(0.0, 0.03, len(group)))
    return ratio, group, rng.uniform(10.0, 80.0, groups)[group]


def calibrated(groups: int, seed: int, coverage: float = 0.99) -> Bounds:
    ratio, group, load = rows(groups, 20, seed)
    return Bounds.calibrate(
        np.ones(len(ratio)), ratio, load, group, coverage, 0, split=np.zeros(len(ratio), dtype=bool)
    )


@pytest.mark.parametrize("coverage", [0.9, 0.99])
def test_new_groups_are_covered_on_average(coverage: float) -> None:
    ratio, _, load = rows(3000, 5, 99)
    covered = [
        np.mean(ratio <= calibrated(60, seed, coverage).factor(load, np.zeros(len(load), dtype=bool)))
        for seed in range(20)
    ]
    assert np.mean(covered) >= coverage
    assert np.mean(np.array(covered) >= coverage - 0.01) >= 0.75


def test_no_factor_is_below_the_row_wise_quantile_or_one() -> None:
    ratio, group, load = rows(40, 20, 3)
    everything = np.zeros(len(ratio), dtype=bool)
    bounds = Bounds.calibrate(np.ones(len(ratio)), ratio, load, group, 0.9, 0, split=everything)
    assert min(bounds.solo_factors) >= np.quantile(ratio, 0.9)
    fast = Bounds.calibrate(np.ones(len(ratio)), ratio * 0.5, load, group, 0.9, 0, split=everything)
    assert min(fast.solo_factors) == 1.0


def test_noisier_loads_and_sides_have_larger_factors() -> None:
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(200), 40)
    load = np.linspace(10.0, 100.0, 200)[group]
    split = group % 2 == 1
    noise = np.where(load > 55.0, 0.10, 0.02) * np.where(split, 2.0, 1.0)
    ratio = np.exp(rng.normal(0.0, 1.0, len(group)) * noise)
    bounds = Bounds.calibrate(np.ones(len(ratio)), ratio, load, group, 0.99, 0, split=split)
    assert len(bounds.solo_factors) > 1
    low, high, low_split = bounds.factor(np.array([12.0, 99.0, 12.0]), np.array([False, False, True]))
    assert 1.0 < low < low_split < high


def test_few_groups_make_one_bucket_and_a_rare_side_shares_it() -> None:
    ratio, group, load = rows(12, 10, 1)
    bounds = Bounds.calibrate(np.ones(len(ratio)), ratio, load, group, 0.95, 0, split=group == 0)
    assert len(bounds.solo_factors) == 1
    assert bounds.split_factors[0] >= np.quantile(ratio, 0.95)


def test_impossible_demands_are_refused() -> None:
    with pytest.raises(HarliError, match="coverage must be"):
        calibrated(20, 0, 1.0)
    with pytest.raises(HarliError, match="3 groups of steps are too few to calibrate a bound: 4 are needed"):
        calibrated(3, 0)


def test_the_same_seed_gives_the_same_bounds() -> None:
    assert calibrated(40, 0) == calibrated(40, 0)
