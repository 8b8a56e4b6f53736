"""What becomes of decode: verdicts, how sure they are, and the order of variants."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from harli.compare.verdict import Run, attainment, judge, rank
from harli.types import Slo
from tests.compare.builders import rounds, shown

SLO = Slo(itl_ms=100.0)


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


def test_attainment_is_held_against_decode_alone_round_by_round() -> None:
    """What all runs of a round have in common is not in the interval."""
    alone, ours = [0.99, 0.90, 0.95], [0.988, 0.896, 0.947]
    found = attainment(*(rounds(*(shown(itl_attainment=one) for one in values)) for values in (ours, alone)), SLO)
    expected = stats.t.interval(0.95, 2, -0.003, stats.sem(np.subtract(ours, alone)))
    assert found.difference == pytest.approx(-0.003)
    assert found.interval == pytest.approx(expected)
    assert found.limit == pytest.approx(-0.005)
    assert found.interval[1] < 0.0
    once = attainment({1: shown(itl_attainment=0.98)}, {1: shown(), 2: shown()}, SLO)
    assert (once.difference, once.interval, once.unclear) == (pytest.approx(-0.02), None, False)
    assert attainment(rounds(shown(itl_attainment=None), shown()), rounds(shown(), shown()), SLO).interval is None


@pytest.mark.parametrize(
    ("ours", "unharmed", "undecided"),
    [
        ([1.0, 0.984, 0.992], True, True),
        ([1.0, 0.97, 0.99], False, True),
        ([0.9921, 0.9920, 0.9922], True, False),
        ([0.97, 0.971, 0.969], False, False),
    ],
)
def test_a_verdict_is_undecided_while_the_limit_is_within_the_interval(
    ours: list[float], unharmed: bool, undecided: bool
) -> None:
    alone = rounds(*(shown() for _ in ours))
    verdict = judge(rounds(*(shown(itl_attainment=one) for one in ours)), alone, SLO)
    assert (not verdict.reason, verdict.undecided) == (unharmed, undecided)
    late = judge(rounds(*(shown(itl_attainment=one, queue_wait_p99_ms=9e3) for one in ours)), alone, SLO)
    assert not late.undecided  # decode is harmed whatever the attainment
