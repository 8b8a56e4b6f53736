"""Keeps a ``DecodeState`` up to date from vLLM's scheduler, without a loop over requests."""

from __future__ import annotations

import heapq
import math
import time
from typing import TYPE_CHECKING, Any

from harli.types import DecodeState

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler


ROOM = 64


class _Smallest:
    """The smallest value of a changing set: a heap whose removed entries are dropped when they surface.

    Later values are often smaller, so that some never do: they are dropped when they are more than the others.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []
        self._values: dict[str, float] = {}

    def add(self, key: str, value: float) -> None:
        self._values[key] = value
        if len(self._heap) > 2 * len(self._values) + ROOM:  # removed entries that never surfaced
            self._heap = [(value, key) for key, value in self._values.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (value, key))

    def discard(self, key: str) -> None:
        self._values.pop(key, None)

    def value(self) -> float:
        """Infinite when the set is empty."""
        while self._heap and self._values.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf


class DecodeTracker:
    """Follows the requests of one scheduler.

    A decoding request gains one token of context and one SLO of time per step, like all others, so
    which one is longest and which is tightest changes only when requests come and go: both are kept
    relative to the step counter. With asynchronous scheduling a step is scheduled before the one before it
    has its tokens; vLLM counts those as placeholders.
    """

    def __init__(self, scheduler: Scheduler, slo_tpot_ms: float | None) -> None:
        self.state = DecodeState()
        self._scheduler = scheduler
        self._slo_s = math.inf if slo_tpot_ms is None else slo_tpot_ms / 1e3
        self._steps = 0
        self._context_sum = 0
        self._requests: dict[str, Any] = {}
        self._joining: dict[str, Any] = {}
        self._first_token_s: dict[str, float] = {}
        self._longest = _Smallest()
        self._tightest = _Smallest()

    def scheduled(self, output: SchedulerOutput) -> DecodeState:
        """The state for the step that ``output`` schedules."""
        scheduler, tokens, state = self._scheduler, output.num_scheduled_tokens, self.state
        self.finished(output)
        new = [request.req_id for request in output.scheduled_new_reqs]
        new.extend(output.scheduled_cached_reqs.resumed_req_ids)
        if self._steps:
            self._context_sum += output.total_num_scheduled_tokens
            for key in new:
                self._context_sum -= tokens[key]  # counted with the request's computed tokens
                self._join(scheduler.requests[key])
        else:  # a tracker that starts in the middle
            for request in scheduler.running:
                self._join(request)
        self._steps += 1
        now = time.monotonic()
        longest, prefill, deadline = 0, 0, self._tightest.value() + self._slo_s * self._steps
        for key, request in self._joining.items():
            longest = max(longest, request.num_computed_tokens)
            count = tokens.get(key, 0)
            prefill += count if count > 1 else 0
            if key in self._first_token_s:  # it was preempted
                before = request.num_output_tokens + max(0, request.num_output_placeholders - 1)
                deadline = min(deadline, self._first_token_s[key] + self._slo_s * before)
        state.time_s = now
        state.step = self._steps
        state.batch = len(tokens)
        state.context_sum = self._context_sum
        state.context_max = max(longest, self._steps - _finite(self._longest.value(), self._steps))
        state.prefill_tokens = prefill
        state.admitted = len(new)
        state.waiting = len(scheduler.waiting)
        pool = scheduler.kv_cache_manager.block_pool
        state.kv_blocks_free = pool.get_num_free_blocks()
        state.kv_blocks_total = pool.num_gpu_blocks
        state.slack_ms = (deadline - now) * 1e3
        return state

    def stepped(self) -> None:
        """The step's tokens are there: requests whose next step yields one more start decoding."""
        if not self._joining:
            return
        now = time.monotonic()
        for key, request in list(self._joining.items()):
            tokens_out = request.num_output_tokens
            if tokens_out and request.num_computed_tokens >= request.num_tokens - 1:
                del self._joining[key]
                self._longest.add(key, self._steps - request.num_computed_tokens)
                if self._slo_s < math.inf:  # a request that began before the tracker counts as on time
                    first = self._first_token_s.setdefault(key, now - self._slo_s * (tokens_out - 1))
                    last = tokens_out - 1 + request.num_output_placeholders  # those are of a step in flight
                    self._tightest.add(key, first + self._slo_s * (last - self._steps))

    def finished(self, output: SchedulerOutput) -> None:
        """Forget the requests that finished since the step before."""
        for key in output.finished_req_ids:
            self._first_token_s.pop(key, None)
            self.left(key)

    def left(self, key: str) -> None:
        """The request has finished or is being preempted (before its computed tokens are reset)."""
        request = self._requests.pop(key, None)
        if request is not None:
            self._context_sum -= request.num_computed_tokens
            self._joining.pop(key, None)
            self._longest.discard(key)
            self._tightest.discard(key)

    def _join(self, request: Any) -> None:
        self._requests[request.request_id] = self._joining[request.request_id] = request
        self._context_sum += request.num_computed_tokens


def _finite(value: float, otherwise: int) -> int:
    return int(value) if value < math.inf else otherwise
