"""The oracle: what a policy could reach if it knew what is to come; for simulations only.

It is the limit that policies are held against. The rule is the same for it: window and step stay within the step's
budget, and decode is not harmed. What it knows beyond them:

- what the coming step takes at every share, with the noise that is drawn for it, where they have a bound; likewise
  the finetune unit that runs and those of a window. So it can fill every budget to the end;
- the rate and the lengths of the coming requests, where they have estimates from those that were;
- the outcome: its parameters are tried on the very requests that it is judged by (in a comparison on those of the first
  round), and the best run that leaves decode unharmed counts (``harli.compare.cell``).

In a step it takes the share and the window that earn most: finetune tokens, less the time that both take at what a
second of delay costs. That cost is the one of the look-ahead (``policies.plan``), solved exactly for the true load,
times ``price``. At price 0 it fills every step, as the best single step would; at 1 it is the long-run optimum if
arrivals are Poisson and lengths geometric; other prices are for requests that are neither. So it is a near limit rather
than a proven one: its steps are late only where nothing fits, though 99% attainment leaves some to use up, and it
does not look for the best order of long and short units. Where all good policies earn the same, one may be ahead by 1%.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import ClassVar

from harli.simulate.device import Device
from harli.simulate.finetune import UnitClock
from harli.simulate.served import BLOCK_TOKENS
from harli.types import Decision, DecodeState, FinetuneState, HarliError
from harli.workload.base import Request
from policies.base import Policy, PolicyContext
from policies.load import Load
from policies.plan import make_plan
from predictor.base import Floats, Forecast, Outlook, Predictor

AHEAD_S = 20.0
"""The coming load is that of this long."""
PLAN_S = 5.0
"""How often it is planned for."""
LATE = 1e9
"""Tokens that a second beyond the budget costs: the least is taken where nothing fits."""


class Foresight(Predictor):
    """Forecasts that come true: gap and bound are what the simulator is about to draw."""

    def __init__(self, device: Device, clock: UnitClock, requests: Sequence[Request]) -> None:
        """``clock``: of finetuning on ``device``; ``requests``: all of them, by arrival."""
        known = device.predictor
        self.menu, self.unit_times, self.costs = device.menu, known.unit_times, known.costs
        self.finetune_alone_tokens_per_s = known.finetune_alone_tokens_per_s
        self._device, self._clock, self._requests = device, clock, requests
        shares = len(self.menu.shares) - 1
        self._forecast = Forecast([0.0] * shares, [0.0] * shares)

    def forecast(self, decode: DecodeState, finetune: FinetuneState) -> Forecast:
        forecast = self._forecast
        forecast.gap_ms[:] = self.steps_ms(decode, finetune, finetune.held_units)
        forecast.bound_ms[:] = [gap_ms * (1.0 + 1e-9) for gap_ms in forecast.gap_ms]  # differences of times round
        forecast.finetune_tokens_per_s = self._device.predictor.forecast(decode, finetune).finetune_tokens_per_s
        return forecast

    def outlook(self, batch: Floats, context_sum: Floats, finetune: FinetuneState) -> Outlook:
        mean = self._device.predictor.outlook(batch, context_sum, finetune)
        return Outlook(mean.gap_ms, mean.gap_ms, mean.finetune_tokens_per_s)

    def steps_ms(self, decode: DecodeState, finetune: FinetuneState, held: int) -> list[float]:
        """The coming step at every share while a unit on ``held`` compute units runs on, as the engine does it.

        A unit on the whole device is waited for.
        """
        device, held = self._device, 0 if held == self._device.units else held
        shares = self.menu.shares[:-1]
        free = next(share.decode for share in shares if share.decode <= device.units - held)
        return [
            device.coming_step_ms(decode, finetune, min(share.decode, free), max(held, share.finetune))
            for share in shares
        ]

    def next_bounds_ms(self, decode: DecodeState, finetune: FinetuneState) -> list[float]:
        """What a step like the coming one stays within at every share: for the one after it, which is not known."""
        return self._device.predictor.forecast(decode, finetune).bound_ms

    def window(self, decode: DecodeState, most_ms: float) -> tuple[float, float, float]:
        """``UnitClock.coming_window`` before the coming step."""
        return self._clock.coming_window(decode.time_s, most_ms)

    def load(self, decode: DecodeState, max_batch: int) -> Load:
        """The requests of the coming ``AHEAD_S``, or the last one's if none comes."""
        requests, now_s = self._requests, decode.time_s
        first = bisect_left(requests, now_s, key=lambda request: request.arrival_s)
        last = bisect_left(requests, now_s + AHEAD_S, lo=first, key=lambda request: request.arrival_s)
        coming = requests[first:last] or requests[-1:]
        steps = sum(request.output_tokens for request in coming)
        tokens = sum((request.prompt_tokens + request.output_tokens / 2) * request.output_tokens for request in coming)
        context = tokens / steps
        fitting = int(decode.kv_blocks_total * BLOCK_TOKENS / context)
        rate = max((last - first) / AHEAD_S, 1e-2)
        return Load(
            arrivals_per_s=rate,
            dispersion=1.0,
            leaving=min(len(coming) / steps, 0.5),
            context=context,
            capacity=max(min(max_batch, fitting), 1),
            stretch=1.0,
            lateness=1.0,
        )


class Oracle(Policy):
    """Simulation only, an upper limit: knows coming steps and requests, and is compared at its best ``price``.

    ``price``: of delay, as a multiple of what the look-ahead says that it costs. ``careful``: takes no split whose
    bound exceeds the budget, even if the coming step does not: its unit may outlast the step and slow the next one.
    """

    keeps_slo: ClassVar[bool] = True

    def __init__(self, context: PolicyContext, *, price: float = 1.0, careful: bool = True) -> None:
        super().__init__(context)
        if not isinstance(context.predictor, Foresight):
            raise HarliError(
                "policy 'oracle' knows the future, as only a simulation does: "
                "use it with harli simulate or harli compare --simulate"
            )
        if not price >= 0.0:
            raise HarliError(f"the price of policy 'oracle' must be a number from 0 on, not {price}")
        self._foresight = context.predictor
        self._price, self._careful = price, careful
        self._decisions = [Decision(share) for share in context.menu.shares[:-1]]
        self._index = {share.finetune: index for index, share in enumerate(context.menu.shares[:-1])}
        self._costs: list[float] = []
        self._planned_s = -math.inf

    def decide(self, decode: DecodeState, finetune: FinetuneState) -> Decision:
        alone = self._decisions[0]
        if not finetune.ready:
            return alone
        foresight, budget = self._foresight, self.context.slo.budget_ms(decode.slack_ms)
        forecast, whole = foresight.forecast(decode, finetune), foresight.finetune_alone_tokens_per_s
        rates, price = forecast.finetune_tokens_per_s, self._price * self._delay_cost(decode, finetune)
        next_ms = foresight.next_bounds_ms(decode, finetune)
        lasting = [not (self._careful and index and bound > budget) for index, bound in enumerate(next_ms)]
        most, best = -math.inf, alone
        for decision, rate, gap_ms, fits in zip(self._decisions, rates, forecast.gap_ms, lasting, strict=True):
            worth = (rate - price) * gap_ms - LATE * max(0.0, gap_ms - budget)
            if fits and worth > most:
                most, best = worth, decision
        meanwhile = rates[self._index.get(finetune.held_units, 0)] * finetune.held_ms  # the unit that runs ends first
        after_ms = foresight.steps_ms(decode, finetune, 0)
        for decision, rate, gap_ms, fits in zip(self._decisions, rates, after_ms, lasting, strict=True):
            asked_ms, takes_ms, work_ms = foresight.window(decode, budget - gap_ms)
            worth = (rate - price) * gap_ms + meanwhile + whole * work_ms - price * takes_ms
            if fits and takes_ms > 0.0 and worth > most:
                most, best = worth, Decision(decision.share, asked_ms)
        return best

    def _delay_cost(self, decode: DecodeState, finetune: FinetuneState) -> float:
        """Finetune tokens that a second of delay costs now."""
        if decode.time_s >= self._planned_s + PLAN_S:
            self._planned_s = decode.time_s
            load = self._foresight.load(decode, self.context.max_batch)
            self._costs = make_plan(self._foresight, self.context.slo, load, finetune, math.inf).delay_cost
        return self._costs[min(decode.batch + decode.waiting, len(self._costs) - 1)]
