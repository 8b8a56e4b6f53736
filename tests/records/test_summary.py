from __future__ import annotations

import math

import pytest

from harli.records.schema import REQUESTS, STEPS, UPDATES
from harli.records.summary import METRICS, SETTLED_STEPS, summarise
from harli.rows import UpdateRecord
from harli.types import Slo
from tests.records.builders import REQUEST, STEP, small_run

SLO = Slo(itl_ms=30.0, tpot_ms=25.0)


def metrics(steps=(), requests=(), updates=(), slo=SLO, duration_s=10.0):
    tables = STEPS.table(list(steps)), REQUESTS.table(list(requests)), UPDATES.table(list(updates))
    return summarise(*tables, slo=slo, duration_s=duration_s)


def answered(*gaps_ms: float, **changes):
    tpot_ms = sum(gaps_ms) / len(gaps_ms) if gaps_ms else math.nan
    return REQUEST._replace(**{"output_tokens": len(gaps_ms) + 1, "itl_ms": gaps_ms, "tpot_ms": tpot_ms, **changes})


def test_every_metric_is_there_whatever_happened(tmp_path):
    info = small_run(tmp_path / "run").info
    assert tuple(info.summary) == METRICS
    assert all(value is not None and math.isfinite(value) for value in info.summary.values())


def test_lent_memory_is_a_fraction_of_the_cache_and_reclaims_are_counted():
    lent = [STEP._replace(kv_blocks_lent=count, kv_blocks_total=100) for count in (0, 80, 40)]
    summary = metrics([*lent, STEP._replace(reclaim_ms=3.0)])
    assert summary["memory/lent_mean"] == pytest.approx(0.3)
    assert summary["memory/lent_peak"] == pytest.approx(0.8)
    kept = [STEP._replace(kept_layers=count, microbatch_tokens=tokens) for count, tokens in ((8, 64), (6, 64), (0, 0))]
    assert metrics(kept)["memory/kept_layers_mean"] == 7.0  # without a job there is nothing to keep
    assert (summary["memory/reclaims"], summary["memory/reclaim_p99_ms"]) == (1.0, 3.0)
    assert metrics(lent)["memory/reclaim_p99_ms"] is None


def test_predictions_are_judged_without_windows_and_after_they_have_settled():
    poor = [STEP._replace(predicted_ms=5.0, bound_ms=6.0)] * SETTLED_STEPS
    good = [STEP._replace(gap_ms=40.0 + 15.0, window_ms=15.0, predicted_ms=32.0, bound_ms=48.0)] * 30
    late = [STEP._replace(gap_ms=50.0, predicted_ms=25.0, bound_ms=37.5)] * 10
    nothing = [STEP._replace(predicted_ms=math.nan, bound_ms=math.nan), STEP._replace(gap_ms=math.nan)] * 20
    summary = metrics([*nothing, *poor, *good, *late])
    assert summary["predictor/gap_mape"] == pytest.approx((30 * 0.2 + 10 * 0.5) / 40)
    assert summary["predictor/bound_coverage"] == pytest.approx(30 / 40)
    assert summary["predictor/bound_width"] == pytest.approx(1.5)
    assert metrics(poor)["predictor/gap_mape"] is None


def test_nothing_happened():
    summary = metrics(duration_s=0.0)
    counts = {"decode/requests_completed", "decode/requests_failed", "finetune/updates", "memory/reclaims"}
    assert {name: value for name, value in summary.items() if value is not None} == dict.fromkeys(counts, 0.0)


def test_latency_percentiles():
    summary = metrics(
        requests=[
            answered(10.0, 20.0, ttft_ms=100.0, queue_wait_ms=1.0),
            answered(30.0, 40.0, 50.0, ttft_ms=200.0, queue_wait_ms=2.0),
            answered(ttft_ms=300.0, queue_wait_ms=math.nan),
            REQUEST._replace(output_tokens=9, ttft_ms=math.nan, queue_wait_ms=math.nan, error="cancelled"),
        ]
    )
    assert summary["decode/tpot_p50_ms"] == pytest.approx(27.5)  # of 15 and 40
    assert summary["decode/tpot_p90_ms"] == pytest.approx(37.5)
    assert summary["decode/itl_p50_ms"] == pytest.approx(30.0)  # of 10, 20, 30, 40, 50
    assert summary["decode/itl_p90_ms"] == pytest.approx(46.0)
    assert summary["decode/itl_p99_ms"] == pytest.approx(49.6)
    assert summary["decode/ttft_p50_ms"] == pytest.approx(200.0)
    assert summary["decode/ttft_p99_ms"] == pytest.approx(298.0)
    assert summary["decode/queue_wait_p99_ms"] == pytest.approx(1.99)


def test_counts_and_rates():
    summary = metrics(
        requests=[
            answered(10.0, 20.0),
            answered(),
            answered(10.0, output_tokens=9, error="cancelled"),
            REQUEST._replace(output_tokens=9, ttft_ms=math.nan, error="refused"),
        ]
    )
    assert summary["decode/requests_completed"] == 2
    assert summary["decode/requests_failed"] == 2
    assert summary["decode/requests_per_s"] == pytest.approx(0.2)
    assert summary["decode/output_tokens_per_s"] == pytest.approx(0.6)  # 3, 1, 2 and 0 tokens in 10 s


def test_attainment():
    summary = metrics(requests=[answered(10.0, 30.0), answered(30.1, 20.0), answered()])
    assert summary["slo/itl_attainment"] == pytest.approx(3 / 4)
    assert summary["slo/tpot_attainment"] == pytest.approx(1 / 2)  # 20 and 25.05 ms


def test_failed_requests_miss_both_slos_with_all_they_asked_for():
    requests = [
        answered(10.0, 10.0, 10.0),
        answered(10.0, 10.0, output_tokens=5, error="cancelled"),
        REQUEST._replace(output_tokens=2, ttft_ms=math.nan, error="refused"),
        REQUEST._replace(output_tokens=1, ttft_ms=math.nan, error="refused"),
    ]
    summary = metrics(requests=requests)
    assert summary["slo/itl_attainment"] == pytest.approx(3 / 8)
    assert summary["slo/tpot_attainment"] == pytest.approx(1 / 3)


def test_one_token_requests_have_no_attainment():
    summary = metrics(requests=[answered(), answered()])
    assert summary["slo/itl_attainment"] is None
    assert summary["slo/tpot_attainment"] is None
    assert summary["decode/tpot_p50_ms"] is None


def test_attainment_without_an_slo():
    requests = [answered(10.0, 40.0)]
    assert metrics(requests=requests, slo=Slo())["slo/itl_attainment"] is None
    assert metrics(requests=requests, slo=Slo())["slo/tpot_attainment"] is None
    only_tpot = metrics(requests=requests, slo=Slo(tpot_ms=25.0))
    assert (only_tpot["slo/itl_attainment"], only_tpot["slo/tpot_attainment"]) == (None, 1.0)


def test_steps():
    steps = [
        STEP._replace(batch=1, latency_ms=20.0, gap_ms=math.nan, decide_cpu_us=10.0),
        STEP._replace(batch=3, latency_ms=30.0, gap_ms=40.0, decide_cpu_us=20.0, decide_wall_us=50.0, hook_us=90.0),
    ]
    summary = metrics(steps=steps, duration_s=0.1)
    assert summary["decode/batch_mean"] == 2.0
    assert summary["decode/busy_fraction"] == pytest.approx(0.6)
    assert summary["scheduler/step_p50_ms"] == 25.0
    assert summary["scheduler/decision_p99_us"] == pytest.approx(19.9)
    assert summary["scheduler/decision_wall_p99_us"] == pytest.approx(49.62)
    assert summary["scheduler/hook_p99_us"] == pytest.approx(89.4)


def test_finetuning():
    updates = [
        UpdateRecord(update=1, time_s=2.0, loss=5.0, tokens=200, learning_rate=1e-4),
        UpdateRecord(update=2, time_s=4.0, loss=math.nan, tokens=100, learning_rate=1e-4),
    ]
    summary = metrics(updates=updates)
    assert summary["finetune/tokens_per_s"] == 30.0
    assert summary["finetune/updates"] == 2
    assert summary["finetune/loss_first"] == 5.0
    assert summary["finetune/loss_last"] is None
