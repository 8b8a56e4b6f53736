"""Scores by hand, and intervals that know that steps of one group resemble each other."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from predictor.scoring import Judged, difference, noise_floor, rows_by_point, score
from tests.predictor.builders import synthetic, truth_ms

DATA = synthetic(60, 20)


def judged(data=DATA, factor=1.0, bound=1.1) -> Judged:
    """The law's own gaps times ``factor``, bounded by ``bound`` times that."""
    predicted_ms = truth_ms(data) * factor
    return Judged(data, predicted_ms, predicted_ms * bound)


def test_a_prediction_that_is_right_has_no_error():
    scores = score(Judged(DATA, DATA.gap_ms, DATA.gap_ms), seed=0)
    assert (scores.all.mape, scores.solo.p99, scores.corun.p90, scores.under_rate) == (0.0, 0.0, 0.0, 0.0)
    assert (scores.coverage, scores.coverage_low, scores.coverage_high, scores.width) == (1.0, 1.0, 1.0, 1.0)


def test_scores_by_hand():
    two = DATA.take(np.array([0, 1, 20, 21]))  # a point of decode alone, and one beside finetuning
    two = replace(two, gap_ms=np.array([10.0, 20.0, 40.0, 50.0]))
    scores = score(Judged(two, np.array([11.0, 20.0, 30.0, 60.0]), np.array([12.0, 19.0, 50.0, 60.0])), seed=0)
    assert scores.solo.mape == pytest.approx(0.05)
    assert scores.corun.mape == pytest.approx((0.25 + 0.2) / 2)
    assert scores.all.mape == pytest.approx((0.1 + 0.0 + 0.25 + 0.2) / 4)
    assert scores.under_rate == 0.25
    assert scores.coverage == 0.75
    assert (scores.coverage_low, scores.coverage_high) == (0.5, 1.0)
    assert scores.width == pytest.approx(np.median([12 / 11, 19 / 20, 5 / 3, 1.0]))


def test_rows_of_one_side_only_leave_the_other_without_errors():
    scores = score(judged(DATA.take(DATA.solo)), seed=0)
    assert math.isnan(scores.corun.mape)
    assert scores.solo == scores.all


def test_intervals_are_over_groups_not_points_or_rows():
    """What whole groups have in common makes intervals wider than the numbers of points and rows suggest."""
    grouped = replace(DATA, group=DATA.point // 3)
    missed = grouped.group % 10 == 0
    bound_ms = np.where(missed, 0.0, np.inf)
    widths = []
    for data in (grouped, DATA):
        scores = score(Judged(data, data.gap_ms, bound_ms), seed=0)
        assert scores.coverage == pytest.approx(0.9)
        widths.append(scores.coverage_high - scores.coverage_low)
    by_rows = 2 * 1.96 * math.sqrt(0.9 * 0.1 / len(DATA))
    assert widths[0] > 1.4 * widths[1] > 2 * by_rows


def test_a_difference_that_one_group_makes_is_not_significant():
    """All of its points are better, but they were measured together."""
    grouped = replace(DATA, group=np.maximum(0, DATA.point - 29))  # points 0 to 29 are one group
    everything = np.ones(len(DATA), dtype=bool)
    factor = np.where(grouped.group == 0, 1.2, 1.0)
    assert difference(judged(factor=factor), judged(), everything, seed=0).significant
    low = difference(judged(grouped, factor), judged(grouped), everything, seed=0).low
    assert low <= 0.0


def test_the_difference_is_paired_and_signed():
    everything = np.ones(len(DATA), dtype=bool)
    good, bad = judged(), judged(factor=1.2)
    same = difference(good, good, everything, seed=0)
    assert (same.mean, same.low, same.high, same.significant) == (0.0, 0.0, 0.0, False)
    worse = difference(bad, good, everything, seed=0)
    assert worse.significant
    assert worse.low < worse.mean < worse.high
    assert worse.mean == pytest.approx(score(bad, 0).all.mape - score(good, 0).all.mape)
    better = difference(good, bad, everything, seed=0)
    assert better.mean == -worse.mean
    assert better.high < 0.0


def test_a_difference_within_chance_is_not_significant():
    rng = np.random.default_rng(0)
    shaken = judged(factor=np.exp(rng.normal(0.0, 0.001, len(DATA))))
    assert not difference(shaken, judged(), ~DATA.solo, seed=0).significant


def test_the_noise_floor_is_the_spread_around_each_points_median():
    errors = [
        np.abs(np.median(DATA.gap_ms[DATA.point == point]) / DATA.gap_ms[DATA.point == point] - 1.0)
        for point in range(60)
    ]
    assert noise_floor(DATA).mape == pytest.approx(np.mean(np.concatenate(errors)))


def test_rows_by_point_finds_scattered_rows():
    rows = rows_by_point(np.array([7, 2, 7, 9, 2]))
    assert [part.tolist() for part in rows] == [[1, 4], [0, 2], [3]]
