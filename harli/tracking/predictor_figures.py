"""Figures of a trained predictor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harli.tracking.figures import BLUE, GREEN, ORANGE, PURPLE, VERMILION
from predictor.artifact import Artifact
from predictor.base import Floats
from predictor.dataset import states
from predictor.scoring import Judged, relative_error
from predictor.training import Trained
from predictor.trees import Trees

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 8
COVERAGE_BINS = 4
SIDES = (("decode alone", BLUE), ("beside finetuning", ORANGE))


def figures(trained: Trained) -> dict[str, Figure]:
    """All figures by file name."""
    judged, artifact = trained.winner.judged, trained.artifact
    return {
        "parity.png": parity(judged),
        "error.png": error_by_load(judged),
        "coverage.png": coverage_by_load(judged, artifact),
        "shares.png": latency_by_share(judged, artifact),
        "importance.png": importance(artifact),
    }


def parity(judged: Judged) -> Figure:
    """Predicted against measured gaps of both stages."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, panels = _figure(1, 2, (9, 4.6))
    for axes, (name, colour), rows in zip(panels, SIDES, _sides(judged), strict=True):
        actual_ms, predicted_ms = judged.data.gap_ms[rows], judged.predicted_ms[rows]
        axes.plot(actual_ms, predicted_ms, ".", color=colour, markersize=2, alpha=0.3, rasterized=True)
        if rows.any():
            ends = [float(both(values)) for both, values in ((min, actual_ms), (max, actual_ms))]
            axes.plot(ends, ends, color="0.3", linewidth=0.8)
            mape = relative_error(predicted_ms, actual_ms).mean()
            axes.set_title(f"{name}: MAPE {100 * mape:.1f}%", fontsize="medium")
        axes.set(xscale="log", yscale="log", xlabel="measured gap (ms)", ylabel="predicted gap (ms)")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    return figure


def error_by_load(judged: Judged) -> Figure:
    """MAPE by batch and by summed context."""
    figure, panels = _figure(1, 2, (9, 3.6))
    columns = ((judged.data.batch, "batch (requests)"), (judged.data.context_sum / 1000.0, "context (1000 tokens)"))
    error = 100.0 * relative_error(judged.predicted_ms, judged.data.gap_ms)
    for axes, (values, label) in zip(panels, columns, strict=True):
        for (name, colour), rows in zip(SIDES, _sides(judged), strict=True):
            centre, mean = _binned(values[rows], error[rows])
            axes.plot(centre, mean, "o-", color=colour, markersize=3, linewidth=1, label=name)
        axes.set(xlabel=label, ylabel="MAPE (%)")
        axes.set_ylim(bottom=0)
    panels[0].legend(frameon=False, fontsize="small")
    return figure


def coverage_by_load(judged: Judged, artifact: Artifact) -> Figure:
    """How often gaps were within their bound, by predicted solo gap."""
    figure, (axes,) = _figure(1, 1, (7, 3.6))
    load_ms = artifact.model.predict_solo(judged.data)
    covered = np.where(judged.data.gap_ms <= judged.bound_ms, 100.0, 0.0)
    for (name, colour), rows in zip(SIDES, _sides(judged), strict=True):
        centre, mean = _binned(load_ms[rows], covered[rows], COVERAGE_BINS)
        axes.plot(centre, mean, "o-", color=colour, markersize=3, linewidth=1, label=name)
    promised = 100.0 * artifact.bounds.coverage
    axes.axhline(promised, color=VERMILION, linestyle="--", label=f"promised, {promised:g}%")
    axes.set(xlabel="load: predicted gap of decode alone (ms)", ylabel="within bound (%)")
    axes.legend(frameon=False, fontsize="small")
    return figure


def latency_by_share(judged: Judged, artifact: Artifact) -> Figure:
    """Predicted gap, up to its bound, at every share for a light, a middling and a heavy batch."""
    figure, (axes,) = _figure(1, 1, (7, 4))
    data, menu = judged.data, artifact.menu
    names = [str(share) for share in menu.shares[:-1]]
    context = float(np.sum(data.context_sum) / np.sum(data.batch))
    beside = data.take(~data.solo)
    shape = {"microbatch_tokens": np.median(beside.microbatch_tokens), "kept_layers": np.median(beside.kept_layers)}
    batches = np.unique(np.quantile(data.batch, [0.1, 0.5, 0.9], method="nearest"))
    for batch, colour in zip(batches, (BLUE, GREEN, PURPLE), strict=False):
        rows = states(menu, np.arange(len(names)), batch, batch * context, **shape)
        predicted_ms = artifact.model.predict(rows)
        bound_ms = artifact.bound(rows, predicted_ms, artifact.model.predict_solo(rows))
        axes.plot(names, predicted_ms, "o-", color=colour, markersize=4, linewidth=1, label=f"batch {batch:.0f}")
        axes.fill_between(names, predicted_ms, bound_ms, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="share (decode / finetune units)", ylabel="gap, up to its bound (ms)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize="small", title=f"{context:.0f} tokens of context each", title_fontsize="small")
    return figure


def importance(artifact: Artifact) -> Figure:
    """What the trees of both stages go by; the linear bases are not in it."""
    figure, panels = _figure(1, 2, (9, 3.2))
    for axes, (name, colour), trees in zip(panels, SIDES, artifact.model.trees, strict=True):
        gains = trees.importance() if isinstance(trees, Trees) else {}
        total = sum(gains.values()) or 1.0
        ordered = sorted(gains.items(), key=lambda item: item[1])
        axes.barh([feature for feature, _ in ordered], [100.0 * gain / total for _, gain in ordered], color=colour)
        axes.set(xlabel="share of the gain (%)")
        axes.set_title(name if gains else f"{name}: no trees, linear only", fontsize="medium")
    return figure


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    panels: list[Any] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _sides(judged: Judged) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    return judged.data.solo, ~judged.data.solo


def _binned(values: Floats, results: Floats, bins: int = BINS) -> tuple[Floats, Floats]:
    """Centres of bins of equally many rows, and the mean result in each."""
    if not values.size:
        return np.empty(0), np.empty(0)
    edges = np.unique(np.quantile(values, np.linspace(0.0, 1.0, bins + 1)))
    place = np.searchsorted(edges[1:-1], values, side="right")
    rows = np.bincount(place)
    filled = rows > 0
    return (
        np.bincount(place, values)[filled] / rows[filled],
        np.bincount(place, results)[filled] / rows[filled],
    )
