"""The gate: who may run when, and that nobody waits for ever."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from harli.compute.gate import Gate

UNITS = 4
PATIENCE_S = 20.0
"""After this long something hangs."""
A_WHILE_S = 0.05
LONG_MS = 3e3 * PATIENCE_S


class Finetuning(threading.Thread):
    """Enters with the expected times it is given, and stays inside until it is told to leave."""

    def __init__(self, gate: Gate) -> None:
        super().__init__(daemon=True)
        self._gate = gate
        self._expected_ms: queue.Queue[float] = queue.Queue()
        self._entered: queue.Queue[int] = queue.Queue()
        self._leave = threading.Semaphore(0)
        self.start()

    def run(self) -> None:
        units = UNITS
        while units:
            units = self._gate.enter(self._expected_ms.get())
            self._entered.put(units)
            if units:
                self._leave.acquire()
                self._gate.leave()

    def ask(self, expected_ms: float = 0.0, count: int = 1) -> None:
        """Ask to enter ``count`` times, one after the other."""
        for _ in range(count):
            self._expected_ms.put(expected_ms)

    def leave(self, count: int = 1) -> None:
        self._leave.release(count)

    def entered(self) -> int:
        """The compute units it was let in with, once it is."""
        return self._entered.get(timeout=PATIENCE_S)

    def stays_out(self) -> bool:
        try:
            self._entered.get(timeout=A_WHILE_S)
        except queue.Empty:
            return True
        return False


class Call(threading.Thread):
    """A call in a thread of its own."""

    def __init__(self, function: Callable[[], bool]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self.start()

    def run(self) -> None:
        self._returned = self._function()

    def still_runs(self) -> bool:
        self.join(A_WHILE_S)
        return self.is_alive()

    def result(self) -> bool:
        self.join(PATIENCE_S)
        assert not self.is_alive(), "it hangs"
        return self._returned


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate(UNITS)
    yield gate
    gate.close()


@pytest.fixture
def finetuning(gate: Gate) -> Iterator[Finetuning]:
    thread = Finetuning(gate)
    yield thread
    gate.close()
    thread.leave()
    thread.ask()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_a_unit_waits_until_units_are_allowed(gate: Gate, finetuning: Finetuning) -> None:
    finetuning.ask()
    assert finetuning.stays_out()
    gate.allow(3)
    assert finetuning.entered() == 3
    assert gate.free == 1


def test_a_running_unit_keeps_its_units(gate: Gate, finetuning: Finetuning) -> None:
    gate.allow(3)
    finetuning.ask(count=2)
    assert finetuning.entered() == 3
    gate.allow(1)
    assert gate.free == 1
    finetuning.leave()
    assert finetuning.entered() == 1
    assert gate.free == 3


def test_with_nothing_allowed_no_further_unit_starts(gate: Gate, finetuning: Finetuning) -> None:
    gate.allow(2)
    finetuning.ask(count=2)
    finetuning.entered()
    gate.allow(0)
    finetuning.leave()
    assert finetuning.stays_out()
    assert gate.free == UNITS


def test_wait_free_waits_only_for_a_unit_that_holds_everything(gate: Gate, finetuning: Finetuning) -> None:
    gate.allow(3)
    finetuning.ask(count=2)
    finetuning.entered()
    assert gate.wait_free(0.0)
    gate.allow(UNITS)
    finetuning.leave()
    assert finetuning.entered() == UNITS
    assert not gate.wait_free(0.01)
    waiting = Call(lambda: gate.wait_free(PATIENCE_S))
    assert waiting.still_runs()
    finetuning.leave()
    assert waiting.result()


def test_held_s_counts_from_the_units_own_beginning(gate: Gate, finetuning: Finetuning) -> None:
    assert gate.held_s == 0.0
    time.sleep(A_WHILE_S)
    before = time.monotonic()
    gate.allow(1)
    finetuning.ask()
    finetuning.entered()
    first = gate.held_s
    assert 0.0 <= first <= time.monotonic() - before
    assert gate.held_s > first
    finetuning.leave()
    assert gate.wait_free(PATIENCE_S)
    while gate.free < UNITS:
        time.sleep(0.001)
    assert gate.held_s == 0.0


def test_a_window_gives_the_whole_device_and_then_nothing(gate: Gate, finetuning: Finetuning) -> None:
    gate.allow(1)
    finetuning.ask()
    assert finetuning.entered() == 1
    window = Call(lambda: gate.window(LONG_MS, PATIENCE_S))
    assert window.still_runs()
    finetuning.ask()
    finetuning.leave()
    assert finetuning.entered() == UNITS
    finetuning.leave()
    assert window.still_runs()  # another unit may come
    finetuning.ask(expected_ms=2 * LONG_MS)
    assert window.result()
    assert gate.free == UNITS
    assert finetuning.stays_out()
    gate.allow(2)
    assert finetuning.entered() == 2  # what did not fit a window is free to start beside decode


def test_a_window_starts_a_unit_that_was_waiting(gate: Gate, finetuning: Finetuning) -> None:
    finetuning.ask()
    assert finetuning.stays_out()
    window = Call(lambda: gate.window(LONG_MS, PATIENCE_S))
    assert finetuning.entered() == UNITS
    assert window.still_runs()
    finetuning.leave()
    gate.close()
    assert window.result()


def test_a_window_starts_only_units_that_fit_and_ends_when_none_does(gate: Gate, finetuning: Finetuning) -> None:
    finetuning.ask(expected_ms=2 * LONG_MS)
    assert Call(lambda: gate.window(LONG_MS, 0.0)).result()
    assert finetuning.stays_out()


def test_an_arrival_ends_a_window_after_the_running_unit() -> None:
    arrived = threading.Event()
    gate = Gate(UNITS, arrived.is_set)
    finetuning = Finetuning(gate)
    finetuning.ask(count=3)
    window = Call(lambda: gate.window(LONG_MS, PATIENCE_S))
    assert finetuning.entered() == UNITS
    finetuning.leave()
    assert finetuning.entered() == UNITS
    arrived.set()
    assert window.still_runs()
    finetuning.leave()
    assert window.result()
    assert finetuning.stays_out()
    gate.close()


def test_an_arrival_does_not_keep_units_from_running_beside_decode() -> None:
    gate = Gate(UNITS, lambda: True)
    finetuning = Finetuning(gate)
    gate.allow(1)
    finetuning.ask()
    assert finetuning.entered() == 1
    gate.close()


def test_a_window_waits_for_a_unit_that_overruns_it(gate: Gate, finetuning: Finetuning) -> None:
    finetuning.ask(count=2)
    window = Call(lambda: gate.window(500.0, PATIENCE_S))
    assert finetuning.entered() == UNITS
    time.sleep(0.5)
    assert window.still_runs()
    finetuning.leave()
    assert window.result()
    assert gate.free == UNITS
    assert finetuning.stays_out()


def test_a_window_gives_up_on_a_unit_after_its_timeout(gate: Gate, finetuning: Finetuning) -> None:
    gate.allow(1)
    finetuning.ask(count=2)
    finetuning.entered()
    assert not gate.window(1.0, 0.01)
    assert gate.free == UNITS - 1
    finetuning.leave()
    assert finetuning.stays_out()


def test_a_window_with_nothing_to_run_ends_with_its_time(gate: Gate) -> None:
    assert gate.window(1.0, 0.0)
    gate.allow(1)
    assert gate.enter(0.0) == 1  # with the share of after the window, not the window's


def test_close_releases_a_waiting_thread_and_lets_nobody_in(gate: Gate, finetuning: Finetuning) -> None:
    finetuning.ask()
    assert finetuning.stays_out()
    gate.close()
    assert finetuning.entered() == 0
    gate.allow(UNITS)
    assert gate.enter(0.0) == 0


def test_close_ends_a_window(gate: Gate) -> None:
    window = Call(lambda: gate.window(LONG_MS, 0.0))
    assert window.still_runs()
    gate.close()
    assert window.result()


def test_a_wait_that_is_called_off_ends_and_another_may_follow(gate: Gate) -> None:
    called_off = threading.Event()
    answers: queue.Queue[int | None] = queue.Queue()
    thread = threading.Thread(target=lambda: answers.put(gate.enter(0.0, called_off.is_set)), daemon=True)
    thread.start()
    gate.wake()
    assert answers.empty()
    called_off.set()
    gate.wake()
    assert answers.get(timeout=PATIENCE_S) is None
    assert gate.free == UNITS
    gate.allow(UNITS)
    assert gate.enter(0.0, called_off.is_set) is None
    assert gate.enter(0.0) == UNITS
