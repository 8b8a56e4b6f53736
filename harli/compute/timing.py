"""How long decode's steps take: the contract, and the clock of a device whose work is done when a call returns."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import deque
from typing import NamedTuple


class StepTime(NamedTuple):
    """Times of one step, in milliseconds."""

    latency_ms: float
    """From its begin to its end."""
    gap_ms: float
    """From the end of the step before to its end; NaN on the first one and after ``interrupt``."""


class StepTimer(ABC):
    """Times steps one after the other. Their times come in the same order, perhaps some steps later.

    A step is ``begin``, then ``end``, on decode's thread; where the device works asynchronously these only
    mark the places, and ``take`` has the step's times when the device has passed them.
    """

    @abstractmethod
    def begin(self) -> None:
        """What is submitted from here on belongs to the next step."""

    @abstractmethod
    def end(self) -> None:
        """The step's work has been submitted."""

    @abstractmethod
    def take(self) -> StepTime | None:
        """The times of the oldest step not taken yet; None if it has not ended. Never waits."""

    @abstractmethod
    def interrupt(self) -> None:
        """Decode pauses: the next step has no gap."""


class WallTimer(StepTimer):
    """The host's clock."""

    def __init__(self) -> None:
        self._began = 0.0
        self._ended = math.nan
        self._times: deque[StepTime] = deque()

    def begin(self) -> None:
        self._began = time.perf_counter()

    def end(self) -> None:
        now = time.perf_counter()
        self._times.append(StepTime((now - self._began) * 1e3, (now - self._ended) * 1e3))
        self._ended = now

    def take(self) -> StepTime | None:
        return self._times.popleft() if self._times else None

    def interrupt(self) -> None:
        self._ended = math.nan
