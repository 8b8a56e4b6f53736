"""Decode's steps from their decision until their times are known, and the row that is written of each.

With asynchronous scheduling the next step is begun before the one before it is over: those are in flight.
"""

from __future__ import annotations

import math
import time
from collections import deque
from typing import NamedTuple

from harli.compute.base import Partitioner
from harli.finetune.trainer import Trainer
from harli.memory.lender import Lender
from harli.rows import StepRecord
from harli.runtime.controller import Controller
from harli.types import Decision, DecodeState, FinetuneState


class Hooks:
    """What the hooks of the step that is about to begin have cost, and what they have waited for."""

    def __init__(self) -> None:
        self.decide_cpu_us = 0.0
        self.decide_wall_us = 0.0
        self.window_ms = 0.0
        """Finetuning had the device, or decode waited for a unit."""
        self.drained_ms = 0.0
        """Waited for the step in flight."""
        self.lender: Lender | None = None
        """Knows its own part of them; None while nothing is lent."""
        self._began = 0.0

    def began(self) -> None:
        """The worker's hook begins."""
        self._began = time.perf_counter()
        self.window_ms = self.drained_ms = 0.0

    @property
    def waited_ms(self) -> float:
        """For units, in windows and for memory."""
        return self.window_ms + (self.lender.waited_ms if self.lender else 0.0)

    @property
    def worker_us(self) -> float:
        """Since ``began``, and of lending; waiting aside."""
        own_us = (time.perf_counter() - self._began) * 1e6 - (self.window_ms + self.drained_ms) * 1e3
        return own_us + (self.lender.hook_us if self.lender else 0.0)


class _Step(NamedTuple):
    controller: Controller
    decided_s: float
    row: StepRecord
    """What is known of it when it begins; the rest is NaN or 0."""


class Steps:
    """The steps in flight of one engine, oldest first. For decode's thread alone."""

    def __init__(self, partitioner: Partitioner) -> None:
        self.tokens_seen = 0.0
        """Of finetuning, up to the last row."""
        self._partitioner = partitioner
        self._timer = partitioner.timer()
        self._steps: deque[_Step] = deque()
        self._begun = False
        """The newest is between its begin and its end."""
        self._cpu_ms = (math.nan, math.nan)
        self._ended_s = self._latency_ms = 0.0

    @property
    def in_flight(self) -> int:
        return len(self._steps)

    @property
    def last_decode_units(self) -> int:
        """Of the newest step in flight."""
        return self._steps[-1].row.decode_units

    @property
    def next_finetune_units(self) -> int:
        """What was decided for finetuning beside the oldest step in flight."""
        return self._steps[0].row.wanted_finetune

    def begin(
        self,
        controller: Controller,
        decision: Decision,
        decode: DecodeState,
        finetune: FinetuneState,
        units: tuple[int, int],
        hooks: Hooks,
        clock_zero: float,
    ) -> None:
        """``units``: what decode has from here on, and what a unit of finetuning still holds."""
        self.skip()
        predicted_ms, bound_ms = controller.predicted_ms(units[0])
        row = StepRecord.begun(
            decode,
            finetune,
            decision,
            decode_units=units[0],
            held_units=units[1],
            predicted_ms=predicted_ms,
            bound_ms=bound_ms,
            window_ms=hooks.waited_ms,
            clock_zero=clock_zero,
            reclaim_ms=hooks.lender.reclaim_ms if hooks.lender else math.nan,
            decide_cpu_us=hooks.decide_cpu_us,
            decide_wall_us=hooks.decide_wall_us,
            hook_us=hooks.worker_us,
        )
        self._steps.append(_Step(controller, decode.time_s, row))
        self._begun = True
        self._timer.begin()

    def end(self) -> None:
        """What belongs to the step that began last has been submitted; nothing if it was skipped."""
        if self._begun:
            self._timer.end()
            self._begun = False

    def skip(self) -> None:
        """The next step has no decision. One that began and never ended, because it raised, is forgotten."""
        if self._begun:
            self._steps.pop()
            self._begun = False

    def take(self, trainer: Trainer | None) -> bool:
        """Tell the controller of the oldest step; False if its times are not known yet."""
        if not self._steps or (times := self._timer.take()) is None:
            return False
        began = time.perf_counter()
        controller, _, row = self._steps.popleft()
        tokens = 0.0
        if trainer is not None:
            tokens, self.tokens_seen = trainer.tokens_done - self.tokens_seen, trainer.tokens_done
        cpu_ms, before_ms = self._partitioner.cpu_ms(), self._cpu_ms
        self._cpu_ms = cpu_ms
        self._ended_s, self._latency_ms = time.monotonic(), times.latency_ms
        controller.observe(
            row._replace(
                latency_ms=times.latency_ms,
                gap_ms=times.gap_ms,
                finetune_tokens=tokens,
                decode_cpu_ms=cpu_ms[0] - before_ms[0],
                finetune_cpu_ms=cpu_ms[1] - before_ms[1],
                hook_us=row.hook_us + (time.perf_counter() - began) * 1e6,
            )
        )
        return True

    def interrupt(self) -> None:
        """Decode pauses: the next step follows none."""
        self._timer.interrupt()
        self._cpu_ms = (math.nan, math.nan)

    def busy_ms(self, now_s: float) -> float:
        """How long the steps in flight are expected to take from ``now_s`` on."""
        expected_ms = 0.0
        for _, _, row in self._steps:
            expected_ms += row.predicted_ms if row.predicted_ms > 0.0 else self._latency_ms + row.window_ms
        since_s = max(self._ended_s, self._steps[0].decided_s)
        return max(0.0, expected_ms - (now_s - since_s) * 1e3)
