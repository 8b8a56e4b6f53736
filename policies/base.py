"""The contract of a scheduling policy.

A policy sees decode and finetuning at the start of a decode step and answers with a ``Decision``.
The same object is called by the runtime and by the simulator, so it must not read clocks, files or
global state: the time is in ``decode.time_s``. Its parameters are the keyword-only arguments of its
constructor; names, types and defaults are taken from there, and the first line of its docstring is
what ``harli policies`` prints::

    from harli.types import DecodeState, Decision, FinetuneState
    from policies.base import Policy, PolicyContext

    class Half(Policy):
        "The middle split while the batch is small, decode alone otherwise."

        def __init__(self, context: PolicyContext, *, limit: int = 8) -> None:
            super().__init__(context)
            splits = context.menu.splits
            self.open = Decision(splits[len(splits) // 2])
            self.closed = Decision(context.menu.decode_alone)
            self.limit = limit

        def decide(self, decode: DecodeState, finetune: FinetuneState) -> Decision:
            return self.open if finetune.ready and decode.batch <= self.limit else self.closed
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from harli.rows import StepRecord
from harli.types import Decision, DecodeState, FinetuneState, HarliError, Menu, Share, Slo
from predictor.base import Predictor


@dataclass(frozen=True, slots=True)
class Range:
    """Values of a numeric parameter that are worth a search, ends included: ``Annotated[float, Range(1.0, 3.0)]``."""

    low: float
    high: float
    log: bool = False
    """Search in the logarithm."""

    def __post_init__(self) -> None:
        if not (-math.inf < self.low < self.high < math.inf) or (self.log and self.low <= 0.0):
            raise ValueError(f"not a range to search: {self.low} to {self.high}{' in the logarithm' * self.log}")


class NoPredictorError(HarliError):
    """A policy cannot do without a predictor, and there is none."""


WINDOW_LIMIT_MS = 60_000.0


def share_problem(share: Share, menu: Menu, *, of_step: bool) -> str:
    """Why the runtime refuses the share of a step, or of idling; empty if it does not."""
    if share not in menu.shares:
        return f"share {share} is not on the menu"
    return "" if share.decode or not of_step else f"share {share} leaves a decode step nothing to run on"


def window_problem(exclusive_ms: float) -> str:
    """Why the runtime refuses a window; empty if it does not."""
    if 0.0 <= exclusive_ms <= WINDOW_LIMIT_MS:
        return ""
    return f"a window of {exclusive_ms} ms is not between 0 and {WINDOW_LIMIT_MS:.0f} ms"


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy is given once, when a run begins."""

    menu: Menu
    slo: Slo
    seed: int = 0
    predictor: Predictor | None = None
    """Latency, bound and finetune rate at every share; None where the run has no predictor."""
    max_batch: int = 256
    """Most requests in a step: ``max_num_seqs`` of the engine."""
    background: bool = True
    """Work beside the hot path may go on in a thread; else it is done within ``decide``, at times of ``time_s``."""

    def need_predictor(self) -> Predictor:
        """The predictor. Raises NoPredictorError when there is none."""
        if self.predictor is None:
            raise NoPredictorError("this policy needs a predictor: run `harli profile`, then `harli train-predictor`")
        return self.predictor


class Policy(ABC):
    """Base class of all policies."""

    keeps_slo: ClassVar[bool] = False
    """Every step stays within its budget as far as the predictor's bounds are right."""
    slo_aware: ClassVar[bool] = True
    """What it decides depends on the SLO; one run of a policy that does not serves for every SLO."""

    def __init__(self, context: PolicyContext) -> None:
        self.context = context

    @abstractmethod
    def decide(self, decode: DecodeState, finetune: FinetuneState) -> Decision:
        """The share, and the exclusive window, of the step that begins now.

        Called at every decode step, on the engine's thread: no I/O, a few microseconds. Both states
        are updated in place from step to step, so copy what you keep.
        """

    def idle(self, finetune: FinetuneState) -> Share:
        """The share while decode has no request at all; by default finetuning has the whole device."""
        return self.context.menu.finetune_alone

    def observe(self, step: StepRecord) -> None:  # noqa: B027
        """The step that just ended, as it happened. Same rules as ``decide``."""
