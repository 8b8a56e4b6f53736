from __future__ import annotations

import math

import numpy as np

from predictor.dataset import states
from predictor.ranges import UNSEEN, Ranges
from tests.predictor.builders import MENU, synthetic

DATA = synthetic(120, 20)


def test_what_was_seen_is_near_and_known() -> None:
    growth, known = Ranges.fit(DATA).growth(DATA)
    assert np.all(growth == 1.0)
    assert known.all()


def test_growth_follows_the_log_distance_and_far_states_are_unknown() -> None:
    ranges = Ranges.fit(DATA)
    batch = np.array([1, 33, 64, 128, 256])
    growth, known = ranges.growth(states(MENU, 1, batch, batch * 10.0))
    assert growth[0] == 1.0
    assert np.all(np.diff(growth) > 0.0)
    assert known.tolist() == [True, True, False, False, False]
    assert ranges.growth(states(MENU, 0, 8, 4000, prefill_tokens=512))[1].tolist() == [False]


def test_a_batch_below_the_smallest_is_outside_too_but_a_short_context_is_not() -> None:
    ranges = Ranges.fit(DATA.take(DATA.batch >= 10))
    growth, known = ranges.growth(states(MENU, 0, [2, 12], [10, 10]))
    assert growth[0] > 1.5
    assert growth[1] == 1.0
    assert known.tolist() == [False, True]


def test_a_share_that_was_not_seen_is_far() -> None:
    ranges = Ranges.fit(DATA.take(DATA.share != 2))
    assert ranges.distances((8, 4000, 500, 0, 0)) == [0.0, 0.0, UNSEEN]
    assert ranges.inner[0] == math.inf
