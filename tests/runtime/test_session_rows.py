"""The rows that a session writes, and what switching its hooks does to them."""

from __future__ import annotations

import math
import time
from typing import Any

from harli.types import Decision
from tests.runtime.stand_ins import ALONE, HALF, MOST, Engine


def test_rows_add_up(engine: Engine) -> None:
    engine.policy.idle_share = ALONE
    units = engine.attach()
    engine.begin()
    rows = [engine.step(share) for share in (HALF, HALF, MOST)]
    units.entered()
    units.end()
    rows.append(engine.step(ALONE))
    engine.session.idle()
    rows.append(engine.step(ALONE))
    assert [row.step for row in rows] == [1, 2, 3, 4, 5]
    assert [row.finetune_tokens for row in rows] == [0.0, 0.0, 0.0, 10.0, 0.0]
    assert [math.isnan(row.gap_ms) for row in rows] == [True, False, False, False, True]
    now_s = time.monotonic() - engine.clock_zero
    for row in rows:
        assert row.decode_units + row.finetune_units <= 4
        assert row.latency_ms >= 0.0
        assert not row.gap_ms < row.latency_ms + row.window_ms
        assert row.hook_us >= 0.0
        assert row.decide_wall_us > 0.0
        assert row.decide_cpu_us >= 0.0
        assert 0.0 <= row.time_s <= now_s
    assert [row.time_s for row in rows] == sorted(row.time_s for row in rows)


def test_a_step_that_was_not_decided_leaves_no_row(engine: Engine) -> None:
    engine.begin()
    engine.step(ALONE)
    engine.session.begin_step(None)
    engine.session.end_step()
    engine.session.observe()
    assert len(engine.controller.rows) == 1


# Switching the hooks


def test_with_hooks_off_decode_has_the_device_alone(engine: Engine) -> None:
    engine.policy.idle_share = ALONE
    units = engine.attach()
    engine.begin()
    engine.step(HALF)
    units.entered()
    engine.session.set_enabled(False)
    assert not engine.session.active
    assert engine.partitioner.calls[-1] == 4
    units.end()
    engine.session.idle()
    assert units.stays_out()


def test_switched_on_while_idle_finetuning_goes_on(engine: Engine) -> None:
    engine.policy.idle_share = HALF
    engine.begin()
    engine.session.set_enabled(False)
    units = engine.attach()
    assert units.stays_out()
    engine.session.set_enabled(True)
    assert units.entered() == 2


def test_the_time_with_hooks_off_is_no_gap(engine: Engine) -> None:
    engine.begin()
    engine.step(ALONE)
    engine.session.set_enabled(False)
    engine.session.set_enabled(True)
    assert math.isnan(engine.step(ALONE).gap_ms)


def test_decide_measures_itself_and_reports_a_slow_policy(engine: Engine) -> None:
    engine.begin()

    def slow(*_: Any) -> Decision:
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass
        return Decision(ALONE)

    engine.policy.decide = slow  # type: ignore[method-assign, assignment]
    row = engine.step(ALONE)
    assert row.decide_cpu_us >= 20_000.0
    assert row.decide_wall_us >= row.decide_cpu_us * 0.9
    assert "scripted" in engine.controller.failure
    assert "limit" in engine.controller.failure
