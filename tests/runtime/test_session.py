"""The session: what the hooks do to the gate and the partitioner."""

from __future__ import annotations

import threading

import pytest

from harli.runtime import session as session_module
from tests.runtime.stand_ins import A_WHILE_S, ALONE, HALF, LITTLE, MOST, PATIENCE_S, Engine

# Beginning and idling


def test_nothing_happens_before_a_run_begins(engine: Engine) -> None:
    units = engine.attach()
    assert not engine.session.active
    engine.session.begin_step(None)
    engine.session.end_step()
    engine.session.observe()
    engine.session.idle()
    engine.session.request_arrived()
    assert units.stays_out()
    assert engine.partitioner.calls == []
    assert len(engine.controller.rows) == 0


def test_a_run_begins_idle_and_adopts_decodes_thread_once(engine: Engine) -> None:
    units = engine.attach()
    engine.begin()
    assert engine.session.active
    assert units.entered() == 4
    engine.begin()
    assert engine.partitioner.calls == ["adopt_decode"]
    assert engine.session.run == 2


def test_a_job_attached_while_idle_starts_at_once(engine: Engine) -> None:
    engine.policy.idle_share = HALF
    engine.begin()
    assert engine.attach().entered() == 2


def test_a_job_attached_during_decode_waits_for_the_policy(engine: Engine) -> None:
    engine.begin()
    engine.step(HALF)
    units = engine.attach()
    assert units.stays_out()
    engine.step(HALF)
    assert units.entered() == 2


def test_a_request_ends_idling_within_the_running_unit(engine: Engine) -> None:
    units = engine.attach()
    engine.begin()
    units.entered()
    engine.session.request_arrived()
    units.end()
    assert units.stays_out()
    row = engine.step(LITTLE)
    assert units.entered() == 1
    assert row.decode_units == 3


def test_a_request_that_arrives_during_decode_changes_nothing(engine: Engine) -> None:
    units = engine.attach()
    engine.policy.idle_share = ALONE
    engine.begin()
    engine.step(HALF)
    units.entered()
    engine.session.request_arrived()
    units.end()
    assert units.entered() == 2


def test_idling_again_gives_finetuning_the_device_again(engine: Engine) -> None:
    engine.begin()
    units = engine.attach()
    units.entered()
    engine.session.request_arrived()
    units.end()
    engine.step(ALONE)
    assert units.stays_out()
    engine.session.idle()
    assert units.entered() == 4


# Shares


def test_a_split_gives_each_side_its_part(engine: Engine) -> None:
    engine.policy.idle_share = ALONE
    units = engine.attach()
    engine.begin()
    row = engine.step(HALF)
    assert units.entered() == 2
    assert (row.wanted_finetune, row.decode_units, row.finetune_units) == (2, 2, 2)
    assert engine.partitioner.calls == ["adopt_decode", 2]


def test_decode_takes_what_is_free_while_a_unit_keeps_its_cores(engine: Engine) -> None:
    engine.policy.idle_share = ALONE
    units = engine.attach()
    engine.begin()
    engine.step(MOST)
    assert units.entered() == 3
    row = engine.step(ALONE)
    assert (row.wanted_finetune, row.decode_units, row.window_ms) == (0, 1, 0.0)
    row = engine.step(HALF)
    assert (row.wanted_finetune, row.decode_units) == (2, 1)
    units.end()
    assert units.entered() == 2
    row = engine.step(LITTLE)
    assert (row.decode_units, row.window_ms) == (2, 0.0)
    units.end()
    assert units.entered() == 1
    assert engine.step(LITTLE).decode_units == 3
    assert engine.partitioner.calls == ["adopt_decode", 1, 1, 1, 2, 3]


def test_a_step_waits_for_a_unit_only_when_it_holds_everything(engine: Engine) -> None:
    units = engine.attach()
    engine.begin()
    assert units.entered() == 4
    engine.session.request_arrived()
    step = engine.start_step_aside(LITTLE)
    step.join(A_WHILE_S)
    assert step.is_alive()
    assert engine.partitioner.calls == ["adopt_decode"]
    units.end()
    step.join(PATIENCE_S)
    assert not step.is_alive()
    assert units.entered() == 1
    row = engine.end_step()
    assert row.decode_units == 3
    assert row.window_ms >= A_WHILE_S * 1e3
    assert row.exclusive_ms == 0.0
    assert row.latency_ms < row.window_ms


def test_without_a_job_decode_has_its_share_and_never_waits(engine: Engine) -> None:
    engine.begin()
    row = engine.step(HALF, exclusive_ms=60_000.0)
    assert (row.decode_units, row.finetune_units, row.window_ms) == (2, 0, 0.0)


# Windows


def test_a_window_runs_units_on_the_whole_device_before_the_step(engine: Engine) -> None:
    engine.policy.idle_share = ALONE
    units = engine.attach()
    engine.begin()
    engine.step(ALONE)
    window = threading.Thread(target=lambda: engine.start_step(ALONE, 200.0), daemon=True)
    window.start()
    assert units.entered() == 4
    engine.arrived.set()
    units.end()
    window.join(PATIENCE_S)
    assert not window.is_alive()
    assert units.stays_out()
    row = engine.end_step()
    assert (row.exclusive_ms, row.decode_units) == (200.0, 4)
    assert row.window_ms > 0.0
    assert row.finetune_tokens == 10.0


def test_an_arrival_ends_a_window(engine: Engine) -> None:
    engine.policy.idle_share = ALONE
    units = engine.attach()
    engine.begin()
    engine.arrived.set()
    row = engine.step(ALONE, exclusive_ms=PATIENCE_S * 2e3)
    assert 0.0 < row.window_ms < row.exclusive_ms
    assert units.stays_out()


def test_there_is_no_window_when_there_is_nothing_to_train(engine: Engine) -> None:
    engine.policy.idle_share = ALONE
    engine.attach().state.ready = False
    engine.begin()
    assert engine.step(ALONE, exclusive_ms=PATIENCE_S * 2e3).window_ms == 0.0


# The process's session


def test_the_scheduler_needs_the_workers_session(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    monkeypatch.setattr(session_module, "_current", None)
    with pytest.raises(RuntimeError, match="worker_cls"):
        session_module.current()
    session_module.install(engine.session)
    assert session_module.current() is engine.session
