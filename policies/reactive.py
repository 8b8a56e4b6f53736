"""Feedback instead of prediction."""

from __future__ import annotations

import math
from typing import Annotated

from harli.rows import StepRecord
from harli.types import Decision, DecodeState, FinetuneState, HarliError
from policies.base import Policy, PolicyContext, Range


class Reactive(Policy):
    """No prediction: a level towards decode when gaps come near the SLO, a level back when they are far below.

    Levels are the menu's shares from "decode alone" up. After every ``every`` steps at a level, the longest gap of
    these steps against an ITL SLO, and their mean against a TPOT SLO, is compared with ``high`` and ``low``,
    fractions of the SLO. A gap above the ITL SLO itself moves at once. Without an SLO the largest split is kept.
    """

    def __init__(
        self,
        context: PolicyContext,
        *,
        low: Annotated[float, Range(0.3, 0.75)] = 0.7,
        high: Annotated[float, Range(0.75, 1.0)] = 0.95,
        every: Annotated[int, Range(2, 64, log=True)] = 16,
    ) -> None:
        super().__init__(context)
        if not 0.0 < low < high:
            raise HarliError(f"policy 'reactive' needs 0 < low < high, not low={low} and high={high}")
        if every < 1:
            raise HarliError(f"policy 'reactive' needs at least 1 step between changes, not every={every}")
        self._low, self._high, self._every = low, high, every
        self._levels = [Decision(share) for share in context.menu.shares[:-1]]
        self._level = 0
        self._itl_ms, self._tpot_ms = context.slo.itl_ms or math.inf, context.slo.tpot_ms or math.inf
        self._steps = 0
        self._sum_ms = self._longest_ms = 0.0

    def decide(self, decode: DecodeState, finetune: FinetuneState) -> Decision:
        return self._levels[self._level if finetune.ready else 0]

    def observe(self, step: StepRecord) -> None:
        gap = step.gap_ms
        if not gap > 0.0:  # NaN after idling
            return
        self._steps += 1
        self._sum_ms += gap
        self._longest_ms = max(self._longest_ms, gap)
        if self._steps < self._every and gap <= self._itl_ms:
            return
        used = max(self._longest_ms / self._itl_ms, self._sum_ms / self._steps / self._tpot_ms)
        if used > self._high:
            self._level = max(self._level - 1, 0)
        elif used < self._low:
            self._level = min(self._level + 1, len(self._levels) - 1)
        self._steps = 0
        self._sum_ms = self._longest_ms = 0.0
