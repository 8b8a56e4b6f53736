"""A request in the simulated engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from harli.rows import RequestRecord
from harli.workload.base import Request

BLOCK_TOKENS = 16


def blocks(tokens: int) -> int:
    """KV blocks that ``tokens`` take."""
    return -(-tokens // BLOCK_TOKENS)


class Served:
    """A request in the engine."""

    __slots__ = ("computed", "first_token_s", "index", "produced", "request", "scheduled_s", "since", "spans", "ticket")

    def __init__(self, index: int, request: Request) -> None:
        self.index = index
        """Its place in the workload."""
        self.request = request
        self.computed = 0
        """Tokens in the KV cache, and output tokens: as of step ``since`` once it decodes, one more each per step."""
        self.produced = 0
        self.since = 0
        self.ticket = 0
        """Tells its stays in the batch apart; 0 unless it decodes."""
        self.spans: list[tuple[int, int]] = []
        """First and last step of each stretch of output tokens; more than one if it was preempted."""
        self.scheduled_s = math.nan
        self.first_token_s = math.nan

    def record(self, step_ends_s: Sequence[float]) -> RequestRecord:
        """The request, finished, as a client saw it: a token is there when its step ends."""
        arrival_s = self.request.arrival_s
        times_s = [end_s for first, last in self.spans for end_s in step_ends_s[first : last + 1]]
        return self.request.record(
            f"simulated-{self.index}",
            ttft_ms=(times_s[0] - arrival_s) * 1e3,
            itl_ms=tuple([(later - earlier) * 1e3 for earlier, later in pairwise(times_s)]),
            queue_wait_ms=(self.scheduled_s - arrival_s) * 1e3,
            finished_s=times_s[-1],
        )
