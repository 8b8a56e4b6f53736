"""``harli train-predictor``: from profiles to a registered latency predictor."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from harli.types import HarliError

if TYPE_CHECKING:
    from predictor.training import Trained
    from predictor.tuning import Trial

DEFAULT_TRIALS = 40
PROFILES = Path("profiles")
OPTUNA_FILE = Path("mlruns", "optuna.db")
TABLE_WIDTH = 160
"""One line per model, in a narrow terminal and in a pipe too."""


def train_predictor(
    profiles: Annotated[
        list[Path] | None,
        typer.Argument(help="Profile folders, or parquet tables of steps; the newest under profiles/ by default."),
    ] = None,
    from_run: Annotated[list[Path] | None, typer.Option(help="Learn from a run's record, too; repeatable.")] = None,
    run_weight: Annotated[float, typer.Option(min=0.001, help="Weight of a run's step; a profile's has 1.")] = 1.0,
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="Settings to try.", show_default=f"{DEFAULT_TRIALS}, or as --minutes allows"),
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0.0, help="Longest time to try settings.")] = None,
    coverage: Annotated[float, typer.Option(min=0.5, max=0.9999, help="How often gaps shall be within bounds.")] = 0.99,
    seed: Annotated[int, typer.Option(min=0, help="Of folds, search and model.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print the scores as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="On stderr only errors.")] = False,
) -> None:
    """Train a latency predictor and register it in MLflow: as champion, if it beats the one that is.

    The search for settings is kept in mlruns/optuna.db: an interrupted one goes on where it was.

    Example: harli train-predictor profiles/20260131-120000-small
    """
    console = Console(stderr=True, quiet=quiet, soft_wrap=True)
    began_ms = int(time.time() * 1000)
    with console.status("loading"):
        from harli.tracking.predictor_card import judged_on
        from harli.tracking.predictor_runs import load_champion, metrics, publish_training, rival_metrics
        from harli.tracking.registry import EXPERIMENT, MODEL, Registry
        from harli.tracking.store import open_store
        from predictor.contest import contest
        from predictor.cost import forecast_p99_us
        from predictor.dataset import check_trainable, read_datasets
        from predictor.table import TablePredictor
        from predictor.training import train
        from predictor.tuning import Budget

        runs = from_run or []
        folders = profiles or ([] if runs else [_newest_profile()])
        data = read_datasets(folders, runs, run_weight=run_weight)
        check_trainable(data)
        client, experiment_id = open_store(EXPERIMENT)  # found missing before the search rather than after it
        champion = load_champion(Registry(client))
    sources = [path.name for path in (*folders, *runs)]
    budget = Budget(trials or (DEFAULT_TRIALS if minutes is None else None), minutes)
    with _TrialProgress(console, budget.trials) as progress:
        try:
            trained = train(data, budget, coverage=coverage, seed=seed, storage=OPTUNA_FILE, on_trial=progress.trial)
        except KeyboardInterrupt:
            console.print("interrupted: nothing is registered; the same command resumes the search")
            raise
    with console.status("comparing and registering"):
        verdict = contest(trained, champion)
        predict_p99_us = forecast_p99_us(TablePredictor(trained.artifact), data, seed)
        version = publish_training(
            client,
            experiment_id,
            trained,
            verdict,
            sources=sources,
            seed=seed,
            predict_p99_us=predict_p99_us,
            began_ms=began_ms,
        )
    if json_:
        rivals = [rival_metrics(rival) for rival in trained.rivals]
        typer.echo(json.dumps({"rivals": rivals, **metrics(trained, predict_p99_us), "predictor/version": version}))
        return
    output = Console(soft_wrap=True)
    output.print(f"judged on {judged_on(trained)}", highlight=False)
    Console(width=TABLE_WIDTH).print(_table(trained))
    output.print(f"{trained.verdict}", highlight=False)
    output.print(f"one forecast takes {predict_p99_us:.1f} us of CPU at p99", highlight=False)
    alias = "champion" if verdict.champion else "challenger"
    output.print(f"version {version} of {MODEL} is the {alias}: {verdict.reason}", markup=False, highlight=False)


def _newest_profile() -> Path:
    from harli.records.profile import PROFILE_FILE

    found = sorted(PROFILES.glob(f"*/{PROFILE_FILE}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise HarliError(f"no profile under {PROFILES}/: run `harli profile`, or name a profile or --from-run")
    return found[-1].parent


def _table(trained: Trained) -> Table:
    from harli.tracking.predictor_card import FOOTNOTE, HEADINGS, rows

    table = Table(box=None, pad_edge=False, caption=FOOTNOTE, caption_justify="left", caption_style="dim")
    table.add_column(HEADINGS[0])
    for heading in HEADINGS[1:]:
        table.add_column(heading, justify="right")
    for row in rows(trained):
        table.add_row(*row, style="bold" if row[0] == trained.winner.name else None)
    return table


class _TrialProgress(Progress):
    """A bar over the trials with the best error so far; without a number of trials it only counts."""

    def __init__(self, console: Console, trials: int | None) -> None:
        count = MofNCompleteColumn()
        columns = ("searching settings", BarColumn(), count, TextColumn("best MAPE {task.fields[best]}"))
        super().__init__(
            *columns,
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=console.quiet or not console.is_terminal,
        )
        self._task = self.add_task("", total=trials, best="-")
        self._best = float("inf")

    def trial(self, trial: Trial) -> None:
        if not trial.pruned:
            self._best = min(self._best, trial.mape)
        self.update(self._task, advance=1, best=f"{100 * self._best:.2f}%")
