"""Bending a linear base, so that monotone trees can follow a gap that rises in steps or ever more slowly.

Trees whose factor never falls cannot take back what a line has risen too much. So inside the range that
was seen the base rises as a power of the line, below 1, and the trees add the rest; outside it goes on in
proportion to the line. Whatever the power, the bent base never falls where the line rises.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from predictor.base import Floats


class Bend(NamedTuple):
    """scale * x ** power within [low_ms, high_ms], and proportional to x outside."""

    power: float
    low_ms: float
    high_ms: float
    scale: float


UNBENT = Bend(1.0, 1.0, 1.0, 1.0)


def bend(line_ms: Floats, bends: Floats) -> Floats:
    """The bent base in ms [rows] of positive lines [rows]; ``bends`` is one Bend, or one per row, [..., 4]."""
    power, low_ms, high_ms, scale = np.moveaxis(bends, -1, 0)
    inside = np.clip(line_ms, low_ms, high_ms)
    return np.asarray(scale * inside**power * (line_ms / inside))


def fit_bend(line_ms: Floats, gap_ms: Floats, power: float) -> Bend:
    """The Bend of this power that has the gaps' geometric mean; UNBENT for a power of 1 or without rows."""
    if power == 1.0 or not len(line_ms):
        return UNBENT
    scale = float(np.exp(np.mean(np.log(gap_ms) - power * np.log(line_ms))))
    return Bend(power, float(line_ms.min()), float(line_ms.max()), scale)
