"""How a machine's speed changed while it was profiled, and gaps as they are at its usual speed.

The reference point comes back throughout a profile: how long its steps take at a visit, over their median at all of
them, is how slow the machine was. A run's online correction follows that by itself (``predictor.correction``), so what
is learned, and what bounds are calibrated on, are gaps without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from harli.records.columns import column
from predictor.base import Floats
from predictor.disturbance import disturbed

REFERENCE = "reference"
"""The purpose of its segments."""
LEAST_VISITS = 5
"""Fewer say nothing about the time between them."""
VISIT_S = 5.0
"""Segments of one visit are no further apart than this."""


class Visit(NamedTuple):
    """A segment of the reference."""

    time_s: float
    slowness: float
    """Median gap over that of all such segments; above 1 the machine was slow."""
    finetune_units: int


def reference_course(steps: pa.Table, segments: pa.Table) -> list[Visit]:
    """The segments of the reference in order of time.

    Args:
        steps: columns of PROFILE_STEPS; exclusive windows and times of disturbance do not count.
        segments: columns of SegmentRecord.
    """
    rows = [row for row in segments.to_pylist() if row["purpose"] == REFERENCE]
    segment, gap_ms = column(steps, "segment"), column(steps, "gap_ms")
    step_ms = gap_ms - column(steps, "window_ms")
    counts = (column(steps, "exclusive_ms") == 0.0) & np.isfinite(gap_ms)
    counts &= ~disturbed(column(steps, "decode_cpu_ms"), step_ms, column(steps, "decode_units"))
    found: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        mine = gap_ms[counts & (segment == row["segment"])]
        if len(mine):
            found.setdefault(row["finetune_units"], []).append((row["time_s"], float(np.median(mine))))
    course = []
    for units, pairs in found.items():
        middle = float(np.median([median_ms for _, median_ms in pairs]))
        course += [Visit(time_s, median_ms / middle, units) for time_s, median_ms in pairs]
    return sorted(course)


def at_usual_speed(columns: dict[str, Any], time_s: Floats, course: Sequence[Visit]) -> None:
    """Divide the gaps and CPU times in ``columns`` by how slow the machine was at ``time_s`` [rows]."""
    visits: list[list[Visit]] = []
    for visit in course:
        if visits and visit.time_s - visits[-1][-1].time_s <= VISIT_S:
            visits[-1].append(visit)
        else:
            visits.append([visit])
    if len(visits) < LEAST_VISITS:
        return
    times = [float(np.mean([one.time_s for one in visit])) for visit in visits]
    slowness = np.interp(time_s, times, [float(np.median([one.slowness for one in visit])) for visit in visits])
    window_ms = columns["window_ms"]
    columns["gap_ms"] = (columns["gap_ms"] - window_ms) / slowness + window_ms
    columns["decode_cpu_ms"] = columns["decode_cpu_ms"] / slowness
