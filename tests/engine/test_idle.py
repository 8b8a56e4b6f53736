"""When decode counts as idle, with two steps in flight."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from harli.engine.scheduler import _Scheduling


class Session:
    """Counts how often decode was idle; no run has begun."""

    active = False
    lender = None

    def __init__(self) -> None:
        self.idled = 0

    def idle(self) -> None:
        self.idled += 1

    def observe(self) -> None:
        """No step was decided."""


class Engine:
    """Schedules as many tokens as it is told to."""

    def schedule(self, tokens: int) -> Any:
        return SimpleNamespace(total_num_scheduled_tokens=tokens)

    def update_from_output(self, output: Any) -> None:
        pass


class Scheduler(_Scheduling, Engine):
    def __init__(self) -> None:
        self._session: Any = Session()
        self._tracker, self._found_arrivals, self._in_flight = None, True, 0
        self.running, self.waiting = [], []


def test_decode_is_idle_when_nothing_runs_or_waits_and_no_step_is_in_flight() -> None:
    scheduler = Scheduler()
    scheduler.running = ["request"]
    outputs = [scheduler.schedule(1), scheduler.schedule(1)]
    scheduler.update_from_output(outputs[0])
    assert scheduler._session.idled == 0
    scheduler.running = []  # it has ended, and a step of it is on its way
    outputs.append(scheduler.schedule(0))  # tells the worker so
    scheduler.update_from_output(outputs[1])
    assert scheduler._session.idled == 1
    scheduler.update_from_output(outputs[2])
    assert scheduler._session.idled == 2


def test_decode_is_not_idle_while_a_step_of_an_ended_request_is_in_flight() -> None:
    scheduler = Scheduler()
    first, second = scheduler.schedule(1), scheduler.schedule(1)
    scheduler.update_from_output(first)
    assert scheduler._session.idled == 0
    scheduler.update_from_output(second)
    assert scheduler._session.idled == 1
