"""The contract of a partitioner."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from harli.compute.timing import StepTimer, WallTimer
from harli.types import Menu

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes down what a function submits to the calling thread's part of the device, without running it, and returns
what runs the record. Raises RuntimeError when something cannot be recorded."""


class Partitioner(ABC):
    """Gives decode and finetuning disjoint parts of a device, chosen anew before every step.

    Two threads use it: decode's (the engine's) and finetuning's. Each adopts the partitioner once and
    from then on sets how many compute units its own side has. That the two never add up to more than
    the device is the caller's business (``harli.compute.gate``).
    """

    menu: Menu

    @property
    def units(self) -> int:
        """Compute units of the whole device."""
        return self.menu.decode_alone.decode

    @abstractmethod
    def adopt_decode(self) -> None:
        """Prepare the calling thread to run decode."""

    @abstractmethod
    def adopt_finetune(self) -> None:
        """Prepare the calling thread to run finetuning."""

    @abstractmethod
    def set_decode(self, units: int) -> None:
        """Let decode's thread, the caller, use ``units`` compute units from here on. Takes microseconds."""

    @abstractmethod
    def set_finetune(self, units: int) -> None:
        """Likewise for finetuning's thread."""

    def wait_decode(self) -> None:  # noqa: B027
        """Return when the device has done what decode's thread, the caller, gave it; on a CPU it has already."""

    def wait_finetune(self) -> None:  # noqa: B027
        """Return when the device has done what finetuning's thread, the caller, gave it; on a CPU it has already."""

    def run_finetune(self, work: Callable[[], None]) -> float:
        """Do ``work`` on finetuning's thread, the caller; the milliseconds that the device took for it, when it has."""
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) * 1e3

    def recorder(self) -> Recorder | None:
        """For finetuning's units, on a device where submitting work costs much; None on others."""
        return None

    def timer(self) -> StepTimer:
        """A timer of decode's steps."""
        return WallTimer()

    def cpu_ms(self) -> tuple[float, float]:
        """CPU time that decode's and finetuning's threads have had so far; NaN where it cannot be read."""
        return math.nan, math.nan
