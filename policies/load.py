"""What the look-ahead has to know of decode's load, estimated from the steps as they go by."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

from harli.types import DecodeState

MEMORY_S = 60.0
"""The present arrival rate is that of about this long."""
MEMORY_REQUESTS = 200.0
"""The present output length is that of about this many requests: it drifts, and idling says nothing about it."""
FIRST_RATE, FIRST_S, FIRST_OUTPUT = 0.5, 1.0, 200.0
"""Requests per second, and how many seconds of having seen that count, and output tokens, to begin with."""


@dataclass(frozen=True, slots=True)
class Load:
    """Decode's load as one set of numbers."""

    arrivals_per_s: float
    leaving: float
    """Probability that a request ends with the step: one over the mean output length in tokens."""
    context: float
    """KV tokens of a request."""
    capacity: int
    """Requests that fit into a step, by number and by KV blocks."""
    stretch: float
    """Time that steps take over what was planned for: admissions, prefill, what a prediction misses."""

    def differs(self, other: Load, by: float) -> bool:
        """Whether a number has moved by more than the fraction ``by``."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return any(abs(mine - theirs) > by * abs(theirs) for mine, theirs in pairs)


class LoadMeter:
    """Sums that forget, a few microseconds a step."""

    def __init__(self, max_batch: int) -> None:
        self._max_batch = max_batch
        self._last_s = math.nan
        self._last_batch = self._last_waiting = 0
        self._seconds, self._arrivals = FIRST_S, FIRST_S * FIRST_RATE
        self._request_steps, self._departures = FIRST_OUTPUT, 1.0
        self._requests = self._context = self._blocks = 0.0
        self._blocks_total = 0
        self._planned_ms = self._actual_ms = 1.0

    def step(self, decode: DecodeState) -> None:
        """The step that begins now."""
        batch, waiting, admitted = decode.batch, decode.waiting, decode.admitted
        if self._last_s != self._last_s:  # the first step: what runs already is no arrival
            self._last_s, self._last_batch, self._last_waiting = decode.time_s, batch - admitted, waiting
        kept = math.exp(min(0.0, self._last_s - decode.time_s) / MEMORY_S)
        self._seconds = self._seconds * kept + MEMORY_S * (1.0 - kept)
        self._arrivals = self._arrivals * kept + admitted + waiting - self._last_waiting
        left = self._last_batch + admitted - batch  # negative when one that was passed over is back: it evens out
        remembered = 1.0 - min(max(left, 0) / MEMORY_REQUESTS, 1.0)
        self._departures = self._departures * remembered + left
        self._request_steps = self._request_steps * remembered + self._last_batch
        self._requests = self._requests * kept + batch
        self._context = self._context * kept + decode.context_sum
        self._blocks_total = decode.kv_blocks_total
        self._blocks = self._blocks * kept + self._blocks_total - decode.kv_blocks_free - decode.kv_blocks_lent
        self._planned_ms *= kept
        self._actual_ms *= kept
        self._last_s, self._last_batch, self._last_waiting = decode.time_s, batch, waiting

    @property
    def now_s(self) -> float:
        """The time of the last step."""
        return self._last_s

    def took(self, planned_ms: float, actual_ms: float) -> None:
        """A step took ``actual_ms`` where the plan had ``planned_ms``; a stall counts as at most five such steps."""
        self._planned_ms += planned_ms
        self._actual_ms += min(actual_ms, 5.0 * planned_ms)

    def load(self) -> Load:
        """The numbers as they are now."""
        capacity = float(self._max_batch)
        if self._blocks > 0.0:
            capacity = min(capacity, self._blocks_total * self._requests / self._blocks)
        return Load(
            arrivals_per_s=max(self._arrivals / self._seconds, 1e-2),
            leaving=min(max(self._departures, 1e-3) / max(self._request_steps, 1.0), 0.5),
            context=self._context / max(self._requests, 1e-9),
            capacity=max(round(capacity), 1),
            stretch=min(max(self._actual_ms / self._planned_ms, 0.5), 3.0),
        )
