"""The contract of a latency predictor, as policies, runtime and simulator use it.

A share's index is its place in ``menu.shares[:-1]``: every share that leaves decode something, decode
alone first. Gaps are those between two tokens of a request (forward pass, scheduling and admissions),
without an exclusive window, whose length a policy adds itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from harli.rows import StepRecord
from harli.types import Costs, DecodeState, FinetuneState, Menu, UnitTime
from predictor.units import UnitTimes

Floats = NDArray[np.float64]
STATE = ("batch", "context_sum", "context_max", "prefill_tokens", "admitted")
"""What predictors see of decode: columns of steps, and fields of ``DecodeState``."""


@dataclass(slots=True)
class Forecast:
    """The step that begins now at every share; one object, updated in place."""

    gap_ms: list[float] = field(default_factory=list)
    bound_ms: list[float] = field(default_factory=list)
    """What the gap stays within, with the coverage that the predictor was calibrated for."""
    finetune_tokens_per_s: list[float] = field(default_factory=list)
    """While the step runs; 0 for decode alone."""
    known: bool = True
    """False far outside the states that the predictor was trained on; the bounds are then wider."""
    freed: Forecast | None = None
    """The same once the unit that still runs has ended; None where none runs."""

    @property
    def behind_window(self) -> Forecast:
        """Of the step behind a window, which waits for the unit that still runs."""
        return self.freed or self


@dataclass(frozen=True, slots=True)
class Outlook:
    """Many states at once: arrays of shape [states, shares]."""

    gap_ms: Floats
    bound_ms: Floats
    finetune_tokens_per_s: Floats


class Predictor(ABC):
    """Everything that a scheduler needs to know about a device running one model."""

    menu: Menu
    costs: Costs
    unit_times: tuple[UnitTime, ...]
    finetune_alone_tokens_per_s: float
    """With the whole device, decode idle or waiting; every layer recomputed."""
    _units: dict[tuple[int, int], UnitTimes] | None = None

    @abstractmethod
    def forecast(self, decode: DecodeState, finetune: FinetuneState) -> Forecast:
        """The step that ``decode`` describes, at every share. Called more than once for a step, computed once.

        Takes a few microseconds and allocates next to nothing. The object is the same at every call.
        """

    @abstractmethod
    def outlook(self, batch: Floats, context_sum: Floats, finetune: FinetuneState) -> Outlook:
        """Pure decode steps with these batches and summed contexts, for planning; any thread may call it."""

    def units(self, finetune: FinetuneState) -> UnitTimes:
        """How finetuning's units of this shape fill windows."""
        shape = (finetune.microbatch_tokens, finetune.kept_layers)
        if self._units is None:
            self._units = {}
        units = self._units.get(shape)
        if units is None:
            units = self._units[shape] = UnitTimes(self.unit_times, self.menu.finetune_alone.finetune, shape)
        return units

    def alone_tokens_per_s(self, finetune: FinetuneState) -> float:
        """With the whole device, for what this shape keeps: a pass is shorter when layers are not recomputed."""
        return self.finetune_alone_tokens_per_s * self.units(finetune).speedup

    def observe(self, row: StepRecord) -> None:  # noqa: B027
        """The step that just ended, as it happened: a chance to correct what is forecast next."""

    def state(self) -> dict[str, float]:
        """What ``observe`` has learned, for the run's record."""
        return {}
