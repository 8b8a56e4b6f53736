"""Figures of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from harli.records.reader import Record
from harli.tracking.course import course

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design" (2008): told apart with any colour vision.
BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"


def timeline(record: Record) -> Figure:
    """The course of a run: batch, ITL against the SLO, KV cache, finetune share, tokens/s and loss over time."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    run, info = course(record), record.info
    figure = Figure(figsize=(9, 8), dpi=120, layout="constrained")
    batch, itl, cache, share, rate, loss = figure.subplots(6, sharex=True, height_ratios=(2, 3, 2, 2, 2, 2))

    batch.fill_between(run.time_s, run.batch, step="mid", color=BLUE, alpha=0.35, linewidth=0)
    batch.step(run.time_s, run.batch, where="mid", color=BLUE, linewidth=1)
    batch.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    batch.set_ylabel("batch\n(requests)")

    itl.plot(run.time_s, run.itl_p99_ms, color=ORANGE, linewidth=1, label="P99")
    itl.plot(run.time_s, run.itl_p50_ms, color=BLUE, linewidth=1, label="median")
    for name, slo_ms, style in (("ITL", info.slo.itl_ms, "--"), ("TPOT", info.slo.tpot_ms, ":")):
        if slo_ms is not None:
            itl.axhline(slo_ms, color=VERMILION, linestyle=style, label=f"{name} SLO, {slo_ms:.4g} ms")
    itl.set_ylabel("ITL\n(ms)")
    itl.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=4, frameon=False, fontsize="small")

    parts = {"requests": (run.kv_used, BLUE), "lent": (run.kv_lent, GREEN)}
    cache.stackplot(
        run.time_s,
        [np.nan_to_num(values) for values, _ in parts.values()],
        labels=list(parts),
        colors=[color for _, color in parts.values()],
        alpha=0.5,
        linewidth=0,
    )
    cache.set_ylabel("KV cache\n(decoding)")
    cache.set_ylim(0, 1)
    cache.yaxis.set_major_formatter(PercentFormatter(1.0))
    cache.legend(loc="lower right", bbox_to_anchor=(1, 0.95), ncols=2, frameon=False, fontsize="small")

    share.fill_between(run.time_s, run.finetune_share, step="mid", color=GREEN, alpha=0.6, linewidth=0)
    share.set_ylabel("finetune share\nwhile decoding")
    share.set_ylim(0, 1)
    share.yaxis.set_major_formatter(PercentFormatter(1.0))

    rate.step(run.time_s, run.finetune_tokens_per_s, where="mid", color=GREEN, linewidth=1)
    rate.set_ylabel("finetune\n(tokens/s)")

    seen = np.isfinite(run.loss)
    loss.plot(run.time_s[seen], run.loss[seen], color=PURPLE, linewidth=1, marker=".", markersize=2)
    loss.set_ylabel("loss")
    loss.set_xlabel("time (s)")
    loss.set_xlim(0, run.time_s[-1] + run.time_s[0])

    for axes in (batch, itl, rate):
        axes.set_ylim(bottom=0)
    for axes in figure.axes:
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    figure.suptitle(
        f"{info.policy} on {info.model.rstrip('/').split('/')[-1]}{' (simulated)' if info.simulated else ''}"
    )
    return figure
