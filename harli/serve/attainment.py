"""How often decode keeps its objectives, as vLLM measures every token and request."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from harli.types import Slo

WINDOW_S = 60.0


class Counts(NamedTuple):
    """How many gaps (ITL) or requests (TPOT) there were, and how many of them were within the objective."""

    asked: int = 0
    attained: int = 0


class Window:
    """The counts of the last minute."""

    def __init__(self) -> None:
        self._parts: deque[tuple[float, Counts]] = deque()

    def add(self, now_s: float, counts: Counts) -> None:
        self._parts.append((now_s, counts))

    def counts(self, now_s: float) -> Counts:
        while self._parts and self._parts[0][0] <= now_s - WINDOW_S:
            self._parts.popleft()
        return Counts(*map(sum, zip(*(counts for _, counts in self._parts), strict=True))) if self._parts else Counts()

    def clear(self) -> None:
        self._parts.clear()


class LatencyCounter(AggregateStatLoggerBase):  # type: ignore[misc]
    """One of vLLM's statistics loggers: it sees each iteration of the engine in the server's process.

    ITL counts every gap between two tokens of a request; TPOT the mean gap of each request with two tokens or
    more, when it ends.
    """

    def __init__(self, slo: Slo) -> None:
        self.slo = slo
        self._itl = self._tpot = Counts()

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if iteration_stats is None:
            return
        if self.slo.itl_ms is not None and (gaps := iteration_stats.inter_token_latencies_iter):
            self._itl = _counted(self._itl, gaps, self.slo.itl_ms)
        if self.slo.tpot_ms is not None and (ended := iteration_stats.finished_requests):
            means = [request.mean_time_per_output_token for request in ended if request.num_generation_tokens > 1]
            self._tpot = _counted(self._tpot, means, self.slo.tpot_ms)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""

    def take(self) -> dict[str, Counts]:
        """The counts since the last call, of the objectives that there are: ``itl``, ``tpot``."""
        limits = {"itl": (self.slo.itl_ms, self._itl), "tpot": (self.slo.tpot_ms, self._tpot)}
        self._itl = self._tpot = Counts()
        return {name: counts for name, (limit_ms, counts) in limits.items() if limit_ms is not None}


def _counted(counts: Counts, seconds: list[float], limit_ms: float) -> Counts:
    limit_s = limit_ms / 1e3
    return Counts(counts.asked + len(seconds), counts.attained + sum(value <= limit_s for value in seconds))
