"""What policies are tried on: a device that is exact, and a walk through the states that occur."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from harli.types import Costs, DecodeState, FinetuneState, Menu, Share, UnitTime
from predictor.base import Floats, Forecast, Outlook, Predictor

MENU = Menu((Share(4, 0), Share(3, 1), Share(2, 2), Share(1, 3), Share(0, 4)))
MAX_BATCH = 32
STATES = 1000

States = Sequence[tuple[DecodeState, FinetuneState]]


class ExactPredictor(Predictor):
    """A device whose steps take exactly what is forecast, so that bound and gap are the same.

    Alone a step takes ``8 + batch + 0.001 context + 0.05 prefill`` ms; half of it grows as decode's part shrinks.
    """

    def __init__(self, menu: Menu) -> None:
        self.menu = menu
        self.costs = Costs(switch_ms=2.0, window_overhead_ms=1.0)
        units = menu.finetune_alone.finetune
        self.unit_times = tuple(
            UnitTime(kind, units, 256, 0, 4.0, mean_ms) for kind, mean_ms in (("forward", 4.0), ("backward", 8.0))
        )
        self.finetune_alone_tokens_per_s = 400.0
        shares = [share.finetune_share for share in menu.shares[:-1]]
        self._slowdowns = [0.5 + 0.5 / (1.0 - share) for share in shares]
        self._rates = [0.9 * share * self.finetune_alone_tokens_per_s for share in shares]
        self._forecast = Forecast()

    def forecast(self, decode: DecodeState, finetune: FinetuneState) -> Forecast:
        alone = 8.0 + decode.batch + 1e-3 * decode.context_sum + 0.05 * decode.prefill_tokens
        forecast = self._forecast
        forecast.gap_ms = forecast.bound_ms = [alone * slowdown for slowdown in self._slowdowns]
        forecast.finetune_tokens_per_s = self._rates
        return forecast

    def outlook(self, batch: Floats, context_sum: Floats, finetune: FinetuneState) -> Outlook:
        gap: Floats = (8.0 + batch + 1e-3 * context_sum)[:, None] * np.array(self._slowdowns)
        return Outlook(gap, gap, np.tile(self._rates, (len(batch), 1)))


def random_states(seed: int, count: int = STATES) -> States:
    """A seeded walk through load, contexts, queues, prefill, late requests and pauses of finetuning."""
    random = np.random.default_rng(seed)
    now_s, batch, states = 1000.0, 1, []
    for step in range(1, count + 1):
        now_s += float(random.exponential(60.0) if random.random() < 0.002 else random.uniform(0.005, 0.2))
        before, batch = batch, int(np.clip(batch + random.integers(-3, 4), 1, MAX_BATCH))
        context = int(random.integers(1, 2000)) if random.random() < 0.98 else 100_000
        decode = DecodeState(
            time_s=now_s,
            step=step,
            batch=batch,
            context_sum=batch * context,
            context_max=2 * context,
            prefill_tokens=int(random.integers(1, 512)) if random.random() < 0.1 else 0,
            admitted=max(batch - before, 0),
            waiting=int(random.integers(1, 20)) if random.random() < 0.1 else 0,
            kv_blocks_free=int(random.integers(0, 1000)),
            kv_blocks_total=5000,
            slack_ms=math.inf if random.random() < 0.2 else float(random.uniform(-100.0, 400.0)),
        )
        held = int(random.integers(0, 3)) if random.random() < 0.1 else 0
        ready = bool(random.random() < 0.9)
        states.append(
            (decode, FinetuneState(ready, microbatch_tokens=256, held_units=held, held_ms=3.0 if held else 0.0))
        )
    return states
