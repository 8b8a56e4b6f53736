"""The contract of a partitioner."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from harli.compute.timing import StepTimer, WallTimer
from harli.types import Menu


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

    def wait_finetune(self) -> None:  # noqa: B027
        """Return when the device has done what finetuning's thread, the caller, gave it; on a CPU it has already."""

    def timer(self) -> StepTimer:
        """A timer of decode's steps."""
        return WallTimer()

    def cpu_ms(self) -> tuple[float, float]:
        """CPU time that decode's and finetuning's threads have had so far; NaN where it cannot be read."""
        return math.nan, math.nan
