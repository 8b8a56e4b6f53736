"""Rows from metrics: verdicts, means, intervals, rivals, marks."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harli.compare.cell import SEPARATE, Entrant, Objective
from harli.compare.score import TOKENS, Run, gain_over_dedicated, judge, marks, rank, score
from harli.types import Slo
from tests.compare.builders import shown

SLO = Slo(itl_ms=100.0)
AT = Objective(SLO, 1.25)
QOS, REACTIVE = Entrant("qos"), Entrant("reactive", (("low", 0.5), ("high", 0.8)))
FIXED, CONSERVING = (
    Entrant("static", (("share", "1/1"), ("work_conserving", conserving)), slo_aware=False)
    for conserving in (False, True)
)


def rounds(*runs: Run) -> dict[int, Run]:
    return dict(enumerate(runs, 1))


@pytest.mark.parametrize(
    ("ours", "alone", "keeps_slo", "waits", "reason"),
    [
        (shown(), shown(), True, False, ""),
        (shown(itl_attainment=0.99), shown(), True, False, ""),
        (shown(itl_attainment=0.989), shown(), False, False, "attains 98.9%, decode alone 100.0%"),
        (shown(itl_attainment=0.946), shown(itl_attainment=0.95), True, False, ""),
        (shown(itl_attainment=0.944), shown(itl_attainment=0.95), False, False, "attains 94.4%"),
        (shown(itl_attainment=None), shown(), False, False, "attains nan%"),
        (shown(admitted_per_s=1.985), shown(), True, False, ""),
        (shown(admitted_per_s=1.9), shown(), True, True, "at 95.0% of decode alone's rate"),
        (shown(admitted_per_s=9.0), shown(), True, False, ""),
        (shown(queue_wait_p99_ms=149.0), shown(), True, False, ""),
        (shown(queue_wait_p99_ms=151.0), shown(), True, True, "wait 151 ms at P99, decode alone 50 ms"),
        (shown(queue_wait_p99_ms=2199.0), shown(queue_wait_p99_ms=2000.0), True, False, ""),
        (shown(queue_wait_p99_ms=2201.0), shown(queue_wait_p99_ms=2000.0), True, True, "wait 2201 ms"),
        (shown(requests_failed=1.0), shown(), True, False, "1 failed requests"),
        (shown(failure="out of memory"), shown(), True, False, "out of memory"),
    ],
)
def test_decode_is_unharmed_or_it_is_said_why_not(
    ours: Run, alone: Run, keeps_slo: bool, waits: bool, reason: str
) -> None:
    verdict = judge(rounds(ours), rounds(alone), SLO)
    assert (verdict.keeps_slo, verdict.waits) == (keeps_slo, waits)
    assert bool(verdict.reason) == bool(reason)
    assert reason in verdict.reason


def test_only_rounds_that_both_have_count() -> None:
    assert not judge({1: shown(), 2: shown(requests_failed=3.0)}, {1: shown()}, SLO).reason
    assert "3 failed" in judge({1: shown(), 2: shown(requests_failed=3.0)}, rounds(shown(), shown()), SLO).reason


def test_both_slos_have_to_be_kept() -> None:
    both = Slo(itl_ms=100.0, tpot_ms=80.0)
    run = shown(tpot_attainment=0.5)
    assert run.attainment(both) == 0.5
    assert not judge(rounds(run), rounds(shown(tpot_attainment=1.0)), both).keeps_slo


def test_rows_have_means_intervals_and_the_ratio_to_the_best_unharmed_rival() -> None:
    qos, fixed = [120.0, 132.0, 138.0], [100.0, 104.0, 120.0]
    runs = {
        SEPARATE: rounds(shown(), shown(), shown()),
        QOS: rounds(*map(shown, qos)),
        FIXED: rounds(*map(shown, fixed)),
        CONSERVING: rounds(*(shown(300.0, itl_attainment=0.5) for _ in range(3))),
        REACTIVE: rounds(*(shown(110.0, queue_wait_p99_ms=9000.0) for _ in range(3))),
    }
    rows = {row.entrant: row for row in score(AT, runs, {QOS: 0.4})}
    assert list(rows) == [SEPARATE, CONSERVING, QOS, REACTIVE, FIXED]
    row = rows[QOS]
    assert row.metrics[TOKENS] == pytest.approx(130.0)
    assert (row.rival, row.gain) == (FIXED, 0.4)
    logs = np.log(np.array(qos) / fixed)
    expected = stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs))
    assert row.ratio == pytest.approx(math.exp(logs.mean()))
    assert row.ratio_interval == pytest.approx(tuple(np.exp(expected)))
    expected = stats.t.interval(0.95, 2, np.log(qos).mean(), stats.sem(np.log(qos)))
    assert row.interval == pytest.approx(tuple(np.exp(expected)))
    assert rows[FIXED].rival == rows[CONSERVING].rival == QOS  # never another variant of the same policy
    assert rows[SEPARATE].rival is None
    assert [row.unharmed for row in rows.values()] == [True, False, True, False, True]


def test_one_round_has_no_interval_and_no_rival_no_ratio() -> None:
    (_, row) = score(AT, {SEPARATE: rounds(shown()), QOS: rounds(shown(10.0))}, {})
    assert (row.interval, row.rival, row.ratio, row.ratio_interval, row.gain) == (None, None, None, None, None)


def test_a_policy_that_harvests_nothing_has_ratio_zero() -> None:
    none, some = rounds(shown(), shown()), rounds(shown(), shown(6.0))
    rows = {row.entrant: row for row in score(AT, {SEPARATE: none, QOS: none, FIXED: some}, {})}
    assert (rows[QOS].ratio, rows[QOS].ratio_interval, rows[QOS].interval) == (0.0, None, None)
    assert rows[FIXED].rival is None
    rows = {
        row.entrant: row for row in score(AT, {SEPARATE: none, QOS: rounds(shown(9.0), shown(9.0)), FIXED: some}, {})
    }
    assert (rows[QOS].ratio, rows[QOS].ratio_interval) == (3.0, None)  # a round without an update has no logarithm


def test_an_interrupted_comparison_scores_the_rounds_it_has() -> None:
    runs = {SEPARATE: {1: shown(), 2: shown()}, QOS: {1: shown(10.0)}, FIXED: {1: shown(5.0), 2: shown(50.0)}}
    rows = {row.entrant: row for row in score(AT, runs, {})}
    assert rows[QOS].ratio == pytest.approx(2.0)  # the round that both have
    assert len(rows[FIXED].points) == 2
    assert [row.entrant for row in score(AT, {SEPARATE: {1: shown()}, QOS: {2: shown(1.0)}}, {})] == [SEPARATE]


def test_a_row_is_flat_json_with_the_names_of_a_run() -> None:
    runs = {SEPARATE: rounds(shown(), shown()), QOS: rounds(shown(10.0), shown(11.0)), REACTIVE: rounds(shown(5.0))}
    row = json.loads(json.dumps([row.as_json() for row in score(AT, runs, {})], allow_nan=False))[1]
    assert (row["policy"], row["slo_scale"], row["slo_itl_ms"], row["rounds"]) == ("qos", 1.25, 100.0, 2)
    assert row["finetune/tokens_per_s"] == pytest.approx(10.5)
    assert row["finetune/tokens_per_s_vs_best_rival"] == pytest.approx(2.0)
    assert row["finetune/gain_vs_dedicated"] is None
    assert row["slo/itl_attainment"] == 1.0
    assert row["best_rival"] == "reactive low=0.5 high=0.8"


def test_marks_name_rivals_that_make_requests_wait_and_slos_that_no_split_keeps() -> None:
    late, missing = shown(10.0, admitted_per_s=1.0), shown(10.0, itl_attainment=0.5)
    both = score(AT, {SEPARATE: rounds(shown()), REACTIVE: rounds(late), FIXED: rounds(missing)}, {})
    assert marks(both) == [
        "reactive low=0.5 high=0.8 keeps the SLO only by letting requests wait",
        "no static split keeps the SLO",
    ]
    assert marks(score(AT, {SEPARATE: rounds(shown()), FIXED: rounds(shown(9.0)), QOS: rounds(missing)}, {})) == []


def test_variants_rank_by_harm_then_slo_then_tokens_or_attainment() -> None:
    best_first = [
        shown(20.0),
        shown(10.0),
        shown(90.0, queue_wait_p99_ms=5000.0),
        shown(30.0, itl_attainment=0.9),
        shown(99.0, itl_attainment=0.3),
    ]
    ranks = [rank(run, shown(), SLO) for run in best_first]
    assert ranks == sorted(ranks, reverse=True)


def test_gain_over_dedicated() -> None:
    assert gain_over_dedicated([80.0], [100.0]) == pytest.approx(0.6)
    assert gain_over_dedicated([80.0, 60.0], [100.0, 100.0]) == pytest.approx(0.4)
    assert gain_over_dedicated([50.0, 1.0], [100.0, 0.0]) == pytest.approx(0.0)
    assert gain_over_dedicated([], []) is None


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(1.0, 1e4), st.floats(1.0, 1e4)), min_size=2, max_size=6))
def test_the_ratio_lies_in_its_interval_and_turns_over_for_the_rival(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = zip(*pairs, strict=True)
    runs = {SEPARATE: rounds(*(shown() for _ in pairs)), QOS: rounds(*map(shown, ours))}
    runs[FIXED] = rounds(*map(shown, theirs))
    rows = {row.entrant: row for row in score(AT, runs, {})}
    assert rows[QOS].ratio is not None
    assert rows[FIXED].ratio is not None
    assert rows[QOS].ratio_interval is not None
    low, high = rows[QOS].ratio_interval
    assert low <= rows[QOS].ratio * (1 + 1e-9)
    assert rows[QOS].ratio <= high * (1 + 1e-9)
    assert rows[QOS].ratio * rows[FIXED].ratio == pytest.approx(1.0)
