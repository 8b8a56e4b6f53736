"""The look-ahead policy: the best long-run finetune rate within a hard limit on every step."""

from __future__ import annotations

import math
from dataclasses import astuple, replace
from typing import Annotated, ClassVar

from harli.rows import StepRecord
from harli.types import Decision, DecodeState, FinetuneState, HarliError
from policies.background import Background
from policies.base import Policy, PolicyContext, Range
from policies.load import STALL, Load, LoadMeter
from policies.plan import Plan, make_plan
from predictor.base import Predictor

CHECK_S = 1.0
"""How often the load is looked at."""
REFRESH_S = 10.0
"""A plan this old is made again though the load has stayed: the predictor may have corrected itself."""
MOVED = 0.1
"""Fraction by which an estimate has to move for a new plan."""
RESERVED = 2.0
"""Of a request's slack, this many of the largest excess of a step over its plan are left for steps to come: others'
prompts, most of all, which the next step may have and no forecast of this one knows."""
REMEMBERED_MS = 20_000.0
"""About how long an excess counts as the largest."""
CAREFUL = 0.8
"""Part of the budget that is used in states outside what the predictor knows."""


class Qos(Policy):
    """Look-ahead: the best long-run finetune rate within the SLO at every step, and the queue stays short.

    Stretching every step to its limit keeps requests longer, so the batch grows until finetuning no longer fits and
    requests wait. So a plan, made again in the background as load and context drift, says for every batch size what a
    second of delay costs in the long run (``policies.plan``). Of the shares and windows whose bound fits its budget, a
    step takes the one with the most finetune tokens less that cost. Under a TPOT SLO some of a request's slack is left
    for what may come before it ends. Requests that wait have decode alone; so has a step far outside what the predictor
    knows, unless there is a margin. ``slowdown`` limits the expected gap, window included, to that multiple of decode
    alone's.
    """

    keeps_slo: ClassVar[bool] = True

    def __init__(
        self,
        context: PolicyContext,
        *,
        slowdown: Annotated[float, Range(1.05, 4.0, log=True)] = float("inf"),
    ) -> None:
        super().__init__(context)
        if not slowdown >= 1.0:
            raise HarliError(f"slowdown is a multiple of decode alone's gap, at least 1, not {slowdown}")
        self._predictor = context.need_predictor()
        self._slowdown = slowdown
        self._limit_ms = min(limit for limit in (context.slo.itl_ms, context.slo.tpot_ms, math.inf) if limit)
        shares = context.menu.shares[:-1]
        self._decisions = [Decision(share) for share in shares]
        self._decode_units = [share.decode for share in shares]
        self._index = {share.finetune: index for index, share in enumerate(shares)}
        held = range(context.menu.finetune_alone.finetune + 1)
        self._holding = [next((i for i, s in enumerate(shares) if s.finetune >= n), len(shares) - 1) for n in held]
        self._last = 0
        self._reserve_ms = 0.0
        self._switch_ms, self._overhead_ms = astuple(self._predictor.costs)
        self._meter = LoadMeter(context.max_batch)
        self._planning = _Planning(self._predictor, context, slowdown, self._meter)
        self._planner = Background(self._planning, CHECK_S, context.background)
        self._plan: Plan | None = None

    def decide(self, decode: DecodeState, finetune: FinetuneState) -> Decision:
        self._meter.step(decode)
        self._planning.finetune = finetune
        plan = self._plan = self._planner.step(decode.time_s)
        window_ms = 0.0
        if plan is None or decode.waiting or not finetune.ready:
            self._last = 0
        else:
            window_ms = self._choose(plan, decode, finetune)
        decision = self._decisions[self._last]
        return Decision(decision.share, window_ms) if window_ms else decision

    def observe(self, step: StepRecord) -> None:
        plan, gap_ms = self._plan, step.gap_ms - step.window_ms
        share = self._index.get(step.wanted_finetune)
        if plan is not None and share is not None and gap_ms > 0.0:  # NaN after idling
            batch = min(step.batch, plan.capacity)
            planned_ms = plan.gap_ms[batch][share]
            self._meter.took(planned_ms, gap_ms)
            stall_ms = math.inf if step.prefill_tokens else STALL * planned_ms  # prompts come again, stalls do not
            excess_ms = min(gap_ms, stall_ms) - planned_ms
            self._reserve_ms = max(self._reserve_ms * (1.0 - step.gap_ms / REMEMBERED_MS), RESERVED * excess_ms)
            if share == 0 and plan.late[batch] > 0.0:  # others are as late as bounds allow, or for another reason
                self._meter.late(plan.late[batch], batch if gap_ms > self._limit_ms else 0)

    def _choose(self, plan: Plan, decode: DecodeState, finetune: FinetuneState) -> float:
        """Set the share that is worth most among those that fit this step, and give its window in ms."""
        forecast, units = self._predictor.forecast(decode, finetune), self._predictor.units(finetune)
        gaps, bounds, rates = forecast.gap_ms, forecast.bound_ms, forecast.finetune_tokens_per_s
        later_gaps, later_bounds = forecast.behind_window.gap_ms, forecast.behind_window.bound_ms
        price = plan.delay_cost[min(decode.batch, plan.capacity)]
        budget = self.context.slo.budget_ms(decode.slack_ms - self._reserve_ms)
        if not forecast.known:
            budget *= CAREFUL
        slowest = self._slowdown * later_gaps[0]
        gain = self._predictor.alone_tokens_per_s(finetune) - price  # of a window's time
        if not forecast.known or decode.prefill_tokens:
            gain = 0.0
        held_ms, overhead_ms = finetune.held_ms, self._overhead_ms
        before = (rates[self._holding[finetune.held_units]] - price) * held_ms
        before -= price * overhead_ms
        last, decode_units = self._last, self._decode_units
        self._last, window_ms, most = 0, 0.0, -math.inf
        for share, gap in enumerate(gaps):
            rate = rates[share] - price
            switch = price * self._switch_ms if decode_units[share] > decode_units[last] else 0.0
            if bounds[share] <= budget and gap <= slowest:
                worth = rate * gap - switch
                if worth > most:
                    most, self._last, window_ms = worth, share, 0.0
            if gain > 0.0:
                gap = later_gaps[share]
                room = min(budget - later_bounds[share], slowest - gap) - overhead_ms
                used_ms = units.in_window_ms(room - held_ms, split=share > 0)
                worth = rate * gap - switch + before + gain * used_ms
                if used_ms > 0.0 and worth > most:
                    most, self._last, window_ms = worth, share, room
        return window_ms


class _Planning:
    """Makes a new plan when the old one is out of date; beside the hot path, so it only reads what the policy has."""

    def __init__(self, predictor: Predictor, context: PolicyContext, slowdown: float, meter: LoadMeter) -> None:
        self.finetune = FinetuneState()
        self._predictor = predictor
        self._context = context
        self._slowdown = slowdown
        self._meter = meter
        self._made_for: Load | None = None
        self._made_shape = (0, 0)
        self._made_s = 0.0

    def __call__(self) -> Plan | None:
        finetune, now_s, load = replace(self.finetune), self._meter.now_s, self._meter.load()
        shape = (finetune.microbatch_tokens, finetune.kept_layers)
        old = self._made_for
        if old and shape == self._made_shape and now_s < self._made_s + REFRESH_S and not load.differs(old, MOVED):
            return None
        self._made_for, self._made_shape, self._made_s = load, shape, now_s
        return make_plan(self._predictor, self._context.slo, load, finetune, self._slowdown)
