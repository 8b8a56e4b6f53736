"""The paper's policy: the most finetuning that every single step allows."""

from __future__ import annotations

from typing import ClassVar

from harli.types import Decision, DecodeState, FinetuneState
from policies.base import Policy, PolicyContext
from predictor.base import Forecast


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
        now = self.forecast(decode, finetune)
        later, rates = now.behind_window, now.finetune_tokens_per_s
        most, window = 0.0, 0.0
        for index, decision in enumerate(self._shares):
            tokens = rates[index] * now.gap_ms[index]
            if now.bound_ms[index] <= budget and tokens > most:
                most, best, window = tokens, decision, 0.0
            room = budget - later.bound_ms[index] - costs.window_overhead_ms
            used = units.in_window_ms(room - held_ms, split=decision.share.finetune > 0)
            tokens = rates[index] * later.gap_ms[index] + alone_per_s * used
            if used and tokens > most:
                most, best, window = tokens, decision, room
        return Decision(best.share, window) if window else best

    def forecast(self, decode: DecodeState, finetune: FinetuneState) -> Forecast:
        """The step at every share, by the model that this policy goes by."""
        return self._predictor.forecast(decode, finetune)
