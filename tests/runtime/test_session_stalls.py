"""A unit that stalls is written off, and decode then has the device to itself."""

from __future__ import annotations

import threading
import time

import pytest

from harli.rows import StepRecord
from harli.runtime import session as session_module
from tests.runtime.stand_ins import ALONE, HALF, MOST, PATIENCE_S, Engine, Units


@pytest.fixture
def stalls_soon(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(session_module, "STALL_S", 0.1)
    monkeypatch.setattr(session_module, "PAUSED_S", 0.2)
    return 0.1


def assert_written_off(engine: Engine, row: StepRecord) -> None:
    assert "\n" not in engine.session.failure
    assert "has been running for more than" in engine.session.failure
    assert row.decode_units == 4
    assert not engine.session.finetune.ready
    row = engine.step(HALF, exclusive_ms=PATIENCE_S * 2e3)
    assert (row.decode_units, row.finetune_units, row.window_ms) == (4, 0, 0.0)
    engine.units.end()
    engine.units.join(PATIENCE_S)
    assert not engine.units.is_alive()


def run_too_long(engine: Engine, stalls_soon: float) -> Units:
    """A unit that has been running beside decode for longer than it may."""
    engine.policy.idle_share = ALONE
    units = engine.attach()
    engine.begin()
    engine.step(MOST)
    units.entered()
    time.sleep(1.5 * stalls_soon)
    return units


def test_a_unit_that_holds_everything_and_stalls_is_written_off(engine: Engine, stalls_soon: float) -> None:
    units = engine.attach()
    engine.begin()
    units.entered()
    engine.session.request_arrived()
    row = engine.step(HALF)
    assert row.window_ms >= stalls_soon * 1e3
    assert_written_off(engine, row)


def test_a_unit_that_stalls_beside_decode_is_written_off(engine: Engine, stalls_soon: float) -> None:
    run_too_long(engine, stalls_soon)
    row = engine.step(MOST)
    assert row.window_ms == 0.0
    assert_written_off(engine, row)


def test_a_unit_that_stalls_in_a_window_is_written_off(engine: Engine, stalls_soon: float) -> None:
    engine.policy.idle_share = ALONE
    engine.attach()
    engine.begin()
    assert_written_off(engine, engine.step(ALONE, exclusive_ms=50.0))


def test_a_unit_that_ends_after_all_is_not_written_off(engine: Engine, stalls_soon: float) -> None:
    """Its process was paused, so that the unit and whoever watches it go on at the same moment."""
    units = run_too_long(engine, stalls_soon)
    threading.Timer(0.05, units.end).start()
    engine.step(MOST)
    assert engine.session.failure == ""


def test_a_unit_is_judged_by_its_own_age(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long ago the unit before it began."""
    monkeypatch.setattr(session_module, "STALL_S", 0.5)
    engine.policy.idle_share = ALONE
    units = engine.attach()
    engine.begin()
    engine.step(HALF)
    units.entered()
    engine.step(ALONE)
    units.end()
    time.sleep(0.6)
    window = threading.Thread(target=lambda: engine.start_step(ALONE, 100.0), daemon=True)
    window.start()
    units.entered()
    time.sleep(0.15)  # overruns the window
    units.end()
    window.join(PATIENCE_S)
    assert engine.session.failure == ""
    engine.end_step()
    engine.step(HALF)
    units.entered()
    engine.step(HALF)
    assert engine.session.failure == ""


def test_the_next_job_starts_after_a_stalled_one(engine: Engine, stalls_soon: float) -> None:
    first = engine.attach()
    engine.begin()
    first.entered()
    engine.session.request_arrived()
    engine.step(HALF)
    assert engine.session.failure
    engine.units = Units(engine.session.new_gate())
    engine.attach()
    assert engine.session.failure == ""
    engine.session.idle()
    assert engine.units.entered() == 4
    first._end.release()
