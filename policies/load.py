"""What the look-ahead has to know of decode's load, estimated from the steps as they go by."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

from harli.types import DecodeState

MEMORY_S = 120.0
"""The present arrival rate is that of about this long."""
MEMORY_REQUESTS = 200.0
"""The present output length is that of about this many requests: it drifts, and idling says nothing about it."""
FIRST_LATE = 10.0
"""Prior of ``lateness``: as if this many late tokens had been expected, and as many had come."""
STALL = 5.0
"""A step that takes longer than this many planned ones is a stall, and counts as so many."""
LEAST_MS = 1e-6
"""What the times of steps are at least, however long ago: a day without any leaves nothing of them."""
FOLD_S = 0.25
BURST_S = 2.0
"""About as long as a request stays: bursts matter that come faster than requests leave."""
MOST_DISPERSED = 30.0
FIRST_RATE = 0.5
"""Prior of requests per second."""
FIRST_S = 1.0
"""The prior of the rate counts like this many seconds of having seen it."""
FIRST_OUTPUT = 200.0
"""Prior of output tokens per request."""
FIRST_SINGLE = 10.0
"""Prior of the dispersion: as if this many requests had come one by one."""


@dataclass(frozen=True, slots=True)
class Load:
    """Decode's load as one set of numbers."""

    arrivals_per_s: float
    dispersion: float
    """Variance over mean of the arrivals in ``BURST_S``: 1 when each comes by itself, more when they come in bursts."""
    leaving: float
    """Probability that a request ends with the step: one over the mean output length in tokens."""
    context: float
    """KV tokens of a request."""
    capacity: int
    """Requests that fit into a step, by number and by KV blocks."""
    stretch: float
    """Time that steps take over what was planned for: admissions, prefill, what a prediction misses."""
    lateness: float
    """Tokens that came late with decode alone, over those that were expected to."""

    def differs(self, other: Load, by: float) -> bool:
        """Whether a number has moved by more than the fraction ``by``."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return any(abs(mine - theirs) > by * abs(theirs) for mine, theirs in pairs)


class LoadMeter:
    """Sums that forget. A step adds whole numbers; they are folded into the sums every ``FOLD_S``."""

    def __init__(self, max_batch: int) -> None:
        self._max_batch = max_batch
        self._now_s = self._fold_s = self._begin_s = math.nan
        self._last_batch = self._last_waiting = 0
        self._came = self._left = self._request_steps = self._batches = self._contexts = 0
        """Since the last fold."""
        self._seconds, self._arrivals = FIRST_S, FIRST_S * FIRST_RATE
        self._bursts = _Bursts()
        self._lived, self._departures = FIRST_OUTPUT, 1.0
        self._requests = self._context = self._blocks = self._block_requests = 0.0
        self._blocks_total = 0
        self._planned_ms = self._actual_ms = 1.0
        self._expected_late = self._late = 0.0

    def step(self, decode: DecodeState) -> None:
        """The step that begins now."""
        batch, waiting, admitted, now_s = decode.batch, decode.waiting, decode.admitted, decode.time_s
        if not now_s < self._fold_s + FOLD_S:
            if self._fold_s != self._fold_s:  # the first step: what runs already is no arrival
                self._begin_s = self._fold_s = now_s
                self._last_batch, self._last_waiting = batch - admitted, waiting
            self._fold(decode)
        self._came += admitted + waiting - self._last_waiting
        self._left += self._last_batch + admitted - batch  # less when one is passed over: it evens out
        self._request_steps += self._last_batch
        self._batches += batch
        self._contexts += decode.context_sum
        self._now_s, self._last_batch, self._last_waiting = now_s, batch, waiting

    @property
    def now_s(self) -> float:
        """The time of the last step."""
        return self._now_s

    def took(self, planned_ms: float, actual_ms: float) -> None:
        """A step took ``actual_ms`` where the plan had ``planned_ms``."""
        self._planned_ms += planned_ms
        self._actual_ms += min(actual_ms, STALL * planned_ms)

    def late(self, expected: float, late: int) -> None:
        """As many tokens of a step with decode alone came late, where the plan expected ``expected``."""
        self._expected_late += expected
        self._late += late

    def load(self) -> Load:
        """The numbers as they are now."""
        capacity = float(self._max_batch)
        if self._blocks > 0.0:
            capacity = min(capacity, self._blocks_total * self._block_requests / self._blocks)
        departures, lived = self._departures + self._left, self._lived + self._request_steps
        return Load(
            arrivals_per_s=max(self._arrivals / self._seconds, 1e-2),
            dispersion=self._bursts.dispersion(),
            leaving=min(max(departures, 1e-3) / max(lived, 1.0), 0.5),
            context=(self._context + self._contexts) / max(self._requests + self._batches, 1e-9),
            capacity=max(round(capacity), 1),
            stretch=min(max(self._actual_ms / self._planned_ms, 0.5), 3.0),
            lateness=min((self._late + FIRST_LATE) / (self._expected_late + FIRST_LATE), 3.0),
        )

    def _fold(self, decode: DecodeState) -> None:
        kept = math.exp(min(0.0, self._fold_s - decode.time_s) / MEMORY_S)
        if decode.time_s > self._begin_s + BURST_S:  # the first burst says nothing about how often they come
            self._seconds = self._seconds * kept + MEMORY_S * (1.0 - kept)
            self._arrivals = self._arrivals * kept + self._came
        self._bursts.came(self._came, decode.time_s)
        remembered = 1.0 - min(max(self._left, 0) / MEMORY_REQUESTS, 1.0)
        self._departures = self._departures * remembered + self._left
        self._lived = self._lived * remembered + self._request_steps
        self._requests = self._requests * kept + self._batches
        self._context = self._context * kept + self._contexts
        self._blocks_total = decode.kv_blocks_total
        used = decode.kv_blocks_total - decode.kv_blocks_free - decode.kv_blocks_lent
        self._blocks = self._blocks * kept + used
        self._block_requests = self._block_requests * kept + decode.batch
        self._planned_ms = max(self._planned_ms * kept, LEAST_MS)
        self._actual_ms = max(self._actual_ms * kept, LEAST_MS)
        self._expected_late *= kept
        self._late *= kept
        self._came = self._left = self._request_steps = self._batches = self._contexts = 0
        self._fold_s = decode.time_s


class _Bursts:
    """How unevenly arrivals are spread over spans of ``BURST_S``, of the last ``MEMORY_S``."""

    def __init__(self) -> None:
        self._begin_s = math.nan
        self._count = 0
        self._spans = self._sum = self._squares = 0.0

    def came(self, arrivals: int, now_s: float) -> None:
        """``arrivals`` since the call before."""
        if not now_s < self._begin_s + BURST_S:
            passed = (now_s - self._begin_s) // BURST_S if self._begin_s == self._begin_s else 0.0
            if passed:  # one span with what has come, then others without anything
                self._forget(1.0)
                self._sum += self._count
                self._squares += self._count**2
                self._forget(passed - 1.0)
            self._begin_s = self._begin_s + passed * BURST_S if passed else now_s
            self._count = 0
        self._count += arrivals

    def _forget(self, spans: float) -> None:
        kept = math.exp(-spans * BURST_S / MEMORY_S)
        self._spans = min(self._spans * kept + spans, MEMORY_S / BURST_S)
        self._sum *= kept
        self._squares *= kept

    def dispersion(self) -> float:
        """Variance over mean."""
        if not self._sum > 0.0:
            return 1.0
        excess = self._squares - self._sum**2 / self._spans - self._sum
        return min(1.0 + max(0.0, excess) / (self._sum + FIRST_SINGLE), MOST_DISPERSED)
