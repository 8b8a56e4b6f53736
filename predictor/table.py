"""The predictor as a table: latency, bound and finetune rate of one step at every share in microseconds.

The trees become tables over their cells when this is built (``Trees.cells``), so one step costs a
bisection per feature, two look-ups and a line per share; the result is the model's own. What depends
on the finetune shape alone is kept until the shape changes.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right

import numpy as np

from harli.types import DecodeState, FinetuneState
from predictor.artifact import Artifact
from predictor.base import STATE, Floats, Forecast, Outlook, Predictor
from predictor.dataset import states
from predictor.features import SHAPE
from predictor.latency_model import LEAST_MS
from predictor.ranges import FAR, GROWTH
from predictor.trees import Cells, Trees

Axis = tuple["array[float]", int]
"""A feature's thresholds and stride; no threshold where the trees do not use it.

An array, since a step of decode has emptied the caches: a tuple's floats lie all over memory.
"""
NO_AXIS: Axis = (array("d"), 0)


class TablePredictor(Predictor):
    """Forecasts from an artifact. Raises HarliError when the model is too large for a table."""

    def __init__(self, artifact: Artifact) -> None:
        self.menu = artifact.menu
        self.costs = artifact.costs
        self.unit_times = artifact.unit_times
        self.finetune_alone_tokens_per_s = artifact.finetune_alone_tokens_per_s
        self._artifact = artifact
        self._bounds, self._ranges, self._rate = artifact.bounds, artifact.ranges, artifact.rate
        self._model = artifact.model.compiled()
        shares = len(self.menu.shares) - 1
        self._forecast = Forecast([0.0] * shares, [0.0] * shares, [0.0] * shares)
        self._at = (math.nan, -1)
        self._solo_base = tuple(self._model.solo_base.tolist())
        self._solo, self._corun = _Lookup(self._model.solo_trees), _Lookup(self._model.corun_trees)
        self._least_batch, self._largest = artifact.ranges.inner
        self._shape = (-1, -1)
        self._splits: list[tuple[int, list[float], float, float]] = []
        self._offsets: list[int] = []
        self._solo_offset = self._solo.offset(0.0, 0.0, 0.0)

    def forecast(self, decode: DecodeState, finetune: FinetuneState) -> Forecast:
        at = (decode.time_s, decode.step)
        forecast = self._forecast
        if at == self._at:
            return forecast
        self._at = at
        shape = (finetune.microbatch_tokens, finetune.kept_layers)
        if shape != self._shape:
            self._set_shape(*shape)
        batch, context, longest = decode.batch, decode.context_sum, decode.context_max
        prefill, admitted = decode.prefill_tokens, decode.admitted

        base, solo, corun = self._solo_base, self._solo, self._corun
        solo_ms = base[0] + base[1] * batch + base[2] * context + base[3] * prefill + base[4] * admitted
        if solo_ms < LEAST_MS:
            solo_ms = LEAST_MS
        solo_ms *= solo.values[self._solo_offset + solo.state_cell(batch, context, longest, prefill, admitted)]
        cell = corun.state_cell(batch, context, longest, prefill, admitted)
        thresholds, stride = corun.solo_axis
        cell += stride * bisect_left(thresholds, solo_ms)

        bounds, rate = self._bounds, self._rate
        alone_factor = bounds.solo_factors[bisect_right(bounds.solo_edges, solo_ms)]
        split_factor = bounds.split_factors[bisect_right(bounds.split_edges, solo_ms)]
        load = min(max(solo_ms, rate.low_ms), rate.high_ms)
        gaps, limits, rates = forecast.gap_ms, forecast.bound_ms, forecast.finetune_tokens_per_s
        gaps[0] = solo_ms
        limits[0] = solo_ms * alone_factor
        values, offsets = corun.values, self._offsets
        for share, line, level, loss in self._splits:
            one, slope, per_batch, per_context, per_prefill, per_admitted = line
            gap_ms = one + slope * solo_ms + per_batch * batch + per_context * context
            gap_ms += per_prefill * prefill + per_admitted * admitted
            if gap_ms < LEAST_MS:
                gap_ms = LEAST_MS
            gap_ms *= values[offsets[share] + cell]
            if gap_ms < solo_ms:
                gap_ms = solo_ms
            gaps[share] = gap_ms
            limits[share] = gap_ms * split_factor
            tokens_per_s = level - loss * load
            rates[share] = tokens_per_s if tokens_per_s > 0.0 else 0.0

        forecast.known = True
        most = self._largest
        if (
            batch > most[0]
            or batch < self._least_batch
            or context > most[1]
            or longest > most[2]
            or prefill > most[3]
            or admitted > most[4]
        ):
            distances = self._ranges.distances((batch, context, longest, prefill, admitted))
            for share, distance in enumerate(distances):
                limits[share] *= 1.0 + GROWTH * distance
            forecast.known = min(distances) <= FAR
        return forecast

    def outlook(self, batch: Floats, context_sum: Floats, finetune: FinetuneState) -> Outlook:
        artifact, shares = self._artifact, np.arange(len(self.menu.shares) - 1)
        batch, context_sum = (np.asarray(values, dtype=np.float64)[:, None] for values in (batch, context_sum))
        mean = context_sum / np.maximum(batch, 1.0)
        data = states(
            self.menu,
            np.broadcast_to(shares, (len(batch), len(shares))).ravel(),
            np.broadcast_to(batch, (len(batch), len(shares))).ravel(),
            np.broadcast_to(context_sum, (len(batch), len(shares))).ravel(),
            context_max=np.repeat(np.minimum(context_sum, mean * artifact.context_skew), len(shares)),
            microbatch_tokens=finetune.microbatch_tokens,
            kept_layers=finetune.kept_layers,
        )
        solo_ms, gap_ms = self._model.predict_solo(data), self._model.predict(data)
        bound_ms = artifact.bound(data, gap_ms, solo_ms)
        table = (len(batch), len(shares))
        rates = self._rate.tokens_per_s(solo_ms.reshape(table)[:, 0], finetune.microbatch_tokens, finetune.kept_layers)
        return Outlook(gap_ms.reshape(table), bound_ms.reshape(table), rates)

    def _set_shape(self, microbatch_tokens: int, kept_layers: int) -> None:
        """Everything that follows from share and finetune shape."""
        rate = self._rate
        factor = rate.shape_factor(microbatch_tokens, kept_layers)
        lines = zip(self._model.corun_base.tolist(), rate.level, rate.loss_per_ms, strict=True)
        self._splits = [
            (place, line, level * factor, loss * factor) for place, (line, level, loss) in enumerate(lines, 1)
        ]
        self._offsets = [
            self._corun.offset(share.finetune_share, float(microbatch_tokens), float(kept_layers))
            for share in self.menu.shares[:-1]
        ]
        self._shape = (microbatch_tokens, kept_layers)


class _Lookup:
    """Places in one ensemble's table."""

    def __init__(self, trees: Trees | Cells | None) -> None:
        assert not isinstance(trees, Trees)
        self.values = array("d", [1.0]) if trees is None else trees.values
        axes = (
            {}
            if trees is None
            else {
                name: (array("d", thresholds), stride)
                for name, thresholds, stride in zip(trees.features, trees.thresholds, trees.strides, strict=True)
            }
        )
        self.solo_axis: Axis = axes.get("solo_ms", NO_AXIS)
        self._state: tuple[Axis, ...] = tuple(axes.get(name, NO_AXIS) for name in STATE)
        self._shape: tuple[Axis, ...] = tuple(axes.get(name, NO_AXIS) for name in SHAPE)

    def state_cell(self, batch: int, context: int, longest: int, prefill: int, admitted: int) -> int:
        """What the state adds to the place."""
        (b, step_b), (c, step_c), (m, step_m), (p, step_p), (a, step_a) = self._state
        return (
            bisect_left(b, batch) * step_b
            + bisect_left(c, context) * step_c
            + bisect_left(m, longest) * step_m
            + bisect_left(p, prefill) * step_p
            + bisect_left(a, admitted) * step_a
        )

    def offset(self, *shape: float) -> int:
        """What share and finetune shape add to it."""
        return sum(bisect_left(axis[0], value) * axis[1] for axis, value in zip(self._shape, shape, strict=True))
