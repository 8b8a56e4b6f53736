"""Policies on a simulated H200 with Llama-3-8B: two traces, three loads each, five ITL SLOs.

For every trace and load `harli compare --simulate` at 1.25, 1.5 and 2 times decode alone's P99, and at 20 and 40 ms.
What is complete in ``--folder`` is not simulated again, so it can be stopped and resumed.

    python benchmarks/simulated_h200.py conv.csv code.csv --out benchmarks/results/simulated_h200.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from harli.compare.results import ComparisonFolder
from harli.compare.settings import COMPARISON_FILE, ComparisonSettings, SimulatedDevice
from harli.compare.simulated import SimulatedComparison
from harli.engine.device import versions
from harli.simulate.analytic import H200_LLAMA_3_8B
from harli.simulate.devices import USUAL
from harli.workload.trace import read_trace

POLICIES = ("qos", "stepwise", "timeslice", "reactive", "static", "oracle")
LOADS = {"conversation": (3.0, 6.0, 9.0), "code": (8.0, 16.0, 32.0)}
"""Factors on the rate of a trace that one H200 can serve: it was recorded on more and slower ones."""
SLOS: dict[str, dict[str, Any]] = {
    "scales": {"slo_scales": (1.25, 1.5, 2.0)},
    "20ms": {"slo": {"itl_ms": 20.0}},
    "40ms": {"slo": {"itl_ms": 40.0}},
}
COLUMNS = {
    "trace": "{}",
    "rate_scale": "{:g}",
    "slo": "{}",
    "entrant": "{}",
    "finetune/tokens_per_s": "{:,.0f}",
    "finetune/tokens_per_s_vs_oracle": "{:.2f}",
    "finetune/tokens_per_s_vs_best_rival": "{:.2f}",
    "finetune/gain_vs_dedicated": "{:+.0%}",
    "slo/itl_attainment": "{:.2%}",
    "decode/admitted_per_s": "{:.2f}",
    "decode/queue_wait_p99_ms": "{:,.0f}",
    "unharmed": "{}",
}


def comparison_settings(
    trace: Path, rate_scale: float, slos: dict[str, Any], duration_s: float, seed: int
) -> ComparisonSettings:
    """One comparison; it ends with the trace if that is shorter than ``duration_s``."""
    longest_s = read_trace(trace).requests[-1].arrival_s / rate_scale
    usual = deepcopy(USUAL)
    usual["engine"]["model"] = H200_LLAMA_3_8B.model
    device = SimulatedDevice(device=H200_LLAMA_3_8B.name, kv_blocks=usual.pop("kv_blocks"))
    workload = {"trace": trace, "rate_scale": rate_scale, "duration_s": min(duration_s, longest_s), "seed": seed}
    run = usual | {"policy": "separate", "workload": workload, "slo": slos.get("slo", {})}
    own = {"policies": POLICIES, "rounds": 1, "dedicated": True, "simulation": device}
    return ComparisonSettings.model_validate(own | {"slo_scales": slos.get("slo_scales", ()), "run": run})


def rows(name: str, results: ComparisonFolder) -> Iterator[dict[str, Any]]:
    """What the comparison shows, one row per policy and SLO; of variants the best."""
    for row in results.rows():
        scale, slo_ms = row["slo_scale"], row["slo_itl_ms"]
        slo = f"{scale:g}x = {slo_ms:.1f} ms" if scale else f"{slo_ms:g} ms"
        yield {"trace": name, "slo": slo, "entrant": " ".join([row["policy"], *map(str, row["params"].values())])} | row


def main(
    conversation: Annotated[Path, typer.Argument(help="azure_llm_2023_conv.csv")],
    code: Annotated[Path, typer.Argument(help="azure_llm_2023_code.csv")],
    only: Annotated[str, typer.Option(help="Only cells whose name has this in it, such as conversation-6/40ms.")] = "",
    duration: Annotated[float, typer.Option(help="Simulated seconds of each run, at most.")] = 120.0,
    seed: Annotated[int, typer.Option()] = 0,
    jobs: Annotated[int | None, typer.Option(help="Processes.", show_default="one per core")] = None,
    folder: Annotated[Path, typer.Option(help="Where records are kept, for going on.")] = Path("comparisons/h200"),
    out: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Simulate what is missing, print a table in Markdown, and write the numbers."""
    errors, found = Console(stderr=True), []
    traces = {"conversation": conversation, "code": code}
    cells = [(name, load, slos) for name in traces for load in LOADS[name] for slos in SLOS]
    for name, load, slos in cells:
        cell = f"{name}-{load:g}/{slos}"
        if only not in cell:
            continue
        at, settings = folder / cell, comparison_settings(traces[name], load, SLOS[slos], duration, seed)
        comparison = SimulatedComparison(settings, at if (at / COMPARISON_FILE).exists() else None)
        with errors.status(cell) as status:
            comparison.execute(
                at, jobs, lambda now, cell=cell: status.update(f"{cell}: {now.done_s / now.total_s:.0%}")
            )
            found += rows(name, ComparisonFolder(at))
    print_table(found)
    if out:
        known = {"device": H200_LLAMA_3_8B.name, "simulated": True, "duration_s": duration, "versions": versions()}
        shown = [{name: row[name] for name in ("policy", "slo_scale", *COLUMNS)} for row in found]
        out.write_text(json.dumps(known | {"rows": shown}, indent=1) + "\n")


def print_table(found: list[dict[str, Any]]) -> None:
    """All rows in Markdown."""
    typer.echo("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for row in found:
        cells = ("-" if row[name] is None else shown.format(row[name]) for name, shown in COLUMNS.items())
        typer.echo("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    typer.run(main)
