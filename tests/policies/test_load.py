"""Estimates of decode's load."""

from __future__ import annotations

import numpy as np
import pytest

from harli.types import DecodeState
from policies.load import Load, LoadMeter


def fed(meter: LoadMeter, rate: float, leaving: float, duration_s: float, start_s: float = 50.0, seed: int = 0) -> None:
    """A batch with Poisson arrivals and geometric lengths, in steps of 50 ms; 16 tokens fill a KV block."""
    random = np.random.default_rng(seed)
    now_s, batch, waiting = start_s, 0, 0
    while now_s < start_s + duration_s:
        came = int(random.poisson(rate * 0.05))
        batch -= int(random.binomial(batch, leaving))
        admitted = min(came + waiting, 40 - batch)
        waiting += came - admitted
        batch += admitted
        now_s += 0.05
        if batch:
            state = DecodeState(now_s, 0, batch, 800 * batch, 900, 0, admitted, waiting, 5000 - 50 * batch, 5000)
            meter.step(state)


def test_a_weekend_without_a_step_leaves_a_load() -> None:
    meter = LoadMeter(32)
    meter.step(DecodeState(time_s=0.0, step=1, batch=1, context_sum=100))
    meter.took(10.0, 20.0)
    meter.step(DecodeState(time_s=3e5, step=2, batch=1, context_sum=100))
    assert meter.load().stretch == 1.0


def test_a_steady_load_is_found() -> None:
    meter = LoadMeter(256)
    fed(meter, 1.5, 1 / 120, 600.0)
    load = meter.load()
    assert load.arrivals_per_s == pytest.approx(1.5, rel=0.25)
    assert 1.0 / load.leaving == pytest.approx(120, rel=0.25)
    assert load.context == pytest.approx(800)
    assert load.capacity == 100  # 5000 blocks, 50 per request
    assert load.stretch == 1.0


def test_queued_requests_are_arrivals_when_they_come_not_when_they_start() -> None:
    meter = LoadMeter(40)
    fed(meter, 5.0, 1 / 400, 300.0)  # the batch holds 40
    assert meter.load().arrivals_per_s == pytest.approx(5.0, rel=0.25)


def test_a_new_rate_replaces_the_old_one_and_idling_counts() -> None:
    meter = LoadMeter(256)
    fed(meter, 4.0, 1 / 50, 200.0)
    fed(meter, 0.5, 1 / 50, 300.0, start_s=250.0, seed=1)
    assert meter.load().arrivals_per_s == pytest.approx(0.5, rel=0.5)
    meter.step(DecodeState(time_s=5000.0, batch=1, context_sum=100, admitted=1))
    assert meter.load().arrivals_per_s < 0.1
    assert 1.0 / meter.load().leaving == pytest.approx(50, rel=0.3)  # lengths are not forgotten by idling


def test_what_runs_at_the_start_is_no_arrival() -> None:
    meter = LoadMeter(256)
    before = meter.load().arrivals_per_s
    meter.step(DecodeState(time_s=9.0, batch=30, context_sum=3000, waiting=7))
    assert meter.load().arrivals_per_s == before


def test_the_burst_that_begins_it_all_says_nothing_about_how_often_bursts_come() -> None:
    meter = LoadMeter(48)
    for step in range(200):  # six long requests, within a quarter of a second, and no other for ten seconds
        batch = min(1 + step, 6)
        meter.step(DecodeState(0.05 * step, batch=batch, context_sum=300 * batch, admitted=int(step < 6)))
    assert meter.load().arrivals_per_s < 0.1


def test_a_request_passed_over_in_a_step_has_not_left() -> None:
    meter = LoadMeter(256)
    for step in range(1000):
        meter.step(DecodeState(time_s=0.05 * step, batch=10 - step % 2, context_sum=1000))
    assert meter.load().leaving < 0.002


def test_steps_that_take_longer_than_planned_stretch_the_plan_within_limits() -> None:
    meter = LoadMeter(8)
    for _ in range(200):
        meter.took(20.0, 25.0)
    assert meter.load().stretch == pytest.approx(1.25, rel=0.01)
    for _ in range(10_000):
        meter.took(20.0, 1e9)
    assert meter.load().stretch == 3.0


def test_nothing_seen_yet_is_a_load_too() -> None:
    load = LoadMeter(16).load()
    assert load.capacity == 16
    assert load.arrivals_per_s > 0.0
    assert 0.0 < load.leaving < 0.5


def test_loads_differ_by_a_fraction_of_any_number() -> None:
    load = Load(1.0, 1.0, 0.01, 500.0, 40, 1.0, 1.0)
    assert not load.differs(load, 0.1)
    assert not Load(1.05, 1.05, 0.0105, 520.0, 42, 1.05, 0.95).differs(load, 0.1)
    assert Load(1.0, 1.0, 0.01, 500.0, 40, 1.2, 1.0).differs(load, 0.1)


@pytest.mark.parametrize(("burst", "expected"), [(1, 1.0), (5, 5.0), (12, 12.0)])
def test_arrivals_in_bursts_are_dispersed(burst: int, expected: float) -> None:
    meter, random = LoadMeter(256), np.random.default_rng(0)
    batch = 1
    for step in range(12_000):
        came = burst * int(random.poisson(2.0 * 0.05 / burst))
        meter.step(DecodeState(0.05 * step, 0, batch + came, 100, 100, admitted=came))
        batch = 1
    assert meter.load().dispersion == pytest.approx(expected, rel=0.4)
    meter.step(DecodeState(time_s=5000.0, batch=1, context_sum=100))
    assert meter.load().dispersion < 1.1  # nothing comes


def test_late_tokens_that_do_not_come_are_not_expected_for_long() -> None:
    meter = LoadMeter(8)
    assert meter.load().lateness == 1.0
    for _ in range(1000):
        meter.late(0.09, 0)
    assert meter.load().lateness == pytest.approx(0.1)
    for _ in range(1000):
        meter.late(0.01, 1)
    assert meter.load().lateness == 3.0
