"""The figure of a profile's quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from harli.records.columns import column
from harli.records.profile import Profile
from harli.tracking.figures import BLUE, GREEN, ORANGE, PURPLE, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, VERMILION)


def quality(
    profile: Profile,
    drift: Sequence[tuple[float, float, int]],
    slowdowns: dict[tuple[str, str], tuple[float, float]],
    rates: dict[str, float],
) -> Figure:
    """Coverage of the space, drift over time, slowdown and finetune tokens/s against the split.

    Args:
        profile: the steps to show as points.
        drift: reference segments: time in seconds, median gap over that of all, compute units of finetuning.
        slowdowns: by split and batch, co-run over solo gap and its spread.
        rates: finetune tokens/s by split.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), dpi=120, layout="constrained")
    space, course, slowdown, rate = figure.subplots(2, 2).flat
    _coverage(space, profile)

    for index, units in enumerate(sorted({entry[2] for entry in drift})):
        mine = [entry for entry in drift if entry[2] == units]
        label = f"finetuning on {units}" if units else "decode alone"
        course.plot([entry[0] for entry in mine], [entry[1] for entry in mine], ".-", color=COLOURS[index], label=label)
    course.axhline(1.0, color="0.5", linewidth=0.8)
    course.set(title="drift: reference against its median", xlabel="time (s)", ylabel="gap")
    if drift:
        course.legend(frameon=False, fontsize="small")

    splits = list(dict.fromkeys(split for split, _ in slowdowns)) or list(rates)
    batches = list(dict.fromkeys(batch for _, batch in slowdowns))
    for index, batch in enumerate(batches):
        places = [place for place, split in enumerate(splits) if (split, batch) in slowdowns]
        values = [slowdowns[splits[place], batch] for place in places]
        slowdown.errorbar(
            places, [v for v, _ in values], [s for _, s in values], marker="o", capsize=3,
            color=COLOURS[index % len(COLOURS)], label=f"batch {batch}",
        )  # fmt: skip
    slowdown.set(title="slowdown beside finetuning", xlabel="split (decode/finetune)", ylabel="co-run over solo gap")
    if batches:
        slowdown.legend(frameon=False, fontsize="small")

    rate.bar(range(len(splits)), [rates.get(split, 0.0) for split in splits], color=GREEN, width=0.5)
    rate.set(title="finetuning beside decode", xlabel="split (decode/finetune)", ylabel="tokens/s")
    for axes in (slowdown, rate):
        axes.set_xticks(range(len(splits)), splits)
    for axes in figure.axes:
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"profile of {profile.info.model.rstrip('/').split('/')[-1]}, {profile.info.role} role")
    return figure


def _coverage(axes: Axes, profile: Profile) -> None:
    steps = profile.steps.filter(np.greater_equal(profile.steps["segment"].to_numpy(), 0))
    batch, total, gap = (column(steps, name) for name in ("batch", "context_sum", "gap_ms"))
    shown = axes.scatter(batch, total / np.maximum(batch, 1), c=gap, s=6, cmap="viridis")
    axes.figure.colorbar(shown, ax=axes, label="gap (ms)")
    axes.set(title="coverage", xlabel="batch", ylabel="mean context", xscale="log", yscale="log")
