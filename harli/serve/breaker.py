"""The circuit breaker: finetuning is switched off while decode misses its objectives beside it.

Closed, it counts what decode attains while finetuning runs. Below the limit it opens for a pause; then
finetuning is tried again with a fresh count. Each time it opens again soon the pause doubles.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from harli.serve.attainment import WINDOW_S, Counts, Window

LEAST = 50
"""Attainment of fewer gaps or requests than this is chance."""
FIRST_PAUSE_S = 60.0
LONGEST_PAUSE_S = 3600.0


class Breaker:
    """Told once a second; times are in seconds of any clock that does not go back."""

    def __init__(self, limit: float) -> None:
        """``limit``: the lowest attainment in the last minute with which finetuning goes on; 0 never opens."""
        self.limit = limit
        self.open = False
        self.reason = ""
        """Why it opened last."""
        self.openings = 0
        self._windows: defaultdict[str, Window] = defaultdict(Window)
        self._pause_s = FIRST_PAUSE_S
        self._until_s = 0.0
        self._closed_s: float | None = None
        """When it closed after its last opening."""

    def observe(self, now_s: float, counts: Mapping[str, Counts], finetuning: bool) -> None:
        """What was attained since the last call, by objective. ``finetuning``: a job ran meanwhile."""
        if self.open:
            if now_s >= self._until_s:
                self.open, self._closed_s = False, now_s
            return
        if not finetuning:
            return
        for objective, new in counts.items():
            window = self._windows[objective]
            window.add(now_s, new)
            asked, attained = window.counts(now_s)
            if asked >= LEAST and attained < self.limit * asked:
                kept = attained / asked
                self._trip(now_s, f"{objective.upper()} attainment of the last minute was {kept:.4f}")
                return

    def retry_s(self, now_s: float) -> float | None:
        """Seconds until finetuning is tried again; None while it is not switched off."""
        return max(0.0, self._until_s - now_s) if self.open else None

    def reset(self) -> None:
        """Close, and forget what was counted: the objectives are others, or an operator says so."""
        self.open, self._closed_s = False, None
        self._windows.clear()

    def _trip(self, now_s: float, what: str) -> None:
        again = self._closed_s is not None and now_s - self._closed_s < self._pause_s + WINDOW_S
        self._pause_s = min(2.0 * self._pause_s, LONGEST_PAUSE_S) if again else FIRST_PAUSE_S
        self._until_s = now_s + self._pause_s
        self.open, self.openings = True, self.openings + 1
        self._windows.clear()
        self.reason = f"{what}, below {self.limit:g}: finetuning is off for {self._pause_s:.0f} s"
