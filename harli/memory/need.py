"""How many free blocks requests will soon need: what must not be lent."""

from __future__ import annotations

import math

HORIZON_S = 2.0
"""Lending must not stand in the way of what comes within this time."""
MEMORY_S = 30.0
"""Time constant after which arrivals are forgotten."""
DEVIATIONS = 2.33
"""Standard deviations above the mean: 99% of a normal distribution."""


class Need:
    """Estimates demand from the arrivals and the step rate of late; constant time and memory."""

    def __init__(self, block_size: int) -> None:
        """``block_size``: tokens of a KV block."""
        self._block_size = block_size
        self._blocks = 0.0
        self._squares = 0.0
        self._seconds = 0.0
        self._steps = 0
        self._last_s = math.nan

    def arrived(self, tokens: int) -> None:
        """A request with a prompt of ``tokens`` has arrived."""
        blocks = tokens // self._block_size + 1
        self._blocks += blocks
        self._squares += blocks * blocks

    def stepped(self) -> None:
        """One more step is about to run."""
        self._steps += 1

    def within_horizon(self, now_s: float, running: int) -> int:
        """Blocks that admissions and ``running`` requests' growth will need within ``HORIZON_S``.

        Admissions as a compound Poisson process: with arrivals at a rate r and blocks B each, the mean
        is r E[B] and the variance r E[B^2] per second. Requests that finish meanwhile are not counted on.
        """
        elapsed_s = now_s - self._last_s if self._last_s < now_s else 0.0
        self._last_s = now_s
        kept = math.exp(-elapsed_s / MEMORY_S)
        self._seconds = self._seconds * kept + MEMORY_S * (1.0 - kept)
        steps_per_s = self._steps / elapsed_s if elapsed_s else 0.0
        self._steps = 0
        seconds = max(self._seconds, HORIZON_S)
        mean = self._blocks / seconds * HORIZON_S
        variance = self._squares / seconds * HORIZON_S
        self._blocks *= kept
        self._squares *= kept
        growth = running * (1.0 + steps_per_s * HORIZON_S / self._block_size)
        return math.ceil(mean + DEVIATIONS * math.sqrt(variance) + growth)
