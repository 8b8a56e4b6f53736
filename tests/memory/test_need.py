"""The estimate of what requests will need."""

from __future__ import annotations

import numpy as np
import pytest

from harli.memory.need import HORIZON_S, MEMORY_S, Need

BLOCK = 16
PERIOD_S = 0.25


def quiet(need: Need, since_s: float, seconds: float) -> int:
    """The estimate after ``seconds`` without an arrival."""
    for now_s in np.arange(since_s, since_s + seconds, PERIOD_S):
        estimate = need.within_horizon(now_s, 0)
    return estimate


def test_nothing_is_needed_before_anything_has_arrived() -> None:
    assert quiet(Need(BLOCK), 100.0, 10.0) == 0


def test_the_estimate_covers_nearly_every_horizon_of_a_steady_load_and_not_much_more() -> None:
    random = np.random.default_rng(0)
    need, arrivals = Need(BLOCK), []
    estimates: list[tuple[float, int]] = []
    for now_s in np.arange(0.0, 600.0, PERIOD_S):
        for _ in range(random.poisson(3.0 * PERIOD_S)):
            tokens = int(random.integers(100, 900))
            arrivals.append((now_s, tokens // BLOCK + 1))
            need.arrived(tokens)
        estimates.append((now_s, need.within_horizon(now_s, 0)))
    times, blocks = (np.array(column) for column in zip(*arrivals, strict=True))
    covered = [
        blocks[(times > now_s) & (times <= now_s + HORIZON_S)].sum() <= estimate
        for now_s, estimate in estimates
        if MEMORY_S < now_s < 600.0 - HORIZON_S
    ]
    assert 0.95 < np.mean(covered) < 1.0
    mean = blocks.sum() / 600.0 * HORIZON_S
    assert np.mean([estimate for now_s, estimate in estimates if now_s > MEMORY_S]) < 3.0 * mean


def test_arrivals_are_forgotten() -> None:
    need = Need(BLOCK)
    for _ in range(20):
        need.arrived(1000)
    assert quiet(need, 0.0, 1.0) > quiet(need, 1.0, MEMORY_S) > quiet(need, 1.0 + MEMORY_S, 10 * MEMORY_S)
    assert quiet(need, 400.0, 1.0) <= 1


def test_running_requests_grow_by_a_token_a_step() -> None:
    need = Need(BLOCK)
    need.within_horizon(0.0, 4)
    for _ in range(8):
        need.stepped()
    steps_per_s = 8 / PERIOD_S
    assert need.within_horizon(PERIOD_S, 4) == pytest.approx(4 * (1 + steps_per_s * HORIZON_S / BLOCK), abs=1)
