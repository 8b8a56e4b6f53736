"""Step times on the host's clock, and from events of a device that runs behind."""

from __future__ import annotations

import math
import time

import pytest

from harli.compute.cuda_timing import EventTimer
from harli.compute.timing import StepTime, StepTimer, WallTimer
from tests.compute.gpu import Cuda


def test_the_hosts_clock() -> None:
    timer = WallTimer()
    spans = []
    for _ in range(3):
        before = time.perf_counter()
        timer.begin()
        time.sleep(0.002)
        timer.end()
        spans.append((time.perf_counter() - before) * 1e3)
    times = [timer.take() for _ in range(3)]
    assert all(time is not None and 2.0 <= time.latency_ms <= span for time, span in zip(times, spans, strict=True))
    assert [time is not None and math.isnan(time.gap_ms) for time in times] == [True, False, False]
    assert all(time is not None and time.gap_ms >= time.latency_ms for time in times[1:])
    assert timer.take() is None


def test_times_come_when_the_device_has_passed_the_step() -> None:
    cuda = Cuda(132)
    timer = EventTimer(cuda)
    for began, ended in ((0.0, 10.0), (10.5, 22.0)):  # both are submitted before the first has ended
        cuda.submitted_ms = began
        timer.begin()
        cuda.submitted_ms = ended
        timer.end()
    assert timer.take() is None
    cuda.reached_ms = 21.0
    first = timer.take()
    assert first is not None
    assert first.latency_ms == 10.0
    assert math.isnan(first.gap_ms)
    assert timer.take() is None
    cuda.reached_ms = 22.0
    assert timer.take() == StepTime(11.5, 12.0)


def test_events_are_used_again() -> None:
    cuda = Cuda(132)
    timer = EventTimer(cuda)
    times = []
    for step in range(50):
        cuda.submitted_ms = 10.0 * step
        timer.begin()
        cuda.submitted_ms += 8.0
        timer.end()
        cuda.reached_ms = 10.0 * step - 1.0  # one step behind
        times.append(timer.take())
    assert times[0] is None
    assert times[2:] == [StepTime(8.0, 10.0)] * 48
    assert len(cuda.events) < 10


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_after_a_pause_there_is_no_gap(device: str) -> None:
    timer: StepTimer = WallTimer() if device == "cpu" else EventTimer(Cuda(132))
    gaps = []
    for step in range(4):
        if step == 2:
            timer.interrupt()
        timer.begin()
        timer.end()
        time = timer.take()
        assert time is not None
        gaps.append(math.isnan(time.gap_ms))
    assert gaps == [True, False, True, False]
