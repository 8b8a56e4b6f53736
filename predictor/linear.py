"""The rivals that published systems use: lines in batch and context, no trees."""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np

from predictor.base_fit import corun_base, proportional, solo_base
from predictor.dataset import Dataset
from predictor.latency_model import LatencyModel, Params

TERMS = ("one", "batch", "context_sum")


class LinearPerShare(LatencyModel):
    """a + b * batch + c * context_sum, with its own coefficients for every share."""

    name: ClassVar[str] = "linear"

    @classmethod
    def fit(cls, data: Dataset, params: Params, seed: int) -> Self:
        alone = cls(solo_base(data, TERMS), np.zeros((0, 0)))
        return cls(alone.solo_base, corun_base(data, alone.predict_solo(data), TERMS))


class LinearSlowdown(LatencyModel):
    """a + b * batch + c * context_sum for decode alone, times 1 + k * finetune_share beside finetuning."""

    name: ClassVar[str] = "linear-slowdown"

    @classmethod
    def fit(cls, data: Dataset, params: Params, seed: int) -> Self:
        alone = cls(solo_base(data, TERMS), np.zeros((0, 0)))
        beside = data.take(~data.solo)
        share = np.array([item.finetune_share for item in data.menu.shares])
        # Least squares of gap / solo = 1 + k * share on the relative error.
        slowdown, x = beside.gap_ms / alone.predict_solo(beside), share[beside.share]
        weight = beside.weight / slowdown**2
        k = max(0.0, float(np.sum(weight * x * (slowdown - 1.0)) / np.sum(weight * x * x)))
        return cls(alone.solo_base, np.stack([proportional(1.0 + k * part) for part in share[1:-1]]))
