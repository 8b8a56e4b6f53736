"""What the raw rows of a profile say about units, windows and switches."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from harli.records.columns import column
from harli.types import Costs, UnitTime
from predictor.units import units_per_pass

LEAST_ROWS = 3
"""Fewer measurements of a unit than this say nothing."""
AFTER_SWITCH = 4
"""Steps that the first one after a switch is compared with."""
TAIL = 95.0
"""Percentile of what a window overruns."""


def unit_times(units: pa.Table, layers: int, accumulation: int) -> tuple[UnitTime, ...]:
    """Times of units by kind, compute units and shape; beside decode only where there are none alone."""
    columns = ("kind", "units", "microbatch_tokens", "kept_layers", "beside_decode", "duration_ms")
    found: dict[tuple[str, int, int, int], tuple[list[float], list[float]]] = {}
    for kind, size, microbatch, kept, beside, duration_ms in zip(
        *(units[name].to_pylist() for name in columns), strict=True
    ):
        both = found.setdefault((kind, size, microbatch, kept), ([], []))
        both[beside].append(duration_ms)
    times = []
    for key, (alone, beside) in sorted(found.items()):
        chosen = alone if len(alone) >= LEAST_ROWS else alone + beside
        per_pass = units_per_pass(layers, key[3], accumulation).get(key[0], 0.0)
        if per_pass and len(chosen) >= LEAST_ROWS:
            times.append(UnitTime(*key, per_pass, float(np.mean(chosen))))
    return tuple(times)


def alone_tokens_per_s(times: tuple[UnitTime, ...], units: pa.Table) -> dict[tuple[int, int], float]:
    """Finetuning's rate with nothing beside it and no layer kept, by compute units and tokens of a micro-batch."""
    rates = {}
    for size, microbatch in sorted({(time.units, time.microbatch_tokens) for time in times}):
        shape = (size, microbatch, 0)
        mine = [time for time in times if (time.units, time.microbatch_tokens, time.kept_layers) == shape]
        if {"forward", "backward"} <= {time.kind for time in mine}:
            pass_ms = sum(time.per_pass * time.mean_ms for time in mine)
            mask = np.equal(units["microbatch_tokens"].to_numpy(), microbatch) & (units["tokens"].to_numpy() > 0)
            working = sum(time.per_pass for time in mine if time.kind != "optimizer")
            rates[size, microbatch] = 1e3 * working * float(units["tokens"].to_numpy()[mask].mean()) / pass_ms
    return rates


def costs(steps: pa.Table, all_units: int) -> Costs:
    """What switching to decode alone and opening a window cost; 0 for what was not measured.

    Args:
        steps: columns of PROFILE_STEPS, in the order of time.
        all_units: compute units of the device.
    """
    columns = ("gap_ms", "exclusive_ms", "decode_units", "batch", "admitted")
    gap, asked, decode, batch, admitted = (column(steps, name) for name in columns)
    labelled = steps["segment"].to_numpy() >= 0
    plain = np.isfinite(gap) & (admitted == 0)

    switches = []
    for index in np.flatnonzero((decode[1:] == all_units) & (decode[:-1] < all_units)) + 1:
        after = slice(index + 1, index + 1 + AFTER_SWITCH)
        same = plain[after].all() and (batch[after] == batch[index]).all() and (decode[after] == all_units).all()
        if plain[index] and same and len(gap[after]) == AFTER_SWITCH and not asked[index]:
            switches.append(gap[index] - np.median(gap[after]))

    overhead = 0.0
    opened = labelled & plain & (asked > 0)
    if opened.any():
        beside = labelled & plain & (asked == 0) & (decode == all_units) & np.isin(batch, batch[opened])
        if beside.any():
            overhead = np.percentile(gap[opened] - asked[opened], TAIL) - np.percentile(gap[beside], TAIL)
    return Costs(
        switch_ms=max(0.0, float(np.median(switches))) if switches else 0.0,
        window_overhead_ms=max(0.0, float(overhead)),
    )
