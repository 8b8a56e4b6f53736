"""A table's columns as numpy arrays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def column(table: pa.Table, name: str) -> Floats:
    """The column as float64, with NaN where it is null."""
    return np.asarray(table[name].to_numpy(), dtype=np.float64)
