"""The clock of finetuning's units: the gate's rules, and nothing done twice or lost."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harli.config import FinetuneSettings
from harli.simulate.device import Noise
from harli.simulate.finetune import UnitClock
from tests.simulate.builders import FINETUNE, QUIET, device

LAYERS, TOKENS = 4, 64
UNITS = 2 + 3 * LAYERS
"""Of an update of one micro-batch."""


def clock(finetune: FinetuneSettings = FINETUNE, noise: Noise = QUIET, seed: int = 0) -> UnitClock:
    return UnitClock(device(noise, finetune), finetune, np.random.default_rng(seed))


def test_alone_it_yields_what_the_predictor_says() -> None:
    alone = clock()
    alone.run(0.0, 100.0, 4)
    rate = device().predictor.finetune_alone_tokens_per_s
    assert alone.tokens_done / 100.0 == pytest.approx(rate, rel=1e-3)
    assert sum(update.tokens for update in alone.updates) == pytest.approx(alone.tokens_done, abs=TOKENS)
    assert [update.update for update in alone.updates] == list(range(len(alone.updates)))
    assert all(earlier.time_s < later.time_s for earlier, later in pairwise(alone.updates))


@given(cuts=st.lists(st.floats(0.0, 10.0), max_size=30), seed=st.integers(0, 3))
def test_looking_more_often_changes_nothing(cuts: list[float], seed: int) -> None:
    noise = Noise(sigma=0.3)
    whole, parts = clock(noise=noise, seed=seed), clock(noise=noise, seed=seed)
    whole.run(0.0, 10.0, 2, 1.5)
    for begin_s, end_s in pairwise([0.0, *sorted(cuts), 10.0]):
        parts.run(begin_s, end_s, 2, 1.5)
    assert parts.tokens_done == pytest.approx(whole.tokens_done)
    assert [update.time_s for update in parts.updates] == pytest.approx([update.time_s for update in whole.updates])
    assert parts.held == whole.held


spans = st.lists(st.tuples(st.floats(0.0, 0.05), st.sampled_from([0, 1, 2, 4]), st.floats(0.0, 20.0)), max_size=60)


@settings(deadline=None)
@given(spans=spans, updates=st.none() | st.integers(1, 5))
def test_whatever_it_is_allowed_its_accounts_are_right(
    spans: list[tuple[float, int, float]], updates: int | None
) -> None:
    finetune = FINETUNE.model_copy(update={"updates": updates, "accumulation": 2})
    job, now_s = clock(finetune, Noise(sigma=0.1)), 0.0
    for length_s, units, window_ms in spans:
        done, held = job.tokens_done, job.held
        end_s = job.window(now_s, window_ms, math.inf)
        assert end_s >= now_s
        assert not job.held
        now_s = end_s
        job.run(now_s, now_s + length_s, units)
        now_s += length_s
        assert job.tokens_done >= done - 1e-9
        assert job.held in (0, units)
        assert held in (0, 1, 2, 4)
    committed = sum(update.tokens for update in job.updates)
    assert committed == len(job.updates) * 2 * TOKENS
    assert committed - 1e-6 <= job.tokens_done <= committed + 2 * TOKENS + 1e-6
    assert all(update.time_s <= now_s for update in job.updates)
    assert job.state.ready == (len(job.updates) != updates)
    assert updates is None or len(job.updates) <= updates


def test_a_unit_that_runs_is_not_interrupted() -> None:
    job = clock()
    unit_s = device().unit_ms("embed", 2) / 1e3
    job.run(0.0, unit_s / 4, 2)
    assert job.held == 2
    job.run(unit_s / 4, unit_s / 2, 0)
    assert job.held == 2
    assert job.tokens_done == 0.0
    job.run(unit_s / 2, 2.0 * unit_s, 0)
    assert job.held == 0
    assert job.tokens_done == pytest.approx(TOKENS / (2 + 2 * LAYERS))


def test_a_window_takes_the_units_that_fit_and_ends_when_none_does() -> None:
    job, on = clock(), device()
    embed_ms, forward_ms = on.unit_ms("embed", 4), on.unit_ms("forward", 4)
    end_s = job.window(1.0, embed_ms + 2.5 * forward_ms, math.inf)
    assert end_s == pytest.approx(1.0 + (embed_ms + 2.0 * forward_ms) / 1e3)
    assert job.window(end_s, 0.5 * forward_ms, math.inf) == end_s


def test_an_arrival_ends_a_window_within_a_unit() -> None:
    job, on = clock(), device()
    embed_ms, forward_ms = on.unit_ms("embed", 4), on.unit_ms("forward", 4)
    end_s = job.window(0.0, 1000.0, (embed_ms + 0.5 * forward_ms) / 1e3)
    assert end_s == pytest.approx((embed_ms + forward_ms) / 1e3)


def test_a_window_waits_for_the_unit_of_the_share_before() -> None:
    job = clock()
    unit_s = device().unit_ms("embed", 1) / 1e3
    job.run(0.0, unit_s / 2, 1)
    assert job.window(unit_s / 2, 0.01, math.inf) == pytest.approx(unit_s)


def test_training_ends_with_its_last_update() -> None:
    job = clock(FINETUNE.model_copy(update={"updates": 3}))
    job.run(0.0, 1000.0, 4)
    assert len(job.updates) == 3
    assert not job.state.ready
    assert job.held == 0
    assert job.tokens_done == pytest.approx(3 * TOKENS)
    job.run(1000.0, 2000.0, 4)
    assert job.window(2000.0, 100.0, math.inf) == 2000.0
    assert len(job.updates) == 3
