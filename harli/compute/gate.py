"""The gate between finetuning's units and decode's steps.

Finetuning's thread asks to enter before every unit; decode's thread says how many compute units the
next unit may have. A unit that runs is never interrupted, so decode takes back what it holds only
when it has left.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable


class Gate:
    """Shared by decode's thread and finetuning's thread."""

    def __init__(self, units: int, interrupted: Callable[[], bool] = lambda: False) -> None:
        """``units``: compute units of the device. ``interrupted``: whether a request has arrived (ends a window)."""
        self._units = units
        self._interrupted = interrupted
        self._changed = threading.Condition(threading.Lock())
        self._allowed = 0
        self._deadline = math.inf
        self._in_use = 0
        self._entered_s = self._leaves_s = 0.0
        self._waiting = False
        self._closed = False

    # Finetuning's side

    def enter(self, expected_ms: float, called_off: Callable[[], bool] = lambda: False) -> int | None:
        """Wait until a unit of about ``expected_ms`` may start; the compute units it has, 0 when the gate is closed.

        None as soon as the wait is ``called_off``, which ``wake`` lets it see.
        """
        with self._changed:
            while not self._closed:
                if called_off():
                    return None
                if self._allowed and self._fits(expected_ms):
                    self._entered_s = time.monotonic()
                    self._in_use = self._allowed
                    return self._in_use
                self._waiting = True
                self._changed.notify_all()  # a window ends when nothing more fits into it
                self._changed.wait()
                self._waiting = False
            return 0

    def wake(self) -> None:
        """Let a unit that waits look whether it is called off."""
        with self._changed:
            self._changed.notify_all()

    def expect(self, length_ms: float) -> None:
        """The unit that has entered will take about ``length_ms`` on the compute units that it was given."""
        self._leaves_s = self._entered_s + length_ms / 1e3

    def leave(self) -> None:
        """The unit has ended."""
        with self._changed:
            self._in_use = 0
            self._changed.notify_all()

    def _fits(self, expected_ms: float) -> bool:
        if self._deadline == math.inf:
            return True
        return time.monotonic() + expected_ms / 1e3 <= self._deadline and not self._interrupted()

    # Decode's side

    @property
    def allowed(self) -> int:
        """Compute units that the next unit may have."""
        return self._allowed

    @property
    def free(self) -> int:
        """Compute units that no running unit holds."""
        return self._units - self._in_use

    @property
    def held_s(self) -> float:
        """How long the unit that runs has been running; 0 when none is."""
        return time.monotonic() - self._entered_s if self._in_use else 0.0

    @property
    def held_ms(self) -> float:
        """How long the unit that runs is expected to run on; 0 when none does."""
        return max(0.0, self._leaves_s - time.monotonic()) * 1e3 if self._in_use else 0.0

    def allow(self, units: int) -> None:
        """From now on units start with ``units`` compute units; with 0, none starts."""
        if units == self._allowed:
            return
        with self._changed:
            self._allowed = units
            self._changed.notify_all()

    def wait_free(self, timeout_s: float) -> bool:
        """Wait until some compute unit is free; False if none was within ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: self._in_use < self._units, timeout_s)

    def window(self, length_ms: float, timeout_s: float) -> bool:
        """Give the whole device to finetuning for ``length_ms``, for the units that are expected to fit.

        Returns when no unit runs and the time is up, nothing more fits, or a request has arrived. False
        if a unit still ran ``timeout_s`` after the window's end.
        """
        with self._changed:
            end = time.monotonic() + length_ms / 1e3
            self._allowed, self._deadline, self._waiting = self._units, end, False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or (self._waiting and not self._in_use), length_ms / 1e3)
            self._allowed, self._deadline = 0, math.inf
            return self._changed.wait_for(lambda: not self._in_use, timeout_s)

    def outlasts(self, timeout_s: float) -> bool:
        """Whether the unit that runs now still runs ``timeout_s`` later; returns as soon as it does not."""
        with self._changed:
            entered_s = self._entered_s
            return not self._changed.wait_for(lambda: not self._in_use or self._entered_s != entered_s, timeout_s)

    def close(self) -> None:
        """Let no unit start any more, for good."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
