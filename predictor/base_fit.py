"""Linear bases: non-negative least squares on the relative error (Lawson and Hanson, "Solving Least Squares
Problems", 1974)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from harli.types import HarliError
from predictor.base import Floats
from predictor.dataset import Dataset
from predictor.features import CORUN_TERMS, SOLO_TERMS, matrix

RIDGE = 0.02
"""How strongly a split's base prefers a plain slowdown of the solo gap to terms of its own."""


def solo_base(data: Dataset, terms: Sequence[str] = SOLO_TERMS) -> Floats:
    """Coefficients over SOLO_TERMS for decode alone's gap, those outside ``terms`` 0.

    Raises HarliError without a row of decode alone.
    """
    rows = data.take(data.solo)
    if not len(rows):
        raise HarliError("no step of decode alone among the operating points to fit: more points are needed")
    return _fit(matrix(rows, SOLO_TERMS), rows, [name in terms for name in SOLO_TERMS], np.zeros(len(SOLO_TERMS)))


def corun_base(data: Dataset, solo_ms: Floats, terms: Sequence[str] = CORUN_TERMS) -> Floats:
    """Coefficients over CORUN_TERMS for every split, [splits, CORUN_TERMS], those outside ``terms`` 0.

    A split without a row gets a slowdown of 1 + k * finetune_share, with the largest k of the others.
    """
    used = [name in terms for name in CORUN_TERMS]
    ridge = np.array([RIDGE if name != "solo_ms" in terms else 0.0 for name in CORUN_TERMS])
    base = np.zeros((len(data.menu.splits), len(CORUN_TERMS)))
    steepest, missing = 0.0, []
    for place, share in enumerate(data.menu.splits):
        chosen = data.share == place + 1
        if not chosen.any():
            missing.append(place)
            continue
        rows = data.take(chosen)
        base[place] = _fit(matrix(rows, CORUN_TERMS, solo_ms[chosen]), rows, used, ridge)
        slowdown = float(np.average(rows.gap_ms / solo_ms[chosen], weights=rows.weight))
        steepest = max(steepest, (slowdown - 1.0) / share.finetune_share)
    for place in missing:
        base[place] = proportional(1.0 + steepest * data.menu.splits[place].finetune_share)
    return base


def proportional(slowdown: float) -> Floats:
    """The base, over CORUN_TERMS, of a constant slowdown."""
    return np.array([slowdown if name == "solo_ms" else 0.0 for name in CORUN_TERMS])


def _fit(columns: Floats, rows: Dataset, used: Sequence[bool], ridge: Floats) -> Floats:
    weight = np.sqrt(rows.weight)
    relative = columns / rows.gap_ms[:, None] * weight[:, None]
    # Columns of one size: tokens are thousands, the constant is 1.
    size = np.where(np.any(relative != 0.0, axis=0), np.sqrt(np.mean(relative**2, axis=0)), 1.0)
    penalty = np.diag(ridge * np.sqrt(len(rows)))
    stacked = np.vstack([relative / size, penalty])[:, used]
    coefficients = np.zeros(len(used))
    coefficients[np.asarray(used)] = nnls(stacked, np.concatenate([weight, np.zeros(len(used))]))[0]
    return np.asarray(coefficients / size, dtype=np.float64)
