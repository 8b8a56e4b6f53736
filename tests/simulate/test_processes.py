"""Work in other processes: answers come back under their place, and what goes wrong is told."""

from __future__ import annotations

import math
import os

import pytest

from harli.simulate.processes import spread
from harli.types import HarliError


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_task_is_answered(jobs: int) -> None:
    assert sorted(spread(math.pow, [(2, 3), (3, 2), (5, 1)], jobs)) == [(0, 8.0), (1, 9.0), (2, 5.0)]


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_is_raised_here(jobs: int) -> None:
    with pytest.raises(ValueError, match=r"math|nonnegative"):
        list(spread(math.sqrt, [(4,), (-1,)], jobs))


def test_a_process_that_dies_is_one_line() -> None:
    with pytest.raises(HarliError, match="fewer --jobs"):
        list(spread(os._exit, [(1,), (1,)], 2))


def test_nothing_to_do_starts_nothing() -> None:
    assert list(spread(math.sqrt, [], 4)) == []
