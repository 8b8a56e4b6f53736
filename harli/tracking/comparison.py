"""Publishing a comparison to MLflow: a parent run with the figure and the rows, and a child per row and round."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from harli.compare.score import Row
from harli.compare.verdict import ATTAINED
from harli.records.columns import Floats
from harli.tracking.figures import BLUE, GREEN, ORANGE, PURPLE, VERMILION
from harli.tracking.publish import EXPERIMENT, publish_run
from harli.tracking.store import open_store, reporting_failures
from harli.types import HarliError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from harli.compare.results import ComparisonFolder, Scored

COMPARISON_ID = "harli.comparison_id"
COLOURS = ("0.4", BLUE, ORANGE, GREEN, VERMILION, PURPLE)
"""Of policies; `separate` is the first."""
MARKERS = "osD^v"
"""Of a policy's variants."""


def publish_comparison(comparison: ComparisonFolder, scored: Sequence[Scored]) -> str:
    """Publish a comparison with its runs and return the parent's id; what is there already stays, what is not is added.

    Raises HarliError when MLflow cannot be used; doing it again then adds what is missing.
    """
    try:
        client, experiment_id = open_store(EXPERIMENT)
        with reporting_failures():
            parent = _parent(client, experiment_id, comparison)
        for record in comparison.scored_records():
            publish_run(record, parent)
        with reporting_failures():
            client.log_figure(parent, figure(scored, simulated=_simulated(comparison)), "comparison.png")
            client.log_dict(parent, json.loads(json.dumps(comparison.rows())), "rows.json")
            client.set_tag(parent, "rounds", comparison.info.settings.rounds)
            client.set_terminated(parent)
    except HarliError as error:
        again = f"harli compare --resume {shlex.quote(str(comparison.folder))}"
        raise HarliError(f"{error}; publish it later with: {again}") from error
    return parent


def figure(scored: Sequence[Scored], *, simulated: bool = False) -> Figure:
    """Finetune tokens/s against SLO attainment, a panel per SLO: the mean of each entrant with its range over rounds.

    Small points are rounds. Hollow: decode was harmed. The line is the attainment that is asked for.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    panels = max(1, len(scored))
    policies = list(dict.fromkeys(row.entrant.policy for one in scored for row in one.rows))
    drawing = Figure(figsize=(6.5 * panels, 5), dpi=120, layout="constrained")
    for axes, one in zip(drawing.subplots(1, panels, squeeze=False, sharey=True)[0], scored, strict=False):
        for row in one.rows:
            variants = sorted({str(other.entrant) for other in one.rows if other.entrant.policy == row.entrant.policy})
            colour = COLOURS[policies.index(row.entrant.policy) % len(COLOURS)]
            _point(axes, row, colour, MARKERS[variants.index(str(row.entrant)) % len(MARKERS)])
        axes.axvline(ATTAINED, color="0.6", linestyle="--", linewidth=1, zorder=0)
        axes.set_title(str(one.objective), fontsize="medium")
        axes.set_xlabel("SLO attainment")
        axes.set_xlim(right=1.0 + 0.02 * (1.0 - min(axes.get_xlim()[0], 0.98)))
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    drawing.axes[0].set_ylabel(f"finetune (tokens/s{', simulated' if simulated else ''})")
    return drawing


def _simulated(comparison: ComparisonFolder) -> bool:
    return comparison.info.settings.simulation is not None


def _point(axes: Axes, row: Row, colour: str, marker: str) -> None:
    attained, tokens = (np.array(values) for values in zip(*row.points, strict=True))
    axes.plot(attained, tokens, linestyle="", marker=".", markersize=4, color=colour, alpha=0.6)
    means = float(attained.mean()), row.tokens_per_s
    across, up = (_reach(values, mean) for values, mean in zip((attained, tokens), means, strict=True))
    axes.errorbar(
        *means,
        xerr=across,
        yerr=up,
        fmt=marker,
        color=colour,
        markerfacecolor=colour if row.unharmed else "white",
        elinewidth=1,
        clip_on=False,
        label=f"{row.entrant}{'' if row.unharmed else ', harms decode'}",
    )


def _reach(values: Floats, mean: float) -> Floats:
    """From the mean down to the least value and up to the largest; rounding may have put it beyond them."""
    return np.maximum([[mean - values.min()], [values.max() - mean]], 0.0)


def _parent(client: Any, experiment_id: str, comparison: ComparisonFolder) -> str:
    info = comparison.info
    found = client.search_runs([experiment_id], f"tags.`{COMPARISON_ID}` = '{info.comparison_id}'")
    if found:
        return str(found[0].info.run_id)
    settings = info.settings
    start_ms = int(datetime.fromisoformat(info.started_at).timestamp() * 1000)
    tags = {COMPARISON_ID: info.comparison_id} | {f"version.{name}": value for name, value in info.versions.items()}
    tags |= {"simulated": str(_simulated(comparison)).lower()}
    name = f"comparison {comparison.folder.resolve().name}{' (simulated)' if _simulated(comparison) else ''}"
    parent: str = client.create_run(experiment_id, start_ms, tags, run_name=name).info.run_id
    params = {
        "policies": " ".join(settings.policies),
        "slo_scales": " ".join(f"{scale:g}" for scale in settings.slo_scales),
        "slo.itl_ms": settings.run.slo.itl_ms,
        "slo.tpot_ms": settings.run.slo.tpot_ms,
        "model": settings.run.engine.model,
        "role": settings.run.engine.role,
        "menu": " ".join(info.menu),
        "workload.trace": settings.run.workload.trace,
        "workload.rate_scale": settings.run.workload.rate_scale,
        "workload.duration_s": settings.run.workload.duration_s,
        "workload.seed": settings.run.workload.seed,
        **{f"device.{name}": value for name, value in info.device.items()},
    }
    for name, value in params.items():
        client.log_param(parent, name, str(value))
    return parent
