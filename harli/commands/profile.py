"""``harli profile``: measure decode latency under varying batch and interference."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from harli import settings_file
from harli.commands import flags
from harli.commands.engine_bar import EngineBar
from harli.commands.flags import ENGINE, SETTINGS, flag
from harli.commands.interrupt import INTERRUPTED, run_interruptibly
from harli.types import HarliError

if TYPE_CHECKING:
    from harli.records.profile import Profile, ProfileInfo
    from profiling.report import Report
    from profiling.settings import ProfileSettings
    from profiling.sitting import Progress as Measured

PLACES = SETTINGS | {"budget_minutes": "budget_s", "shares": "shares", "seed": "seed"}
"""Which setting of a profile a flag gives; the engine's and finetuning's are where a run has them."""
LINE_EVERY_S = 15.0


def profile(
    context: typer.Context,
    model: flags.Model = None,
    budget_minutes: Annotated[float | None, flag("Time for measuring; starting the engine comes on top.", 10)] = None,
    shares: Annotated[str | None, flag("Splits to measure, with commas; all of the menu without it.")] = None,
    role: Annotated[str | None, flag("decode or mixed.", ENGINE.role)] = None,
    dtype: flags.Dtype = None,
    max_model_len: flags.MaxModelLen = None,
    max_num_seqs: flags.MaxNumSeqs = None,
    kv_cache_gib: flags.KvCacheGib = None,
    finetune_data: Annotated[Path | None, flag("JSONL that finetuning trains on meanwhile.")] = None,
    lora_rank: flags.LoraRank = None,
    microbatch_tokens: Annotated[
        int | None, flag("Middle one of three finetune shapes: half of it and twice it too.")
    ] = None,
    lending: flags.Lending = None,
    seed: Annotated[int | None, flag("Of the plan.")] = None,
    out: Annotated[Path | None, flag("Folder to create.", "profiles/TIME-MODEL")] = None,
    resume: Annotated[Path | None, flag("Go on with the profile in this folder, by its own plan.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the numbers as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="On stderr only errors and the profile's path.")] = False,
) -> None:
    """Measure decode latency alone and beside finetuning, for `harli train-predictor`.

    Example: harli profile --model small --budget-minutes 10
    """
    given = _given(context.params)
    settings = _resumed(resume, given) if resume else _validated(given)
    name = Path(settings.engine.model).name
    folder = resume or out or Path("profiles", f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}")
    interrupted = _execute(settings, folder, resume, quiet=quiet)
    from harli.records.profile import PROFILE_FILE, read_profile
    from profiling.run import plan_of
    from profiling.sitting import report_on

    if interrupted and not (folder / PROFILE_FILE).exists():
        Console(stderr=True).print("interrupted before anything was measured: there is no profile")
        raise typer.Exit(INTERRUPTED)
    measured = read_profile(folder)
    report = report_on(measured.steps, measured.segments, plan_of(measured))
    _publish(measured, report)
    Console(stderr=True, soft_wrap=True).print(f"profile in {folder}", markup=False, highlight=False)
    if json_:
        typer.echo(json.dumps(measured.info.summary))
    else:
        _print(measured.info, report)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that flags were given for, by their places."""
    given = {place: values[name] for name, place in PLACES.items() if values.get(name) is not None}
    if "budget_s" in given:
        given["budget_s"] *= 60.0
    if "shares" in given:
        given["shares"] = tuple(given["shares"].replace(" ", "").split(","))
    return given


def _validated(given: dict[str, Any]) -> ProfileSettings:
    from profiling.settings import ProfileSettings

    values: dict[str, Any] = {}
    for place, value in given.items():
        settings_file.override(values, place, value)
    try:
        return ProfileSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        if (place, first["type"]) == ("budget_s", "greater_than_equal"):
            problem = "is too short: the corners alone take a few seconds; give it 0.3 or more"
            raise HarliError(f"{_flag(place)} {problem}") from None
        raise HarliError(f"{_flag(place)}: {first['msg']}, not {first['input']!r}") from None


def _resumed(folder: Path, given: dict[str, Any]) -> ProfileSettings:
    """The settings of the profile in ``folder``. Raises HarliError when a flag says something else."""
    from harli.records.profile import read_profile
    from profiling.settings import ProfileSettings

    settings = ProfileSettings.model_validate(read_profile(folder).info.settings)
    for place, value in given.items():
        known = attrgetter(place)(settings)
        if known != value:
            shown = known / 60.0 if place == "budget_s" else known
            raise HarliError(
                f"the profile in {folder} was begun with another {_flag(place)} ({shown}); leave it out to resume"
            )
    return settings


def _flag(place: str) -> str:
    """What gives the setting at ``place``, as a user writes it."""
    return "--" + next(name for name, known in PLACES.items() if known == place).replace("_", "-")


def _execute(settings: ProfileSettings, folder: Path, resume: Path | None, *, quiet: bool) -> bool:
    """Measure; True when Ctrl-C ended it."""
    own_stderr = os.fdopen(os.dup(2), "w")  # stays ours while the engine's output goes to its log
    console = Console(file=own_stderr, quiet=quiet)
    with console.status("checking settings"):
        from profiling.run import Profiling

        profiling = Profiling(settings, resume)
    with _Bar(console, settings.budget_s) as bar:
        return run_interruptibly(profiling.execute(folder, bar.started, bar.update))


class _Bar(EngineBar):
    """How far the budget is used, and what is being measured."""

    def __init__(self, console: Console, budget_s: float) -> None:
        super().__init__(console, total=budget_s)
        self._last_line_s = -LINE_EVERY_S

    def started(self, warnings: list[str]) -> None:
        super().started(warnings)
        self._bar.reset(self._task, description="measuring")

    def update(self, measured: Measured) -> None:
        facts = f"{measured.points} points, {measured.steps} steps"
        self._bar.update(self._task, completed=measured.elapsed_s, description=measured.phase, facts=facts)
        if not self._console.is_terminal and measured.elapsed_s - self._last_line_s >= LINE_EVERY_S:
            self._last_line_s = measured.elapsed_s
            self._console.print(f"{measured.elapsed_s:.0f} s: {measured.phase}, {facts}", soft_wrap=True)


def _publish(measured: Profile, report: Report) -> None:
    from harli.tracking.profile_figures import quality
    from harli.tracking.profiles import publish_profile

    try:
        figure = quality(measured, report.drift_course, report.slowdowns, report.finetune_tokens_per_s)
        publish_profile(measured, figure)
    except HarliError as error:
        Console(stderr=True, soft_wrap=True).print(f"harli: {error}", markup=False, highlight=False)


def _print(info: ProfileInfo, report: Report) -> None:
    table = Table(title=f"profile of {info.model} ({info.role}), {info.duration_s:.0f} s, {info.status}", box=None,
                  show_header=False, title_justify="left", title_style="bold", pad_edge=False)  # fmt: skip
    table.add_column(style="dim")
    table.add_column()
    table.add_row(
        "measured", f"{report.points} operating points, {report.steps:,} steps, {report.coverage:.0%} of the space"
    )
    noise = [_percent(value) for value in (report.noise_floor_solo, report.noise_floor_corun)]
    table.add_row("noise floor", f"{noise[0]} solo, {noise[1]} co-run, per step")
    table.add_row("drift", _percent(report.drift))
    for (split, batch), (ratio, spread) in report.slowdowns.items():
        table.add_row(f"slowdown {split}", f"{ratio:.2f} ± {spread:.2f} at batch {batch}")
    for split, rate in report.finetune_tokens_per_s.items():
        table.add_row(f"finetune {split}", f"{rate:.0f} tokens/s beside decode")
    for name, rate in info.finetune_alone_tokens_per_s.items():
        share, tokens = name.split(" ")
        units = share.removeprefix("0/")
        table.add_row("finetune alone", f"{rate:.0f} tokens/s on {units} compute units, micro-batches of {tokens}")
    costs = info.costs
    window = f"window {costs.window_overhead_ms:.1f} ms beyond its length"
    table.add_row("costs", f"switch {costs.switch_ms:.1f} ms, {window}")
    Console().print(table)
    for line in info.verdict:
        Console(soft_wrap=True).print(f"note: {line}", markup=False, highlight=False)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
