"""``harli compare``: policies side by side, on the same requests."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harli import settings_file
from harli.commands.complete import models
from harli.commands.engine_bar import EngineBar
from harli.commands.interrupt import INTERRUPTED, run_interruptibly
from harli.commands.run import ENGINE, FINETUNE, LORA, SETTINGS, WORKLOAD, flag
from harli.types import HarliError

if TYPE_CHECKING:
    from harli.compare.results import ComparisonFolder, Scored
    from harli.compare.run import Progress as Compared
    from harli.compare.score import Interval, Row
    from harli.compare.settings import ComparisonSettings

OWN = ("rounds", "slo_on", "prune_s", "dedicated")
"""Settings that only a comparison has, and flags with the same names."""
TABLE_WIDTH = 160
"""One line per policy, in a narrow terminal and in a pipe too; reasons come below."""


def compare(
    context: typer.Context,
    policies: Annotated[
        str | None, flag("With commas; see `harli policies`, or path.py:Class. `separate` is always there.")
    ] = None,
    rounds: Annotated[int | None, flag("How often each policy runs.", 3)] = None,
    slo_scale: Annotated[
        list[float] | None, flag("SLO as a multiple of decode alone's P99 on these requests; may be repeated.")
    ] = None,
    slo_on: Annotated[str | None, flag("itl or tpot: which latency --slo-scale is about.", "itl")] = None,
    slo_tpot_ms: Annotated[float | None, flag("Objective for a request's mean time per token.")] = None,
    slo_itl_ms: Annotated[float | None, flag("Objective for every gap between tokens.")] = None,
    prune_s: Annotated[float | None, flag("Seconds of the pass that chooses splits and thresholds.", 20)] = None,
    dedicated: Annotated[
        bool | None,
        typer.Option("--dedicated", help="Half of the requests and finetuning alone, too: twice the time."),
    ] = None,
    model: Annotated[
        str | None, flag("tiny, small, a folder, or a Hugging Face name.", ENGINE.model, autocompletion=models)
    ] = None,
    predictor: Annotated[str | None, flag("A folder, or models:/harli-decode-latency/N.", "the champion")] = None,
    force_predictor: Annotated[
        bool | None, typer.Option("--force-predictor", help="Use it though trained for another model or device.")
    ] = None,
    role: Annotated[str | None, flag("decode: prompts' KV is already there. mixed: real prefill.", ENGINE.role)] = None,
    trace: Annotated[Path | None, flag("Trace of requests; generated ones without it.")] = None,
    rate_scale: Annotated[float | None, flag("Factor on the request rate.", WORKLOAD.rate_scale)] = None,
    requests_per_s: Annotated[float | None, flag("Rate of generated requests.", WORKLOAD.requests_per_s)] = None,
    duration: Annotated[float | None, flag("Seconds of workload in each run.", WORKLOAD.duration_s)] = None,
    seed: Annotated[int | None, flag("Of the workload, the order, the policies and finetuning.", WORKLOAD.seed)] = None,
    finetune_data: Annotated[Path | None, flag("JSONL with text, prompt/completion or messages.", "docstrings")] = None,
    lora_rank: Annotated[int | None, flag("", LORA.rank)] = None,
    microbatch_tokens: Annotated[int | None, flag("Tokens of a micro-batch.", FINETUNE.microbatch_tokens)] = None,
    accumulation: Annotated[int | None, flag("Micro-batches per update.", FINETUNE.accumulation)] = None,
    dtype: Annotated[str | None, flag("auto, bfloat16, float16 or float32.", ENGINE.dtype)] = None,
    max_model_len: Annotated[int | None, flag("Longest request in tokens.", ENGINE.max_model_len)] = None,
    max_num_seqs: Annotated[int | None, flag("Most requests in a step.", ENGINE.max_num_seqs)] = None,
    kv_cache_gib: Annotated[float | None, flag("Size of the KV cache.", ENGINE.kv_cache_gib)] = None,
    config: Annotated[Path | None, flag("YAML file with the settings of a run; flags win over it.")] = None,
    resume: Annotated[Path | None, flag("Go on with the comparison in this folder, by its own settings.")] = None,
    out: Annotated[Path | None, flag("Folder to create.", "comparisons/TIME-MODEL")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the rows as a JSON list.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="On stderr only errors and the comparison's path.")] = False,
) -> None:
    """Run policies in turn on one engine, on the same requests, and say what each finetunes and does to decode.

    Example: harli compare --policies static,reactive --model small --slo-scale 1.5 --rounds 3
    """
    own_stderr = os.fdopen(os.dup(2), "w")  # stays ours while the engine's output goes to its log
    console, always = Console(file=own_stderr, quiet=quiet), Console(file=own_stderr, soft_wrap=True)
    with console.status("checking settings"):
        from harli.compare.results import ComparisonFolder
        from harli.compare.run import Comparison

        settings = _settings(context.params)
        comparison = Comparison(settings, resume)
    name = Path(settings.run.engine.model).name
    folder = resume or out or Path("comparisons", f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}")
    console.print(f"{len(comparison.workload.requests)} requests from {comparison.workload.name} in each run")
    for note in dict.fromkeys(chosen.note for chosen in comparison.predictors.values() if chosen.note):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    with _Bar(console) as bar:
        run_interruptibly(comparison.execute(folder, bar.started, bar.update))
    results = ComparisonFolder(folder)
    scored, complete = results.scored(), results.is_complete()
    if complete:
        _publish(results, scored, always)
    missing = "" if complete else f"; go on with: harli compare --resume {folder}"
    always.print(f"comparison in {folder}{missing}", markup=False, highlight=False)
    if json_:
        typer.echo(json.dumps([row.as_json() for one in scored for row in one.rows]))
    else:
        for one in scored:
            _print(one)
    if not complete:
        raise typer.Exit(INTERRUPTED)


def _settings(flags: dict[str, Any]) -> ComparisonSettings:
    """The resumed comparison's settings, or the file's, with the flags that were given on top."""
    from harli.compare.results import ComparisonFolder
    from harli.compare.settings import ComparisonSettings

    own: dict[str, Any] = {"policies": ()}
    if flags["resume"]:
        if flags["config"] or flags["out"]:
            raise HarliError("--resume goes on with a comparison by its own settings; leave out --config and --out")
        own = ComparisonFolder(flags["resume"]).info.settings.model_dump(mode="json")
        values = own.pop("run")
    else:
        values = settings_file.load(flags["config"]) if flags["config"] else {}
        values |= {"policy": "separate", "params": {}}
    for name, path in SETTINGS.items():
        if flags.get(name) is not None:
            settings_file.override(values, path, flags[name])
    if flags["seed"] is not None:
        for section in ("engine", "workload", "finetune"):
            settings_file.override(values, f"{section}.seed", flags["seed"])
    own |= {name: flags[name] for name in OWN if flags[name] is not None}
    if flags["slo_scale"]:
        own["slo_scales"] = flags["slo_scale"]
    if flags["policies"] is not None:
        own["policies"] = [name for name in flags["policies"].replace(" ", "").split(",") if name]
    if own.get("slo_on", "itl") not in ("itl", "tpot"):
        raise HarliError(f"--slo-on must be itl or tpot, not {own['slo_on']!r}")
    return ComparisonSettings(**own, run=settings_file.validate(values))


class _Bar(EngineBar):
    """How far the comparison is, and what runs."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, total=None)

    def update(self, now: Compared) -> None:
        facts = "" if now.live is None else f"{now.live.finished} requests, {now.live.tokens_per_s:.0f} tokens/s"
        self._bar.update(self._task, completed=now.done_s, total=now.total_s, description=str(now.planned), facts=facts)
        if now.live is None:
            left_s = now.total_s - now.done_s
            self._console.print(Text(f"{now.planned}: done, about {left_s / 60:.0f} min left"), soft_wrap=True)


def _publish(results: ComparisonFolder, scored: list[Scored], always: Console) -> None:
    from harli.tracking.comparison import publish_comparison

    try:
        with always.status("publishing to MLflow"):
            publish_comparison(results, scored)
    except HarliError as error:
        always.print(f"harli: {error}", markup=False, highlight=False)


def _print(scored: Scored) -> None:
    """One line per entrant; below it what is wrong with whom."""
    from harli.compare.score import ADMITTED, TOKENS, WAIT

    rounds = max((len(row.points) for row in scored.rows), default=0)
    columns = ["", "finetune tokens/s", "vs best rival", "attained", "requests/s", "wait p99", "decode"]
    gains = any(row.gain is not None for row in scored.rows)
    if gains:
        columns.insert(3, "vs dedicated")
    title = f"{scored.objective}, {rounds} round{'s' * (rounds != 1)}, 95% intervals"
    table = Table(*columns, title=title, box=None, title_justify="left", title_style="bold", pad_edge=False)
    for row in scored.rows:
        cells = [
            str(row.entrant),
            _number(row.metrics[TOKENS], row.interval, "{:,.1f}"),
            _number(row.ratio, row.ratio_interval, "{:.2f}"),
            f"{row.attainment:.2%}",
            _number(row.metrics[ADMITTED], None, "{:.2f}"),
            _number(row.metrics[WAIT], None, "{:,.0f} ms"),
            "unharmed" if row.unharmed else "harmed",
        ]
        if gains:
            cells.insert(3, "-" if row.gain is None else f"{row.gain:+.1%}")
        table.add_row(*map(Text, cells))
    console = Console(width=TABLE_WIDTH)
    console.print(table)
    for line in (*_reasons(scored.rows), *scored.marks):
        console.print(f"note: {line}", markup=False, highlight=False, soft_wrap=True)


def _reasons(rows: list[Row]) -> list[str]:
    return [f"{row.entrant} {row.verdict.reason}" for row in rows if row.verdict.reason]


def _number(value: float | None, interval: Interval | None, shown: str) -> str:
    if value is None:
        return "-"
    between = "" if interval is None else f" ({' to '.join(shown.format(end) for end in interval)})"
    return shown.format(value) + between
