"""The scheduler hook: sees the queue, asks for a decision, and sends it along with the step."""

from __future__ import annotations

import logging
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from harli.engine.arrivals import ARRIVALS
from harli.engine.decode_state import DecodeTracker
from harli.engine.support import why_not_lent
from harli.memory.lender import Lender
from harli.runtime import session

LOG = logging.getLogger("vllm.harli")  # the engine's log, whose warnings a user is shown
DECISION = "harli_decision"
"""Attribute of a SchedulerOutput that carries the decision to the worker."""


class _Scheduling:
    """Mixin over vLLM's scheduler; its methods add to vLLM's and change nothing of what is scheduled."""

    requests: dict[str, Any]
    running: list[Any]
    waiting: Any
    kv_cache_manager: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._session = session.current()
        self._tracker: DecodeTracker | None = None
        self._run = 0
        self._found_arrivals = False
        self._in_flight = 0
        """Steps that are scheduled and have no output yet; with asynchronous scheduling there may be two."""
        if reason := why_not_lent(self.kv_cache_manager.kv_cache_config):
            LOG.warning("the KV cache is not lent to finetuning: %s", reason)
        else:
            self._session.lender = Lender(self)

    @property
    def _lender(self) -> Lender | None:
        """The lender, if anything is lent to a job or is to be."""
        lender = self._session.lender
        return lender if lender is not None and lender.loan is not None else None

    def add_request(self, request: Any) -> None:
        super().add_request(request)  # type: ignore[misc]
        self._session.request_arrived()
        if (lender := self._lender) is not None:
            lender.arrived(request.num_tokens)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if not self._found_arrivals:  # the engine is complete by the first step
            self._found_arrivals = True
            ARRIVALS.find(self)
        lender = self._lender
        if lender is not None:
            lender.before_step(self._session.borrows)
        output: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
        if output.total_num_scheduled_tokens:
            self._in_flight += 1
        tracker = self._tracker_of_run()
        if tracker is not None:
            tracker.state.kv_blocks_lent = lender.owned if lender is not None else 0
            if output.total_num_scheduled_tokens:
                setattr(output, DECISION, self._session.decide(lambda: tracker.scheduled(output)))
            else:
                tracker.finished(output)
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        if scheduler_output.total_num_scheduled_tokens:
            self._in_flight -= 1
            if self._tracker is not None:
                self._tracker.stepped()
            self._session.observe()
        if not self.running and not self.waiting and not self._in_flight:
            self._session.idle()
        return outputs

    def get_kv_cache_usage(self) -> float:
        usage: float = self.kv_cache_manager.usage  # vLLM 0.26 has no such method, and later ones do this
        if (lender := self._lender) is not None:
            usage -= lender.owned / (self.kv_cache_manager.block_pool.num_gpu_blocks - 1)
        return usage

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)  # type: ignore[misc]
        if stats is not None and self._lender is not None:
            stats.kv_cache_usage = self.get_kv_cache_usage()
        return stats

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        if (lender := self._lender) is not None:
            lender.give_back()
        reset: bool = super().reset_prefix_cache(*args, **kwargs)  # type: ignore[misc]
        return reset

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
