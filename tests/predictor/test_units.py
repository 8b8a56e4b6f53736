"""How units fill windows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harli.types import UnitTime
from predictor.units import UnitTimes

TIMES = (
    UnitTime("embed", 2, 256, 0, 1.0, 0.5),
    UnitTime("forward", 2, 256, 0, 6.0, 10.0),
    UnitTime("backward", 2, 256, 0, 6.0, 30.0),
    UnitTime("forward", 1, 256, 0, 6.0, 18.0),
    UnitTime("backward", 1, 256, 0, 6.0, 54.0),
)
UNITS = UnitTimes(TIMES, 2, (256, 0))
UNEVEN = UnitTimes((*TIMES, UnitTime("loss", 2, 256, 0, 0.5, 40.0)), 2, (256, 0))
"""With a unit that is long and rare."""


def packed_ms(window_ms: float, passes: int = 200) -> float:
    """Mean time of the units in a window, one after the other as they come."""
    order = [0.5, *[10.0] * 6, *[30.0] * 6] * passes
    used, windows, left = 0.0, 1, window_ms
    for length in order:
        if length > left:
            windows, left = windows + 1, window_ms
        left -= length
        used += length
    return used / windows


@pytest.mark.parametrize("window_ms", [30.0, 35.0, 45.0, 61.0, 80.0, 150.0, 1000.0])
def test_a_window_holds_about_what_packing_units_into_it_shows(window_ms: float) -> None:
    assert UNITS.in_window_ms(window_ms) == pytest.approx(packed_ms(window_ms), rel=0.15)


def test_a_window_shorter_than_the_longest_unit_holds_nothing() -> None:
    assert UNITS.longest_ms == 30.0
    assert UNITS.in_window_ms(29.9) == 0.0
    assert UNITS.in_window_ms(-5.0) == 0.0


@given(st.lists(st.floats(-100.0, 2000.0), min_size=1, max_size=20))
def test_an_array_is_the_same_as_one_by_one(windows_ms: list[float]) -> None:
    for split in (False, True):
        found = UNEVEN.in_windows_ms(np.array(windows_ms), np.array(split))
        assert found == pytest.approx([UNEVEN.in_window_ms(window, split=split) for window in windows_ms])
        assert (found <= np.maximum(windows_ms, 0.0)).all()


def test_beside_a_split_a_rare_long_unit_does_not_need_a_window() -> None:
    assert (UNEVEN.longest_ms, UNEVEN.most_ms) == (40.0, 30.0)
    assert UNEVEN.in_window_ms(35.0) == 0.0
    assert UNEVEN.in_window_ms(35.0, split=True) == pytest.approx(UNITS.in_window_ms(35.0))
    assert UNEVEN.in_window_ms(29.0, split=True) == 0.0


def test_longer_micro_batches_are_scaled_from_the_nearest() -> None:
    assert UnitTimes(TIMES, 2, (512, 0)).longest_ms == 60.0


def test_the_rest_of_a_running_unit_counts_long_units_more_often() -> None:
    assert UNITS.rest_ms(1) == pytest.approx((6 * 18.0**2 + 6 * 54.0**2) / (2 * (6 * 18.0 + 6 * 54.0)))
    assert UNITS.rest_ms(7) == 0.0


def test_without_times_a_window_holds_nothing() -> None:
    nothing = UnitTimes((), 2, (256, 0))
    assert nothing.longest_ms == math.inf
    assert nothing.in_window_ms(1e6) == 0.0
    assert nothing.in_windows_ms(np.array([1e6]), np.array(False)) == 0.0


def test_a_pass_that_keeps_activations_is_faster() -> None:
    kept = (UnitTime("forward_kept", 2, 256, 6, 6.0, 12.0), UnitTime("backward_kept", 2, 256, 6, 6.0, 18.0))
    assert UNITS.speedup == 1.0
    assert UnitTimes((*TIMES, *kept), 2, (256, 6)).speedup == pytest.approx(240.5 / 180.0)
    assert UnitTimes((), 2, (256, 6)).speedup == 1.0
