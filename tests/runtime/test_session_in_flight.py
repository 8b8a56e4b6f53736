"""Two steps in flight: the next one is decided, begun and ended before the one before it is observed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from harli.compute.cuda_timing import EventTimer
from harli.compute.timing import StepTimer
from harli.rows import StepRecord
from harli.types import Share
from tests.compute.gpu import Cuda
from tests.runtime.stand_ins import ALONE, HALF, LITTLE, MOST, Engine, RecordingPartitioner


class Behind(RecordingPartitioner):
    """Its device is behind the host."""

    def __init__(self) -> None:
        super().__init__()
        self.cuda = Cuda(4)
        self.drained: list[float] = []

    def timer(self) -> StepTimer:
        return EventTimer(self.cuda)

    def wait_decode(self) -> None:
        self.cuda.reached_ms = self.cuda.submitted_ms
        self.drained.append(self.cuda.reached_ms)


class Pipeline:
    """Plays an engine with asynchronous scheduling; a step takes 10 ms of the device."""

    def __init__(self) -> None:
        self.partitioner = Behind()
        self.engine = Engine(self.partitioner)
        self.engine.policy.idle_share = ALONE

    def submit(self, share: Share, exclusive_ms: float = 0.0) -> None:
        self.engine.start_step(share, exclusive_ms)
        self.partitioner.cuda.submitted_ms += 10.0
        self.engine.session.end_step()

    def output(self, reached_ms: float) -> list[StepRecord]:
        """The host learns that the device is there; the rows it writes down."""
        self.partitioner.cuda.reached_ms = reached_ms
        before = len(self.engine.controller.rows)
        self.engine.session.observe()
        return list(self.engine.controller.rows)[before:]


@pytest.fixture
def pipeline() -> Iterator[Pipeline]:
    pipeline = Pipeline()
    yield pipeline
    pipeline.engine.session.gate.close()
    pipeline.engine.units._end.release(1000)


def test_each_row_has_its_own_decision_state_and_times(pipeline: Pipeline) -> None:
    pipeline.engine.begin()
    pipeline.submit(ALONE)
    pipeline.submit(HALF)
    (first,) = pipeline.output(10.0)
    pipeline.submit(MOST)
    (second,) = pipeline.output(20.0)
    (third,) = pipeline.output(30.0)
    assert [row.step for row in (first, second, third)] == [1, 2, 3]
    assert [row.wanted_finetune for row in (first, second, third)] == [0, 2, 3]
    assert [row.decode_units for row in (first, second, third)] == [4, 2, 1]
    assert [row.latency_ms for row in (first, second, third)] == [10.0] * 3
    assert math.isnan(first.gap_ms)
    assert [second.gap_ms, third.gap_ms] == [10.0, 10.0]


def test_a_step_that_the_device_has_not_ended_is_written_down_later(pipeline: Pipeline) -> None:
    pipeline.engine.begin()
    pipeline.submit(ALONE)
    pipeline.submit(ALONE)
    assert pipeline.output(9.0) == []
    assert [row.step for row in pipeline.output(20.0)] == [1, 2]


def test_finetuning_gets_more_only_when_the_step_in_flight_has_freed_it(pipeline: Pipeline) -> None:
    pipeline.engine.begin()
    units = pipeline.engine.attach()
    pipeline.submit(LITTLE)
    assert units.entered() == 1
    pipeline.submit(MOST)
    units.end()
    assert units.entered() == 1
    units.end()
    units.entered()
    pipeline.output(10.0)
    units.end()
    assert units.entered() == 3


def test_a_paused_job_gets_nothing_when_a_step_ends(pipeline: Pipeline) -> None:
    pipeline.engine.begin()
    pipeline.engine.attach()
    pipeline.submit(ALONE)
    pipeline.submit(HALF)
    pipeline.engine.session.pause(True)
    pipeline.output(10.0)
    assert pipeline.engine.session.gate.allowed == 0


def test_a_window_begins_when_decode_has_stopped(pipeline: Pipeline) -> None:
    pipeline.engine.begin()
    units = pipeline.engine.attach()
    pipeline.submit(ALONE)
    assert pipeline.partitioner.drained == []
    units.state.ready = False
    pipeline.submit(ALONE, exclusive_ms=30.0)
    assert pipeline.partitioner.drained == []  # nobody would use it
    units.state.ready = True
    units._end.release(10**6)  # units end at once
    pipeline.submit(ALONE, exclusive_ms=30.0)
    assert pipeline.partitioner.drained == [20.0]


def test_a_run_that_begins_leaves_steps_in_flight_to_the_run_before(pipeline: Pipeline) -> None:
    pipeline.engine.begin()
    pipeline.submit(ALONE)
    before = pipeline.engine.controller
    other = Engine(pipeline.partitioner)
    pipeline.engine.session.begin(other.controller, pipeline.engine.session.slo, 0.0)
    assert pipeline.output(10.0) != []
    assert len(before.rows) == 1
    assert not other.controller.rows


def test_slack_is_counted_from_the_expected_end_of_the_step_in_flight(pipeline: Pipeline) -> None:
    pipeline.engine.begin()
    engine = pipeline.engine
    engine._state.slack_ms = 100.0
    pipeline.submit(ALONE)
    pipeline.submit(ALONE)
    (first,) = pipeline.output(10.0)
    assert first.slack_ms == 100.0
    engine._state.slack_ms = 100.0
    pipeline.submit(ALONE)
    pipeline.output(20.0)
    (third,) = pipeline.output(30.0)
    assert 90.0 <= third.slack_ms < 100.0  # a step of 10 ms has begun
