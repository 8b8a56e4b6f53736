"""The course of a run: its record in equal time bins, for charts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from harli.records.columns import Floats, column
from harli.records.reader import Record

BINS = 200


@dataclass(frozen=True)
class Course:
    """Arrays of shape [bins]; NaN where a bin has nothing to show."""

    time_s: Floats
    """The middle of each bin, in seconds since the run began."""
    batch: Floats
    """Mean over time, 0 while decode is idle."""
    itl_p50_ms: Floats
    """Median and P99 of the gaps that ended in the bin, as the clients saw them."""
    itl_p99_ms: Floats
    finetune_share: Floats
    """Mean share of the device's compute units while decode runs; exclusive windows count as all of them."""
    kv_used: Floats
    """Mean fraction of the KV cache that requests use, and that is lent, while decode runs."""
    kv_lent: Floats
    finetune_tokens_per_s: Floats
    """Tokens of committed updates, each spread evenly over the time since the update before."""
    loss: Floats
    """Mean over the bin's updates."""


def course(record: Record) -> Course:
    """``record`` in ``BINS`` equal bins, from its beginning until the last thing that happened in it."""
    begin_s, end_s = _step_times(record.steps)
    gap_end_s, gap_ms = _gaps(record.requests)
    update_s, tokens = column(record.updates, "time_s"), column(record.updates, "tokens")
    last_s = max(record.info.duration_s, *(times.max(initial=0.0) for times in (end_s, gap_end_s, update_s)))
    edges = np.linspace(0.0, last_s or 1.0, BINS + 1)
    width_s = edges[1]

    busy_s = _integral(edges, begin_s, end_s, np.ones_like(begin_s))

    def while_busy(values: Floats) -> Floats:
        """Mean of a step's value over the time in which decode runs."""
        mean: Floats = np.full(BINS, np.nan)
        return np.divide(_integral(edges, begin_s, end_s, values), busy_s, out=mean, where=busy_s > 0.0)

    free, lent, total = (column(record.steps, f"kv_blocks_{name}") for name in ("free", "lent", "total"))
    total = np.maximum(total, 1.0)
    committed = np.interp(edges, np.append(0.0, update_s), np.append(0.0, np.cumsum(tokens)))
    return Course(
        time_s=edges[:-1] + width_s / 2.0,
        batch=_integral(edges, begin_s, end_s, column(record.steps, "batch")) / width_s,
        itl_p50_ms=_per_bin(edges, gap_end_s, gap_ms, np.median),
        itl_p99_ms=_per_bin(edges, gap_end_s, gap_ms, lambda gaps: np.percentile(gaps, 99)),
        finetune_share=while_busy(_finetune_shares(record.steps)),
        kv_used=while_busy(1.0 - (free + lent) / total),
        kv_lent=while_busy(lent / total),
        finetune_tokens_per_s=np.diff(committed) / width_s,
        loss=_per_bin(edges, update_s, column(record.updates, "loss"), np.mean),
    )


def _step_times(steps: pa.Table) -> tuple[Floats, Floats]:
    """When each step began, and when the next one did; a step before idling ends with its forward pass."""
    begin_s = column(steps, "time_s")
    end_s = begin_s + (column(steps, "window_ms") + column(steps, "latency_ms")) / 1000.0
    next_s = np.append(begin_s[1:], np.inf)
    idles = np.isnan(np.append(column(steps, "gap_ms")[1:], np.nan))
    return begin_s, np.where(idles, np.minimum(end_s, next_s), next_s)[: len(begin_s)]


def _finetune_shares(steps: pa.Table) -> Floats:
    """Finetuning's mean share of the compute units in each step, its window included."""
    finetune, window_ms, latency_ms = (column(steps, name) for name in ("finetune_units", "window_ms", "latency_ms"))
    units = (finetune + column(steps, "decode_units")).max(initial=1.0)
    share: Floats = finetune / units
    np.divide(window_ms + latency_ms * share, window_ms + latency_ms, out=share, where=window_ms + latency_ms > 0.0)
    return share


def _gaps(requests: pa.Table) -> tuple[Floats, Floats]:
    """Every gap between two output tokens: when it ended, in seconds since the run began, and its milliseconds."""
    gap_ms = np.asarray(pc.list_flatten(requests["itl_ms"]).to_numpy(), dtype=np.float64)
    counts = pc.list_value_length(requests["itl_ms"]).to_numpy()
    first_token_s = column(requests, "arrival_s") + column(requests, "ttft_ms") / 1000.0
    sums_ms = np.append(0.0, np.cumsum(gap_ms))
    before_ms = sums_ms[np.cumsum(counts) - counts]
    return np.repeat(first_token_s - before_ms / 1000.0, counts) + sums_ms[1:] / 1000.0, gap_ms


def _integral(edges: Floats, begin: Floats, end: Floats, value: Floats) -> Floats:
    """Per bin, the integral of what has ``value`` from each ``begin`` to its ``end`` and is zero in between."""
    knots = np.append(0.0, np.column_stack([begin, end]))
    areas = np.append(0.0, np.column_stack([np.zeros_like(value), value * (end - begin)]))
    return np.diff(np.interp(edges, knots, np.cumsum(areas)))


def _per_bin(edges: Floats, time_s: Floats, values: Floats, statistic: Callable[[Floats], np.floating]) -> Floats:
    finite = np.isfinite(values) & np.isfinite(time_s)
    order = np.argsort(time_s[finite], kind="stable")
    bounds = np.searchsorted(time_s[finite][order], edges[1:-1])
    groups = np.split(values[finite][order], bounds)
    return np.array([statistic(group) if group.size else np.nan for group in groups])
