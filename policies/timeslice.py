"""One side at a time: exclusive windows, no splits."""

from __future__ import annotations

from typing import ClassVar

from harli.types import Decision, DecodeState, FinetuneState
from policies.base import Policy, PolicyContext


class Timeslice(Policy):
    """Exclusive windows only: before every step the longest that the budget leaves."""

    keeps_slo: ClassVar[bool] = True

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._predictor = context.need_predictor()
        self._alone = Decision(context.menu.decode_alone)

    def decide(self, decode: DecodeState, finetune: FinetuneState) -> Decision:
        if not finetune.ready:
            return self._alone
        predictor = self._predictor
        bound = predictor.forecast(decode, finetune).behind_window.bound_ms[0]
        window = self.context.slo.budget_ms(decode.slack_ms) - bound - predictor.costs.window_overhead_ms
        if window < max(predictor.units(finetune).longest_ms, finetune.held_ms):
            return self._alone
        return Decision(self._alone.share, window)
