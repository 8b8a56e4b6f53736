from __future__ import annotations

import math

import numpy as np
import pytest

from predictor.dataset import states
from predictor.ranges import FAR, GROWTH, UNSEEN, Ranges
from tests.predictor.builders import MENU, synthetic

DATA = synthetic(120, 20)


def test_what_was_seen_is_near() -> None:
    assert np.all(Ranges.fit(DATA).growth(DATA) == 1.0)


def test_growth_follows_the_log_distance() -> None:
    ranges = Ranges.fit(DATA)
    batch = np.array([1, 33, 64, 128, 256])
    growth = ranges.growth(states(MENU, 1, batch, batch * 10.0))
    assert growth[0] == 1.0
    assert np.all(np.diff(growth) > 0.0)


@pytest.mark.parametrize(
    ("batch", "others", "far"),
    [(8, {}, False), (33, {}, False), (64, {}, True), (8, {"prefill_tokens": 512}, True)],
)
def test_growth_is_that_of_the_distance(batch: int, others: dict[str, int], far: bool) -> None:
    ranges = Ranges.fit(DATA)
    distances = ranges.distances((batch, 10 * batch, 10, others.get("prefill_tokens", 0), 0))
    rows = states(MENU, np.arange(3), batch, 10 * batch, **others)
    np.testing.assert_allclose(ranges.growth(rows), 1.0 + GROWTH * np.array(distances))
    assert (min(distances) > FAR) == far


def test_a_batch_below_the_smallest_is_outside_too_but_a_short_context_is_not() -> None:
    growth = Ranges.fit(DATA.take(DATA.batch >= 10)).growth(states(MENU, 0, [2, 12], [10, 10]))
    assert growth[0] > 1.5
    assert growth[1] == 1.0


def test_a_share_that_was_not_seen_is_far() -> None:
    ranges = Ranges.fit(DATA.take(DATA.share != 2))
    assert ranges.distances((8, 4000, 500, 0, 0)) == [0.0, 0.0, UNSEEN]
    assert ranges.inner[0] == math.inf
    np.testing.assert_allclose(ranges.growth(states(MENU, [0, 2], 8, 4000)), [1.0, 1.0 + GROWTH * UNSEEN])
