"""Decide and observe: the policy, kept from doing harm, and the record of what happened."""

from __future__ import annotations

import math
from collections import deque

from harli.rows import StepRecord
from harli.types import Decision, DecodeState, FinetuneState, Share
from policies.base import Policy
from predictor.base import Forecast, Predictor

ROWS_KEPT = 1 << 16
DECISION_LIMIT_MS = 10.0
WINDOW_LIMIT_MS = 60_000.0


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
        self._shares = frozenset(policy.context.menu.shares)
        self._decode_alone = self._checked = Decision(policy.context.menu.decode_alone)
        self._overrun_ms = 0.0
        self._forecast: Forecast | None = None
        self._place = {share.decode: place for place, share in enumerate(policy.context.menu.shares[:-1])}

    def decide(self, decode: DecodeState, finetune: FinetuneState) -> Decision:
        """The policy's decision; its window is shortened by what earlier windows overran."""
        if self.failure:
            return self._decode_alone
        try:
            if self.predictor is not None:
                self._forecast = self.predictor.forecast(decode, finetune)
            decision = self._policy.decide(decode, finetune)
            if decision is not self._checked:  # decisions are immutable, and most policies keep theirs
                self._check_step(decision)
                self._checked = decision
        except (Exception, SystemExit) as error:
            self._fail(f"{type(error).__name__}: {error}")
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
        return self._forecast.gap_ms[share], self._forecast.bound_ms[share]

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
            self._check(share)
        except (Exception, SystemExit) as error:
            self._fail(f"{type(error).__name__}: {error}")
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
            self._fail(f"{type(error).__name__}: {error}")

    def _check(self, share: Share) -> None:
        if share not in self._shares:
            raise ValueError(f"share {share} is not on the menu")

    def _check_step(self, decision: Decision) -> None:
        self._check(decision.share)
        if not decision.share.decode:
            raise ValueError(f"share {decision.share} leaves a decode step nothing to run on")
        if not 0.0 <= decision.exclusive_ms <= WINDOW_LIMIT_MS:
            raise ValueError(f"a window of {decision.exclusive_ms} ms is not between 0 and {WINDOW_LIMIT_MS:.0f} ms")

    def _fail(self, reason: str) -> None:
        self._forecast = None
        self.failure = f"policy {self.name} is switched off and finetuning pauses: {reason}".splitlines()[0]
