"""The learning rate of each update."""

from __future__ import annotations

from typing import Any

import pytest

from harli.config import FinetuneSettings
from harli.finetune.schedule import learning_rate


def rates(count: int, **settings: Any) -> list[float]:
    chosen = FinetuneSettings(learning_rate=1.0, **settings)
    return [learning_rate(chosen, update) for update in range(count)]


def test_warm_up_is_linear_and_starts_above_zero() -> None:
    assert rates(6, warmup_updates=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(2, warmup_updates=0) == [1.0, 1.0]


def test_linear_decay_ends_at_zero() -> None:
    found = rates(8, warmup_updates=2, schedule="linear", updates=6)
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


def test_cosine_decay_ends_at_zero() -> None:
    found = rates(8, warmup_updates=2, schedule="cosine", updates=6)
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0.0, 0.0])


def test_without_an_end_nothing_decays() -> None:
    assert rates(100, warmup_updates=0, schedule="constant") == [1.0] * 100


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_needs_an_end(schedule: str) -> None:
    with pytest.raises(ValueError, match="needs a number of updates"):
        rates(1, schedule=schedule)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_job_shorter_than_its_warm_up_only_warms_up(schedule: str) -> None:
    assert rates(2, warmup_updates=10, schedule=schedule, updates=2) == [0.1, 0.2]
