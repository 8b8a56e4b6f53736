"""A script is played in the engine and found again in the rows that come back."""

from __future__ import annotations

from harli.rows import StepRecord
from harli.types import DecodeState, FinetuneState, Slo
from policies.base import PolicyContext
from policies.registry import make_policy
from profiling.plan import DROPPED, Segment
from profiling.script import POLICY, decode_script, encode_script, segments_of
from tests.profiling.builders import MENU
from tests.records.builders import STEP

ALONE, SPLIT, FINETUNE = MENU.shares
SCRIPT = [Segment(ALONE, steps=5), Segment(SPLIT, steps=4), Segment(ALONE, 12.5, steps=3)]


def play(states: list[tuple[int, int]]) -> list[StepRecord]:
    """The rows of steps with these batches and waiting requests."""
    params = {"script": encode_script(SCRIPT), "batch": 4, "idle": "0/2"}
    policy = make_policy(POLICY, params, PolicyContext(MENU, Slo()))
    assert policy.idle(FinetuneState()) == FINETUNE
    rows = []
    for batch, waiting in states:
        decision = policy.decide(DecodeState(batch=batch, waiting=waiting), FinetuneState(ready=True))
        rows.append(
            STEP._replace(
                batch=batch,
                waiting=waiting,
                wanted_finetune=decision.share.finetune,
                exclusive_ms=decision.exclusive_ms,
            )
        )
    return rows


def test_a_script_survives_as_text() -> None:
    assert list(decode_script(encode_script(SCRIPT), MENU)) == SCRIPT
    assert list(decode_script("", MENU)) == []


def test_labels_agree_with_what_was_played() -> None:
    states = [(2, 2), (4, 1), *[(4, 0)] * 4, (5, 0), *[(4, 0)] * 9, (1, 0)]
    rows = play(states)
    labels = segments_of(rows, SCRIPT, 4)
    assert labels[:2] == [-1, -1]
    for row, label in zip(rows, labels, strict=True):
        if label >= 0:
            assert row.wanted_finetune == SCRIPT[label].share.finetune
            assert row.exclusive_ms == SCRIPT[label].exclusive_ms
    assert [labels.count(number) for number in range(3)] == [5 - DROPPED, 4 - DROPPED, 3 - DROPPED]
    assert [row.wanted_finetune for row in rows].count(1) == 4
    assert labels[-1] == -1


def test_rows_that_end_early_leave_segments_out() -> None:
    labels = segments_of(play([(4, 0)] * 7), SCRIPT, 4)
    assert set(labels) == {-1, 0}
    assert segments_of([], SCRIPT, 4) == []
    assert segments_of(play([(3, 0)] * 5), SCRIPT, 4) == [-1] * 5
