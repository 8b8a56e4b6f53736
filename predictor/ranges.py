"""How far a state lies outside the states that were trained on, and what that does to its bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from predictor.base import STATE, Floats
from predictor.dataset import Dataset
from predictor.features import matrix

GROWTH = 0.5
"""A bound is multiplied by 1 + GROWTH * distance; twice the trained batch is a distance of about 0.7."""
FAR = math.log(1.5)
UNSEEN = math.log(4.0)
"""The distance of a share that was not trained on at all."""


@dataclass(frozen=True)
class Ranges:
    """Corners of what was seen, by share ("finetune alone" apart): [shares][STATE]; None for an unseen share.

    The distance is the sum over features of log((1 + value) / (1 + largest)). Small values count for the
    batch alone: gaps do not fall with the load, and contexts begin small.
    """

    least_batch: tuple[float | None, ...]
    largest: tuple[tuple[float, ...] | None, ...]

    @classmethod
    def fit(cls, data: Dataset) -> Self:
        """The ranges of ``data``."""
        least: list[float | None] = []
        largest: list[tuple[float, ...] | None] = []
        for share in range(len(data.menu.shares) - 1):
            rows = matrix(data.take(data.share == share), STATE)
            least.append(float(rows[:, 0].min()) if len(rows) else None)
            largest.append(tuple(rows.max(axis=0).tolist()) if len(rows) else None)
        return cls(tuple(least), tuple(largest))

    @property
    def inner(self) -> tuple[float, tuple[float, ...]]:
        """Least batch and largest values with a distance of 0 at every share; nothing is, with an unseen one."""
        if None in self.largest:
            return math.inf, (-math.inf,) * len(STATE)
        seen = [corner for corner in self.largest if corner is not None]
        return max(low for low in self.least_batch if low is not None), tuple(map(min, zip(*seen, strict=True)))

    def distances(self, state: tuple[float, ...]) -> list[float]:
        """Of one state, by share."""
        found = []
        for least, largest in zip(self.least_batch, self.largest, strict=True):
            if least is None or largest is None:
                found.append(UNSEEN)
                continue
            distance = math.log((1.0 + least) / (1.0 + state[0])) if state[0] < least else 0.0
            for value, limit in zip(state, largest, strict=True):
                if value > limit:
                    distance += math.log((1.0 + value) / (1.0 + limit))
            found.append(distance)
        return found

    def growth(self, data: Dataset) -> Floats:
        """The bound's growth at every row's share."""
        state, distance = np.log1p(matrix(data, STATE)), np.full(len(data), UNSEEN)
        for share, (least, largest) in enumerate(zip(self.least_batch, self.largest, strict=True)):
            if least is not None and largest is not None:
                mine = data.share == share
                below = np.maximum(0.0, math.log1p(least) - state[mine, 0])
                distance[mine] = below + np.maximum(0.0, state[mine] - np.log1p(largest)).sum(axis=1)
        return 1.0 + GROWTH * distance
