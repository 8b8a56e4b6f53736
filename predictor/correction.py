"""Keeping a predictor right while it is used: a busy neighbour, a hot processor, a load unlike the profile.

Two running numbers per side (decode alone, splits), both on log(actual / forecast) of the steps that
have ended:

- *shift*, the median of the last ``WINDOW`` steps: a machine that is 1.5 times slower moves it to
  log 1.5 within ``WINDOW // 2 + 1`` steps, and one straggler hardly at all;
- *margin*, by quantile tracking: up by ``STEP * coverage`` when a gap exceeds its corrected bound, down
  by ``STEP * (1 - coverage)`` when it does not, which holds the long-run coverage on any sequence (Gibbs
  and Candès, "Adaptive Conformal Inference Under Distribution Shift", 2021; Angelopoulos, Candès and
  Tibshirani, "Conformal PID Control for Time Series Prediction", 2023, whose scorecaster the shift is).

While a shift is still on its way the margin stands in for it, and gives that back when it arrives. A side
that has had no step for long follows the other.

A gap is multiplied by exp(shift), a bound by exp(max(0, shift) + margin) with margin >= 0: never below
what was calibrated. However slow one step is, it widens a bound by exp(STEP), 5%, at most, plus one
place in the order of the shift's window.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque

import numpy as np

from harli.rows import StepRecord
from harli.types import DecodeState, FinetuneState
from predictor.base import Floats, Forecast, Outlook, Predictor
from predictor.dataset import STALL_MS

WINDOW = 31
ENOUGH = 9
"""Steps that a shift needs."""
STEP = 0.05
STALE = 100
"""After this many steps of the other side a side follows the other: it must be able to find that all is well again."""
KEPT = 4
"""Steps whose factors are kept until they end; an asynchronous engine begins a step before the last is observed."""


class Correction:
    """One side's running numbers."""

    def __init__(self, coverage: float) -> None:
        self.coverage = coverage
        self.shift = self.margin = 0.0
        self._anchor = 0.0
        self._last: deque[tuple[float, float]] = deque()
        self._sorted: list[float] = []

    @property
    def ready(self) -> bool:
        """It has seen enough steps."""
        return len(self._last) >= ENOUGH

    def forget(self) -> None:
        """Begin again."""
        self.shift = self.margin = self._anchor = 0.0
        self._last.clear()
        self._sorted.clear()

    def observe(self, gap: float, bound: float) -> None:
        """A step's log(actual / forecast gap) and log(actual / forecast bound), the forecasts uncorrected."""
        missed = bound > max(0.0, self.shift) + self.margin
        self.margin = max(0.0, self.margin + STEP * (self.coverage if missed else self.coverage - 1.0))
        if len(self._last) == WINDOW:
            del self._sorted[bisect_left(self._sorted, self._last.popleft()[0])]
        self._last.append((gap, self.margin))
        insort(self._sorted, gap)
        if self.ready:
            self.shift = self._sorted[len(self._sorted) // 2]
            self._rebase()

    def _rebase(self) -> None:
        """While the shift was still on its way the margin stood in for it: take back what it grew in that time."""
        moved = max(0.0, self.shift) - self._anchor
        if abs(moved) > STEP:
            self._anchor += moved
            if moved > 0.0:
                self.margin = min(self.margin, max(self._last[0][1], self.margin - moved))


class CorrectedPredictor(Predictor):
    """Another predictor's forecasts, corrected by what has been observed of them."""

    def __init__(self, inner: Predictor, coverage: float) -> None:
        """``coverage``: what the bounds of ``inner`` were calibrated for."""
        self.menu = inner.menu
        self.costs = inner.costs
        self.unit_times = inner.unit_times
        self.finetune_alone_tokens_per_s = inner.finetune_alone_tokens_per_s
        self._inner = inner
        self._share = {share.decode: place for place, share in enumerate(self.menu.shares[:-1])}
        shares = len(self._share)
        self._forecast, self._freed = (Forecast([0.0] * shares, [0.0] * shares) for _ in range(2))
        self._at = (math.nan, -1)
        self._factors = (1.0, 1.0, 1.0, 1.0)
        """Of gap and bound, decode alone and beside finetuning; never changed, only replaced."""
        self._kept = [(-1, self._factors)] * KEPT
        self._sides = (Correction(coverage), Correction(coverage))
        self._since = [0, 0]
        """Steps since a side was observed."""
        self._observed = 0

    def forecast(self, decode: DecodeState, finetune: FinetuneState) -> Forecast:
        at = (decode.time_s, decode.step)
        forecast = self._forecast
        if at == self._at:
            return forecast
        self._at = at
        raw, factors = self._inner.forecast(decode, finetune), self._factors
        self._kept[decode.step % KEPT] = (decode.step, factors)
        gap, bound, split_gap, split_bound = factors
        gaps, bounds, raw_gaps, raw_bounds = forecast.gap_ms, forecast.bound_ms, raw.gap_ms, raw.bound_ms
        gaps[0] = raw_gaps[0] * gap
        bounds[0] = raw_bounds[0] * bound
        for share in range(1, len(gaps)):
            gaps[share] = raw_gaps[share] * split_gap
            bounds[share] = raw_bounds[share] * split_bound
        forecast.finetune_tokens_per_s = raw.finetune_tokens_per_s
        forecast.known = raw.known
        forecast.freed = None
        if finetune.held_units:
            self._without_held(finetune.held_units)
        return forecast

    def outlook(self, batch: Floats, context_sum: Floats, finetune: FinetuneState) -> Outlook:
        raw = self._inner.outlook(batch, context_sum, finetune)
        gap, bound, split_gap, split_bound = self._factors
        splits = len(self._share) - 1
        return Outlook(
            raw.gap_ms * np.array([gap] + [split_gap] * splits),
            raw.bound_ms * np.array([bound] + [split_bound] * splits),
            raw.finetune_tokens_per_s,
        )

    def observe(self, row: StepRecord) -> None:
        """Learn from a step, at the share that it really had; steps after idling, stalls and the like teach nothing."""
        step, factors = self._kept[row.step % KEPT]
        share = self._share.get(row.decode_units)
        actual_ms = row.gap_ms - row.window_ms
        # A NaN fails every comparison.
        if share is None or step != row.step or not actual_ms > 0.0 or row.window_ms >= STALL_MS:
            return
        if not row.predicted_ms > 0.0 or (share and not row.finetune_units):
            return
        side, other = (1, 0) if share else (0, 1)
        gap, bound = factors[2 * side], factors[2 * side + 1]
        correction = self._sides[side]
        if self._since[side] >= STALE:
            correction.forget()
        correction.observe(math.log(actual_ms / row.predicted_ms * gap), math.log(actual_ms / row.bound_ms * bound))
        self._since[side] = 0
        self._since[other] += 1
        self._observed += 1
        self._update()

    def state(self) -> dict[str, float]:
        """The factors in force, and the number of steps learned from."""
        names = ("gap_factor_alone", "bound_factor_alone", "gap_factor_split", "bound_factor_split")
        return {**dict(zip(names, self._factors, strict=True)), "steps": float(self._observed)}

    def _without_held(self, held_units: int) -> None:
        """A share that wants units of a unit that still runs gets no more of decode than those units leave."""
        forecast, freed, shares = self._forecast, self._freed, self.menu.shares
        gaps, bounds = forecast.gap_ms, forecast.bound_ms
        freed.gap_ms[:], freed.bound_ms[:] = gaps, bounds
        freed.finetune_tokens_per_s, freed.known = forecast.finetune_tokens_per_s, forecast.known
        forecast.freed = freed
        free = shares[0].decode - held_units
        place = next((place for place in range(len(gaps)) if shares[place].decode <= free), 0)
        for share in range(place):
            gaps[share], bounds[share] = gaps[place], bounds[place]

    def _update(self) -> None:
        found = []
        for side, other in ((0, 1), (1, 0)):
            used = self._sides[side]
            if (self._since[side] >= STALE or not used.ready) and self._sides[other].ready:
                used = self._sides[other]
            found += [math.exp(used.shift), math.exp(max(0.0, used.shift) + used.margin)]
        self._factors = (found[0], found[1], found[2], found[3])
