"""The paper's policy: the most finetuning that every single step allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from harli.types import Decision, DecodeState, FinetuneState
from policies.base import Policy, PolicyContext


class Stepwise(Policy):
    """At each step the share and window with the most finetune tokens whose bound fits the budget (the paper's).

    Extended from the paper's choice of a share (arXiv 2511.11729) by the window that fills what is left of the budget.
    Every step is stretched to the SLO, so requests stay longer and the batch grows: see policy 'qos'.
    """

    keeps_slo: ClassVar[bool] = True

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._predictor = context.need_predictor()
        self._shares = [Decision(share) for share in context.menu.shares[:-1]]

    def decide(self, decode: DecodeState, finetune: FinetuneState) -> Decision:
        best = self._shares[0]
        if not finetune.ready:
            return best
        costs, alone_per_s = self._predictor.costs, self._predictor.alone_tokens_per_s(finetune)
        units, held_ms = self._predictor.units(finetune), finetune.held_ms
        budget = self.context.slo.budget_ms(decode.slack_ms)
        gaps, bounds, rates = self.limits(decode, finetune)
        most, window = 0.0, 0.0
        for decision, gap, bound, rate in zip(self._shares, gaps, bounds, rates, strict=True):
            room = budget - bound
            if room < 0.0:
                continue
            rest = room - costs.window_overhead_ms
            used = units.in_window_ms(rest - held_ms, split=decision.share.finetune > 0)
            tokens = rate * gap + alone_per_s * used
            if tokens > most:
                most, best, window = tokens, decision, rest if used else 0.0
        return Decision(best.share, window) if window else best

    def limits(
        self, decode: DecodeState, finetune: FinetuneState
    ) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
        """Expected gap and its limit in ms, and finetune tokens/s, at every share that leaves decode something."""
        forecast = self._predictor.forecast(decode, finetune)
        return forecast.gap_ms, forecast.bound_ms, forecast.finetune_tokens_per_s
