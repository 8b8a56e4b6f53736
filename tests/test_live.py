"""The numbers of the live view, by hand."""

from __future__ import annotations

import pytest

from harli.live import LiveNumbers
from harli.rows import UpdateRecord
from harli.types import Slo
from tests.records.builders import REQUEST, STEP


def test_nothing_yet() -> None:
    progress = LiveNumbers(Slo(tpot_ms=10.0)).progress(0.5, running=0, notice="")
    assert (progress.tpot_ms, progress.itl_ms, progress.attainment, progress.loss) == (None, None, None, None)
    assert progress.share == "idle"


def test_recent_numbers_forget_the_past_and_totals_do_not() -> None:
    live = LiveNumbers(Slo(tpot_ms=10.0))
    steps = [STEP._replace(time_s=float(i), gap_ms=100.0 if i < 5 else 7.0) for i in range(20)]
    updates = [UpdateRecord(i, float(i), 3.0 - 0.1 * i, 50, 1e-3) for i in range(20)]
    live.add(steps, updates, [])
    progress = live.progress(20.0, running=2, notice="")
    assert progress.itl_ms == 7.0
    assert progress.tokens_per_s == pytest.approx(10 * 50 / 10.0)
    assert progress.updates == 20
    assert progress.loss == pytest.approx(1.1)


def test_attainment_counts_each_request_once() -> None:
    live = LiveNumbers(Slo(tpot_ms=10.0))
    records = [
        REQUEST._replace(output_tokens=3, tpot_ms=8.0, itl_ms=(8.0, 8.0), error=""),
        REQUEST._replace(output_tokens=3, tpot_ms=12.0, itl_ms=(12.0, 12.0), error=""),
        REQUEST._replace(output_tokens=3, tpot_ms=8.0, itl_ms=(8.0, 8.0), error="cancelled"),
        REQUEST._replace(output_tokens=1, tpot_ms=float("nan"), itl_ms=(), error=""),
    ]
    live.add([], [], records[:2])
    live.add([], [], records)
    progress = live.progress(5.0, running=0, notice="why")
    assert (progress.finished, progress.failed) == (3, 1)
    assert progress.attainment == pytest.approx(1 / 3)
    assert progress.tpot_ms == 10.0
    assert progress.notice == "why"


def test_itl_attainment_counts_gaps() -> None:
    live = LiveNumbers(Slo(itl_ms=10.0))
    live.add([], [], [REQUEST._replace(output_tokens=5, tpot_ms=9.0, itl_ms=(4.0, 8.0, 12.0, 12.0), error="")])
    assert live.progress(1.0, running=0, notice="").attainment == 0.5
