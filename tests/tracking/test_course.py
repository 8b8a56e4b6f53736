from __future__ import annotations

import math

import numpy as np
import pytest

from harli.records.reader import Record
from harli.records.schema import REQUESTS, STEPS, UPDATES
from harli.rows import UpdateRecord
from harli.tracking import course as course_module
from harli.tracking.course import Course, course
from tests.records.builders import REQUEST, STEP, run_info

NAN = math.nan


@pytest.fixture(autouse=True)
def ten_bins(monkeypatch):
    monkeypatch.setattr(course_module, "BINS", 10)


def bins_of(tmp_path, steps=(), requests=(), updates=(), duration_s=10.0) -> Course:
    tables = STEPS.table(list(steps)), REQUESTS.table(list(requests)), UPDATES.table(list(updates))
    return course(Record(tmp_path, run_info(duration_s=duration_s), *tables))


def equal(got, expected) -> bool:
    return np.allclose(got, expected, equal_nan=True)


def test_an_empty_run(tmp_path):
    run = bins_of(tmp_path, duration_s=0.0)
    assert equal(run.time_s, np.arange(10) / 10 + 0.05)
    assert equal(run.batch, 0.0)
    assert equal(run.finetune_tokens_per_s, 0.0)
    assert np.isnan(run.itl_p99_ms).all()
    assert np.isnan(run.loss).all()


def test_batch_is_a_mean_over_time_and_zero_while_idle(tmp_path):
    steps = [
        STEP._replace(time_s=0.0, batch=2, latency_ms=100.0, gap_ms=NAN),
        STEP._replace(time_s=2.5, batch=4, latency_ms=500.0, gap_ms=2500.0),
        STEP._replace(time_s=7.0, batch=8, latency_ms=1000.0, window_ms=1000.0, gap_ms=NAN),
    ]
    # 2 until the next step begins, 4 for half a second, idle, then 8 for two seconds
    assert equal(bins_of(tmp_path, steps).batch, [2, 2, 0.5 * 2 + 0.5 * 4, 0, 0, 0, 0, 8, 8, 0])


def test_the_kv_cache_is_a_mean_over_the_busy_time(tmp_path):
    step = STEP._replace(kv_blocks_total=100, latency_ms=1000.0, gap_ms=NAN)
    steps = [
        step._replace(time_s=1.0, kv_blocks_free=20, kv_blocks_lent=70),
        step._replace(time_s=3.5, kv_blocks_free=10, kv_blocks_lent=30),
    ]
    run = bins_of(tmp_path, steps)
    assert equal(run.kv_lent, [NAN, 0.7, NAN, 0.3, 0.3, *[NAN] * 5])
    assert equal(run.kv_used, [NAN, 0.1, NAN, 0.6, 0.6, *[NAN] * 5])


def test_finetune_share_is_of_the_busy_time_and_counts_windows(tmp_path):
    steps = [
        STEP._replace(time_s=1.0, decode_units=3, finetune_units=1, latency_ms=1000.0, gap_ms=NAN),
        STEP._replace(time_s=4.0, decode_units=3, finetune_units=1, latency_ms=500.0, window_ms=500.0, gap_ms=NAN),
        STEP._replace(time_s=6.5, decode_units=4, finetune_units=0, latency_ms=500.0, gap_ms=NAN),
    ]
    expected = [NAN, 0.25, NAN, NAN, 0.5 * 1.0 + 0.5 * 0.25, NAN, 0.0, NAN, NAN, NAN]
    assert equal(bins_of(tmp_path, steps).finetune_share, expected)


def test_gaps_are_placed_where_they_ended(tmp_path):
    requests = [
        REQUEST._replace(arrival_s=0.0, ttft_ms=500.0, itl_ms=(1000.0, 2000.0)),
        REQUEST._replace(arrival_s=1.0, ttft_ms=NAN, itl_ms=(), error="refused"),
        REQUEST._replace(arrival_s=2.0, ttft_ms=200.0, itl_ms=(1000.0, 100.0, 200.0, 5000.0)),
    ]
    run = bins_of(tmp_path, requests=requests)
    # ends: 1.5, 3.5 and 3.2, 3.3, 3.5, 8.5
    assert equal(run.itl_p50_ms, [NAN, 1000, NAN, 600, NAN, NAN, NAN, NAN, 5000, NAN])
    assert run.itl_p99_ms[3] == pytest.approx(1970.0)


def test_tokens_are_spread_over_the_time_they_took(tmp_path):
    updates = [
        UpdateRecord(update=1, time_s=2.0, loss=5.0, tokens=100, learning_rate=1e-4),
        UpdateRecord(update=2, time_s=2.5, loss=4.0, tokens=100, learning_rate=1e-4),
        UpdateRecord(update=3, time_s=4.5, loss=3.0, tokens=400, learning_rate=1e-4),
    ]
    run = bins_of(tmp_path, updates=updates)
    assert equal(run.finetune_tokens_per_s, [50, 50, 100 + 100, 200, 100, 0, 0, 0, 0, 0])
    assert equal(run.loss, [NAN, NAN, 4.5, NAN, 3, NAN, NAN, NAN, NAN, NAN])


def test_what_happens_after_the_measured_part_is_shown(tmp_path):
    updates = [UpdateRecord(update=1, time_s=20.0, loss=5.0, tokens=100, learning_rate=1e-4)]
    assert bins_of(tmp_path, updates=updates, duration_s=10.0).time_s[-1] == pytest.approx(19.0)
