"""Decide and observe: the policy, kept from doing harm, and the record of what happened."""

from __future__ import annotations

import math
from collections import deque

from harli.rows import StepRecord
from harli.types import Decision, DecodeState, FinetuneState, Share, one_line
from policies.base import Policy, share_problem, window_problem
from predictor.base import Forecast, Predictor

ROWS_KEPT = 1 << 16
DECISION_LIMIT_MS = 10.0


class Controller:
    """Calls one policy. A policy that raises, names a share that does not exist or takes too long is called no more:
    decode then has the device alone, and ``failure`` names the policy."""

    def __init__(self, policy: Policy, name: str, predictor: Predictor | None = None) -> None:
        """``predictor``: the one that the policy was given; it is told of every step."""
        self.name = name
        self.predictor = predictor
        self.failure = ""
        self.rows: deque[StepRecord] = deque(maxlen=ROWS_KEPT)
        self._policy = policy
        self._menu = policy.context.menu
        self._decode_alone = self._checked = Decision(self._menu.decode_alone)
        self._overrun_ms = 0.0
        self._forecast: Forecast | None = None
        self._place = {share.decode: place for place, share in enumerate(self._menu.shares[:-1])}

    def decide(self, decode: DecodeState, finetune: FinetuneState) -> Decision:
        """The policy's decision; its window is shortened by what earlier windows overran."""
        if self.failure:
            return self._decode_alone
        try:
            if self.predictor is not None:
                self._forecast = self.predictor.forecast(decode, finetune)
            decision = self._policy.decide(decode, finetune)
            if decision is not self._checked:  # decisions are immutable, and most policies keep theirs
                menu, share = self._menu, decision.share
                if problem := share_problem(share, menu, of_step=True) or window_problem(decision.exclusive_ms):
                    raise ValueError(problem)
                self._checked = decision
        except (Exception, SystemExit) as error:
            self._fail(one_line(error))
            return self._decode_alone
        if self._overrun_ms and decision.exclusive_ms:
            paid = min(self._overrun_ms, decision.exclusive_ms)
            self._overrun_ms -= paid
            decision = Decision(decision.share, decision.exclusive_ms - paid)
        return decision

    def predicted_ms(self, decode_units: int) -> tuple[float, float]:
        """Gap and bound of the step last decided, if decode has ``decode_units``; NaN where there is no forecast."""
        share = self._place.get(decode_units)
        if self._forecast is None or share is None:
            return math.nan, math.nan
        forecast = self._forecast.behind_window  # what decode has, no unit holds
        return forecast.gap_ms[share], forecast.bound_ms[share]

    def decided(self, cpu_ms: float) -> None:
        """The decision took ``cpu_ms`` of thread CPU time."""
        if cpu_ms > DECISION_LIMIT_MS and not self.failure:
            self._fail(f"a decision took {cpu_ms:.1f} ms, the limit is {DECISION_LIMIT_MS:.0f} ms")

    def idle(self, finetune: FinetuneState) -> Share:
        """The share while decode has no request."""
        if self.failure:
            return self._decode_alone.share
        try:
            share = self._policy.idle(finetune)
            if problem := share_problem(share, self._menu, of_step=False):
                raise ValueError(problem)
        except (Exception, SystemExit) as error:
            self._fail(one_line(error))
            return self._decode_alone.share
        return share

    def observe(self, row: StepRecord) -> None:
        """Keep the row, charge a window's overrun, and tell the policy."""
        self.rows.append(row)
        if row.exclusive_ms:
            self._overrun_ms += max(0.0, row.window_ms - row.exclusive_ms)
        if self.failure:
            return
        try:
            if self.predictor is not None:
                self.predictor.observe(row)
            self._policy.observe(row)
        except (Exception, SystemExit) as error:
            self._fail(one_line(error))

    def _fail(self, reason: str) -> None:
        self._forecast = None
        self.failure = f"policy {self.name} is switched off and finetuning pauses: {reason}".splitlines()[0]
