"""``harli compare``: policies side by side, on the same requests."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from harli.commands import flags
from harli.commands.comparison_settings import comparison_settings
from harli.commands.comparison_view import MeasuredBar, print_scored
from harli.commands.flags import ENGINE, FINETUNE, WORKLOAD, flag
from harli.commands.interrupt import INTERRUPTED, run_interruptibly
from harli.commands.tuning import DEFAULT_TRIALS, tuned_settings
from harli.commands.work_bar import WorkBar
from harli.types import HarliError

if TYPE_CHECKING:
    from harli.compare.results import ComparisonFolder
    from harli.compare.settings import ComparisonSettings


def compare(
    context: typer.Context,
    policies: Annotated[
        str | None, flag("With commas; see `harli policies`, or path.py:Class. `separate` is always there.")
    ] = None,
    tune: Annotated[
        str | None, flag("Search this policy's parameters in the simulator first; the best ones take part, too.")
    ] = None,
    trials: Annotated[int | None, flag("Parameters to try.", DEFAULT_TRIALS, min=1)] = None,
    rounds: Annotated[int | None, flag("How often each policy runs.", 3)] = None,
    slo_scale: Annotated[
        list[float] | None, flag("SLO as a multiple of decode alone's P99 on these requests; may be repeated.")
    ] = None,
    slo_on: Annotated[str | None, flag("itl or tpot: which latency --slo-scale is about.", "itl")] = None,
    slo_tpot_ms: flags.SloTpotMs = None,
    slo_itl_ms: flags.SloItlMs = None,
    prune_s: Annotated[
        float | None, flag("Seconds of the pass that chooses splits and thresholds.", "20; simulated, all")
    ] = None,
    dedicated: Annotated[
        bool | None,
        typer.Option("--dedicated", help="Half of the requests and finetuning alone, too: twice the time."),
    ] = None,
    simulate: Annotated[
        bool | None, typer.Option("--simulate", help="On a simulated device, without an engine.")
    ] = None,
    device: flags.Device = None,
    kv_blocks: flags.KvBlocks = None,
    noise: Annotated[float | None, flag("Sigma of the simulated noise on steps and units.", 0.03)] = None,
    jobs: Annotated[int | None, flag("Processes that simulate.", "one per core", min=1)] = None,
    model: flags.Model = None,
    predictor: flags.Predictor = None,
    force_predictor: flags.ForcePredictor = None,
    role: flags.Role = None,
    trace: flags.Trace = None,
    rate_scale: Annotated[
        list[float] | None, flag("Factor on the request rate; simulated, may be repeated.", WORKLOAD.rate_scale)
    ] = None,
    length_scale: flags.LengthScale = None,
    requests_per_s: Annotated[
        float | None, flag("Rate of generated requests.", f"{WORKLOAD.requests_per_s:g}; simulated, 5.5")
    ] = None,
    duration: Annotated[
        float | None, flag("Seconds of workload in each run.", f"{WORKLOAD.duration_s:g}; simulated, 600")
    ] = None,
    seed: Annotated[int | None, flag("Of the workload, the order, the policies and finetuning.", WORKLOAD.seed)] = None,
    finetune_data: flags.FinetuneData = None,
    lora_rank: flags.LoraRank = None,
    microbatch_tokens: Annotated[
        int | None, flag("Tokens of a micro-batch.", f"{FINETUNE.microbatch_tokens}; simulated, 1024")
    ] = None,
    accumulation: flags.Accumulation = None,
    lending: flags.Lending = None,
    dtype: flags.Dtype = None,
    max_model_len: Annotated[
        int | None, flag("Longest request in tokens.", f"{ENGINE.max_model_len}; simulated, 8192")
    ] = None,
    max_num_seqs: Annotated[
        int | None, flag("Most requests in a step.", f"{ENGINE.max_num_seqs}; simulated, 256")
    ] = None,
    kv_cache_gib: flags.KvCacheGib = None,
    config: Annotated[Path | None, flag("YAML file with the settings of a run; flags win over it.")] = None,
    resume: Annotated[Path | None, flag("Go on with the comparison in this folder, by its own settings.")] = None,
    out: Annotated[Path | None, flag("Folder to create.", "comparisons/TIME-MODEL")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the rows as a JSON list.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="On stderr only errors and the comparison's path.")] = False,
) -> None:
    """Run policies in turn, on the same requests, and say what each finetunes and does to decode.

    Example: harli compare --policies static,reactive --model small --slo-scale 1.5 --rounds 3

    Example: harli compare --simulate --policies qos,stepwise,static,oracle --slo-itl-ms 15 --rate-scale 4
    """
    own_stderr = os.fdopen(os.dup(2), "w")  # stays ours while the engine's output goes to its log
    console, always = Console(file=own_stderr, quiet=quiet), Console(file=own_stderr, soft_wrap=True)
    with console.status("checking settings"):
        wanted = comparison_settings(context.params)
    folder = resume or out or Path("comparisons", f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{_name(wanted[0])}")
    rows: list[dict[str, object]] = []
    for settings in wanted:
        if tune is not None:
            settings = tuned_settings(settings, tune, trials, console)
        scale = settings.run.workload.rate_scale
        place = folder / f"rate-{scale:g}" if len(wanted) > 1 else folder
        execute = _simulate if settings.simulation else _measure
        results = _finished(settings, resume) or execute(settings, resume, place, jobs, console)
        rows += _show(results, always, printed=not json_)
        if not results.is_complete():
            break
    if json_:
        typer.echo(json.dumps(rows))
    if not results.is_complete():
        raise typer.Exit(INTERRUPTED)


def _finished(settings: ComparisonSettings, resume: Path | None) -> ComparisonFolder | None:
    """The comparison in ``resume`` if nothing of it is missing: its records are all that it takes to score it again."""
    if resume is None:
        return None
    from harli.compare.results import ComparisonFolder

    results = ComparisonFolder(resume)
    return results if results.info.settings == settings and results.is_complete() else None


def _measure(
    settings: ComparisonSettings, resume: Path | None, folder: Path, _: int | None, console: Console
) -> ComparisonFolder:
    """What there is after an engine has run everything, or until Ctrl-C."""
    with console.status("checking settings"):
        from harli.compare.results import ComparisonFolder
        from harli.compare.run import EngineComparison

        comparison = EngineComparison(settings, resume)
    console.print(f"{len(comparison.workload.requests)} requests from {comparison.workload.name} in each run")
    for note in dict.fromkeys(chosen.note for chosen in comparison.predictors.values() if chosen.note):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    with MeasuredBar(console) as bar:
        run_interruptibly(comparison.execute(folder, bar.started, bar.update))
    return ComparisonFolder(folder)


def _simulate(
    settings: ComparisonSettings, resume: Path | None, folder: Path, jobs: int | None, console: Console
) -> ComparisonFolder:
    """What there is after everything was simulated, or until Ctrl-C."""
    with console.status("checking settings"):
        from harli.compare.results import ComparisonFolder
        from harli.compare.simulated import SimulatedComparison

        comparison = SimulatedComparison(settings, resume)
    requests, workload = len(comparison.workload.requests), comparison.workload.name
    console.print(f"{requests} requests from {workload} in each run, simulated on {comparison.device()['name']}")
    with WorkBar(console, "simulating", 1.0) as bar, suppress(KeyboardInterrupt):
        comparison.execute(folder, jobs, lambda now: bar.update(now.done_s / now.total_s, f"{now.planned}: done"))
    return ComparisonFolder(folder)


def _show(results: ComparisonFolder, always: Console, *, printed: bool) -> list[dict[str, object]]:
    """Publish and print what there is; its rows."""
    settings, scored, complete = results.info.settings, results.scored(), results.is_complete()
    if complete:
        from harli.tracking.comparison import publish_comparison

        try:
            with always.status("publishing to MLflow"):
                publish_comparison(results, scored)
        except HarliError as error:
            always.print(f"harli: {error}", markup=False, highlight=False)
    missing = "" if complete else f"; resume with: harli compare --resume {results.folder}"
    kind = " (simulated)" if settings.simulation else ""
    always.print(f"comparison in {results.folder}{kind}{missing}", markup=False, highlight=False)
    if printed:
        under = f", simulated at {settings.run.workload.rate_scale:g} times the rate" if settings.simulation else ""
        for one in scored:
            print_scored(one, under)
    return results.rows()


def _name(settings: ComparisonSettings) -> str:
    name = Path(settings.run.engine.model).name
    return f"{name}-simulated" if settings.simulation else name
