"""Finetune tokens/s beside decode: a line in decode's load for every split, and a factor for the finetune shape.

Tokens are credited when a unit ends, so a single step's are mostly 0 or a whole unit's; only sums over
an operating point mean something. The line is least squares over the points' rates, weighted by their
time, and never rises with the load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from predictor.base import Floats
from predictor.dataset import Dataset

LINE_POINTS = 6
"""A split with fewer points has one rate for every load."""


@dataclass(frozen=True)
class Rate:
    """Per split, in the order of ``menu.splits``: tokens/s at a solo gap of 0, and their loss per ms of solo gap."""

    level: tuple[float, ...]
    loss_per_ms: tuple[float, ...]
    low_ms: float
    """Solo gaps are cut to what was seen."""
    high_ms: float
    shapes: tuple[tuple[int, int, float], ...]
    """Tokens of a micro-batch, kept layers, and their factor."""

    @classmethod
    def fit(cls, data: Dataset, solo_ms: Floats) -> Self:
        """Fit to the rows beside finetuning whose tokens are known; without any, the rates are 0.

        A split without such rows has the mean rate per compute unit of the others.
        """
        chosen = ~data.solo & np.isfinite(data.finetune_tokens)
        rows, solo_ms = data.take(chosen), solo_ms[chosen]
        splits = data.menu.splits
        if not len(rows):
            return cls((0.0,) * len(splits), (0.0,) * len(splits), 0.0, 0.0, ())
        seconds = rows.gap_ms * rows.weight / 1e3
        tokens = rows.finetune_tokens * rows.weight
        mean = _ratio(tokens, seconds, rows.share, len(splits) + 1)[1:]
        expected = seconds * mean[rows.share - 1]
        shapes, index = np.unique(np.stack([rows.microbatch_tokens, rows.kept_layers], 1), axis=0, return_inverse=True)
        factor = _ratio(tokens, expected, index.reshape(-1), len(shapes))
        tokens = tokens / np.maximum(factor[index.reshape(-1)], 1e-9)
        per_unit = tokens.sum() / np.sum(seconds * rows.finetune_units)
        lines = []
        for place, share in enumerate(splits):
            at = rows.share == place + 1
            lines.append(_line(tokens[at], seconds[at], solo_ms[at], rows.point[at]))
            if not at.any():
                lines[-1] = (float(per_unit * share.finetune), 0.0)
        return cls(
            tuple(level for level, _ in lines),
            tuple(loss for _, loss in lines),
            float(solo_ms.min()),
            float(solo_ms.max()),
            tuple((int(size), int(kept), float(part)) for (size, kept), part in zip(shapes, factor, strict=True)),
        )

    def shape_factor(self, microbatch_tokens: int, kept_layers: int) -> float:
        """Of the nearest shape that was measured."""

        def distance(shape: tuple[int, int, float]) -> tuple[int, int]:
            return abs(shape[0] - microbatch_tokens), abs(shape[1] - kept_layers)

        return min(self.shapes, key=distance)[2] if self.shapes else 1.0

    def tokens_per_s(self, solo_ms: Floats, microbatch_tokens: int, kept_layers: int) -> Floats:
        """At every share but "finetune alone", decode alone first: [rows, shares]."""
        load = np.clip(solo_ms, self.low_ms, self.high_ms)[:, None]
        beside = np.maximum(0.0, np.array(self.level) - np.array(self.loss_per_ms) * load)
        return np.hstack([np.zeros((len(load), 1)), beside * self.shape_factor(microbatch_tokens, kept_layers)])


def _ratio(above: Floats, below: Floats, group: NDArray[np.int64], groups: int) -> Floats:
    """Sums of ``above`` over sums of ``below``, by group; 0 for an empty one."""
    sums = np.bincount(group, below, groups)
    return np.asarray(np.bincount(group, above, groups) / np.where(sums > 0.0, sums, 1.0))


def _line(tokens: Floats, seconds: Floats, solo_ms: Floats, point: NDArray[np.int64]) -> tuple[float, float]:
    """Level and loss per ms of one split."""
    points, index = np.unique(point, return_inverse=True)
    time_s = np.bincount(index, seconds)
    rate = np.bincount(index, tokens) / np.where(time_s > 0.0, time_s, 1.0)
    load = np.bincount(index, solo_ms) / np.bincount(index)
    mean_rate = np.average(rate, weights=time_s) if len(points) else 0.0
    if len(points) < LINE_POINTS or np.ptp(load) == 0.0:
        return float(mean_rate), 0.0
    mean_load = np.average(load, weights=time_s)
    spread = load - mean_load
    loss = max(0.0, -float(np.sum(time_s * spread * rate) / np.sum(time_s * spread**2)))
    return float(mean_rate + loss * mean_load), loss
