"""Times in which other processes had decode's cores: what a step took then says nothing about the device."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from predictor.base import Floats

NEIGHBOURS = 9
"""Steps whose median is looked at: a single late step is the device's own noise and stays."""
LEAST_SHARE = 0.85
"""Of what decode's threads usually have of their cores; where they spin that is 95% of a step."""


def disturbed(decode_cpu_ms: Floats, step_ms: Floats, decode_units: Floats) -> NDArray[np.bool_]:
    """Steps around which decode's threads got much less of their cores than usual; arrays are [steps], in order.

    ``step_ms`` is without the exclusive window. Where CPU time is unknown (NaN) nothing was disturbed.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        share = decode_cpu_ms / (step_ms * decode_units)
    for units in np.unique(decode_units):
        mine = (decode_units == units) & np.isfinite(share)
        if mine.any():
            share[mine] /= np.median(share[mine])
    share = np.where(np.isfinite(share), share, 1.0)
    if len(share) < NEIGHBOURS:
        return np.zeros(len(share), dtype=np.bool_)
    around = sliding_window_view(np.pad(share, NEIGHBOURS // 2, mode="edge"), NEIGHBOURS)
    return np.asarray(np.median(around, axis=1) < LEAST_SHARE)
