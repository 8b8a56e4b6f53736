"""The scheduler hook: sees the queue, asks for a decision, and sends it along with the step."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from harli.engine.arrivals import ARRIVALS
from harli.engine.decode_state import DecodeTracker
from harli.runtime import session

DECISION = "harli_decision"
"""Attribute of a SchedulerOutput that carries the decision to the worker."""


class _Scheduling:
    """Mixin over vLLM's scheduler; its methods add to vLLM's and change nothing of what is scheduled."""

    requests: dict[str, Any]
    running: list[Any]
    waiting: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._session = session.current()
        self._tracker: DecodeTracker | None = None
        self._run = 0
        self._found_arrivals = False

    def add_request(self, request: Any) -> None:
        super().add_request(request)  # type: ignore[misc]
        self._session.request_arrived()

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if not self._found_arrivals:  # the engine is complete by the first step
            self._found_arrivals = True
            ARRIVALS.find(self)
        output: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
        tracker = self._tracker_of_run()
        if tracker is not None:
            if output.total_num_scheduled_tokens:
                setattr(output, DECISION, self._session.decide(lambda: tracker.scheduled(output)))
            else:
                tracker.finished(output)
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        if scheduler_output.total_num_scheduled_tokens and self._tracker is not None:
            self._tracker.stepped()
            self._session.observe()
        if not self.running and not self.waiting:
            self._session.idle()
        return outputs

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        if self._tracker is not None:
            self._tracker.left(request.request_id)
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]

    def _tracker_of_run(self) -> DecodeTracker | None:
        """A tracker for the present run; none while hooks are off, and a fresh one when they are on again."""
        if not self._session.active:
            self._tracker = None
        elif self._tracker is None or self._run != self._session.run:
            self._run = self._session.run
            self._tracker = DecodeTracker(self, self._session.slo.tpot_ms)
        return self._tracker


class HarliScheduler(_Scheduling, Scheduler):  # type: ignore[misc]
    """For synchronous scheduling (CPU)."""


class HarliAsyncScheduler(_Scheduling, AsyncScheduler):  # type: ignore[misc]
    """For asynchronous scheduling (CUDA)."""
