"""Rows from metrics: means, intervals, rivals, gains, marks."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harli.compare.cell import SEPARATE, Entrant, Objective
from harli.compare.score import gain_over_dedicated, marks, score
from harli.compare.verdict import TOKENS
from harli.types import Slo
from tests.compare.builders import rounds, shown

SLO = Slo(itl_ms=100.0)
AT = Objective(SLO, 1.25)
QOS, REACTIVE = Entrant("qos"), Entrant("reactive", (("low", 0.5), ("high", 0.8)))
FIXED, CONSERVING = (
    Entrant("static", (("share", "1/1"), ("work_conserving", conserving)), slo_aware=False)
    for conserving in (False, True)
)


def test_rows_have_means_intervals_and_the_ratio_to_the_best_unharmed_rival() -> None:
    qos, fixed = [120.0, 132.0, 138.0], [100.0, 104.0, 120.0]
    runs = {
        SEPARATE: rounds(shown(), shown(), shown()),
        QOS: rounds(*map(shown, qos)),
        FIXED: rounds(*map(shown, fixed)),
        CONSERVING: rounds(*(shown(300.0, itl_attainment=0.5) for _ in range(3))),
        REACTIVE: rounds(*(shown(110.0, queue_wait_p99_ms=9000.0) for _ in range(3))),
    }
    rows = {row.entrant: row for row in score(AT, runs, {})}
    assert list(rows) == [SEPARATE, CONSERVING, QOS, REACTIVE, FIXED]
    row = rows[QOS]
    assert row.metrics[TOKENS] == pytest.approx(stats.gmean(qos))
    assert row.rival == FIXED
    assert row.ratio == pytest.approx(stats.gmean(qos) / stats.gmean(fixed))
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


def test_the_best_rival_is_the_one_with_the_largest_geometric_mean() -> None:
    none, even, uneven = rounds(shown(), shown()), rounds(shown(50.0), shown(50.0)), rounds(shown(10.0), shown(100.0))
    runs = {SEPARATE: none, QOS: rounds(shown(60.0), shown(60.0)), REACTIVE: even, FIXED: uneven}
    rows = {row.entrant: row for row in score(AT, runs, {})}
    assert list(rows) == [SEPARATE, QOS, REACTIVE, FIXED]
    assert rows[QOS].rival == REACTIVE
    assert rows[QOS].ratio == pytest.approx(1.2)
    assert rows[FIXED].ratio == pytest.approx(1000.0**0.5 / 60.0)


def test_a_round_without_an_update_makes_the_mean_zero_and_is_told() -> None:
    none, some = rounds(shown(), shown()), rounds(shown(), shown(6.0))
    rows = score(AT, {SEPARATE: none, QOS: rounds(shown(9.0), shown(9.0)), FIXED: some, REACTIVE: none}, {})
    of = {row.entrant: row for row in rows}
    for entrant in (FIXED, REACTIVE):
        row = of[entrant]
        assert (row.tokens_per_s, row.interval, row.rival) == (0.0, None, QOS)
        assert (row.ratio, row.ratio_interval) == (0.0, None)
    assert of[QOS].rival is None
    assert marks(rows) == [f"{FIXED} finetuned nothing in 1 of 2 rounds, so that its mean is 0"]


def test_an_oracle_is_held_against_in_geometric_means() -> None:
    runs = {SEPARATE: rounds(shown(), shown()), QOS: rounds(shown(9.0), shown(40.0))}
    runs[Entrant("oracle")] = rounds(shown(10.0), shown(90.0))
    rows = {row.entrant: row for row in score(AT, runs, {})}
    assert rows[QOS].of_oracle == pytest.approx(0.4**0.5)
    assert rows[SEPARATE].of_oracle == 0.0


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
    assert row["finetune/tokens_per_s"] == pytest.approx(110.0**0.5)
    assert row["finetune/tokens_per_s_vs_best_rival"] == pytest.approx(2.0)
    assert row["finetune/gain_vs_dedicated"] is row["finetune/gain_vs_dedicated_keeps_slo"] is None
    assert (row["slo/attainment_vs_separate"], row["slo/attainment_vs_separate_interval"]) == (0.0, [0.0, 0.0])
    assert (row["unharmed"], row["undecided"]) == (True, False)
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


def gain(halves: list[float], alone: list[float]) -> float | None:
    separate = rounds(shown(), shown())
    found = gain_over_dedicated(rounds(*map(shown, halves)), rounds(*map(shown, alone)), separate, SLO)
    return None if found is None else found.value


def test_gain_over_dedicated() -> None:
    assert gain([80.0], [100.0]) == pytest.approx(0.6)
    assert gain([80.0, 45.0], [100.0, 100.0]) == pytest.approx(0.2)
    assert gain([50.0, 1.0], [100.0, 0.0]) == pytest.approx(0.0)
    assert gain([0.0], [100.0]) == -1.0
    assert gain([], []) is None


def test_a_gain_without_the_slo_is_none_and_it_is_told_why() -> None:
    alone, late = rounds(shown(100.0)), rounds(shown(90.0, itl_attainment=0.95))
    runs = {SEPARATE: rounds(shown()), QOS: rounds(shown(60.0))}
    missed = gain_over_dedicated(late, alone, runs[SEPARATE], SLO)
    kept = gain_over_dedicated(late, alone, rounds(shown(itl_attainment=0.951)), SLO)
    assert missed is not None
    assert kept is not None
    assert kept.value == pytest.approx(0.8)
    rows = score(AT, runs, {QOS: missed})
    row = rows[1].as_json()
    assert (row["finetune/gain_vs_dedicated"], row["finetune/gain_vs_dedicated_keeps_slo"]) == (None, False)
    (told,) = marks(rows)
    assert told.startswith("qos has no gain over dedicated devices: with half of the requests it attains 95.0%, ")


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
