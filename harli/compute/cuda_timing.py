"""Step times on a GPU that runs behind the host: a pair of CUDA events around every step. Not yet run on a GPU."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import torch

from harli.compute.timing import StepTime, StepTimer


class _Step(NamedTuple):
    began: Any
    ended: Any
    follows: bool
    """Its gap counts from the step before."""


class EventTimer(StepTimer):
    """Records events on the current stream, two per step, and reads them when the device has passed them.

    The host never waits for them. Events are used again, so after a few steps nothing is allocated.
    """

    def __init__(self, cuda: Any = torch.cuda) -> None:
        """``cuda``: ``torch.cuda``, or a module with the same ``Event``."""
        self._cuda = cuda
        self._free: list[Any] = []
        self._steps: deque[_Step] = deque()
        self._began: Any = None
        self._last_ended: Any = None
        self._follows = False

    def begin(self) -> None:
        self._began = self._event()
        self._began.record()

    def end(self) -> None:
        ended = self._event()
        ended.record()
        self._steps.append(_Step(self._began, ended, self._follows))
        self._follows = True

    def take(self) -> StepTime | None:
        if not self._steps or not self._steps[0].ended.query():
            return None
        step = self._steps.popleft()
        gap_ms = self._last_ended.elapsed_time(step.ended) if step.follows else math.nan
        time = StepTime(step.began.elapsed_time(step.ended), gap_ms)
        self._free.append(step.began)
        if self._last_ended is not None:
            self._free.append(self._last_ended)
        self._last_ended = step.ended
        return time

    def interrupt(self) -> None:
        self._follows = False

    def _event(self) -> Any:
        return self._free.pop() if self._free else self._cuda.Event(enable_timing=True)
