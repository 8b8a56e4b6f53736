"""What the folder of a comparison holds: its description, and a record per run."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from harli.compare.cell import SEPARATE, Entrant, Group, Objective, groups
from harli.compare.plan import PRUNING, PlannedRun, alone_run, planned_runs, planned_s
from harli.compare.score import Gain, Row, gain_over_dedicated, marks, score
from harli.compare.settings import COMPARISON_FILE, ComparisonInfo
from harli.compare.verdict import ADMITTED, TOKENS, Rounds, Run
from harli.records.reader import Record, read_info, read_record
from harli.records.schema import RUN_FILE, RunInfo
from harli.records.summary import summarise
from harli.types import Menu, Slo


@dataclass(frozen=True, slots=True)
class Scored:
    """All entrants at one objective."""

    objective: Objective
    rows: list[Row]
    marks: list[str]


class ComparisonFolder:
    """Reads a comparison; of each record only what it shows is kept, since those of simulated hours are large."""

    def __init__(self, folder: Path) -> None:
        """Raises HarliError when ``folder`` holds no comparison, or a damaged one."""
        self.folder = folder
        self.info = read_info(folder / COMPARISON_FILE, ComparisonInfo)
        self._complete: set[str] = set()
        self._runs: dict[tuple[str, Slo], Run] = {}

    def complete(self, planned: PlannedRun) -> bool:
        """The run was finished. Raises HarliError when its record is damaged."""
        path = self.folder / planned.folder / RUN_FILE
        if planned.folder not in self._complete and path.exists() and read_info(path, RunInfo).status == "finished":
            self._complete.add(planned.folder)
        return planned.folder in self._complete

    def run_info(self, planned: PlannedRun) -> RunInfo | None:
        """What its record says of a run; None unless it is complete. Raises HarliError when that is damaged."""
        return read_info(self.folder / planned.folder / RUN_FILE, RunInfo) if self.complete(planned) else None

    def record(self, planned: PlannedRun) -> Record | None:
        """None unless the run is complete. Raises HarliError when its record is damaged."""
        return read_record(self.folder / planned.folder) if self.complete(planned) else None

    def run(self, planned: PlannedRun, slo: Slo) -> Run | None:
        """A complete run held against ``slo``, whatever SLO it ran with; None if it is not complete."""
        key = planned.folder, slo
        if key not in self._runs:
            record = self.record(planned)
            if record is None:
                return None
            summary = summarise(
                record.steps, record.requests, record.updates, slo=slo, duration_s=record.info.duration_s
            )
            metrics = compared(summary, record.requests, record.updates, planned_s(self.info.settings, planned))
            failure = record.info.finetune.reason if record.info.finetune.state == "failed" else ""
            self._runs[key] = Run(metrics, failure)
        return self._runs[key]

    @cached_property
    def variants(self) -> tuple[Group, ...]:
        """What takes part beside `separate`."""
        return groups(self.info.settings.policies, self._menu, self.info.settings.tuned)

    def planned(self) -> list[PlannedRun]:
        """All runs that are known so far, complete or not, in order."""
        return list(planned_runs(self.info.settings, self.variants, self._menu, self))

    def is_complete(self) -> bool:
        """No run is missing."""
        return all(self.complete(run) for run in self.planned())

    def scored(self) -> list[Scored]:
        """The result so far, per objective."""
        planned = self.planned()
        alone = self.run(planned[0], Slo())
        if alone is None:
            return []
        return [self._scored(one, planned) for one in self.info.settings.objectives(dict(alone.metrics))]

    def rows(self) -> list[dict[str, Any]]:
        """All rows of the result so far as plain JSON values."""
        settings = self.info.settings
        of = {"simulated": settings.simulation is not None, "rate_scale": settings.run.workload.rate_scale}
        return [of | row.as_json() for one in self.scored() for row in one.rows]

    def scored_records(self) -> Iterator[Record]:
        """A record per row and round, as if it had run with the row's SLO: with those metrics and an id of its own."""
        planned = self.planned()
        for one in self.scored():
            for row in one.rows:
                for run in _of(row.entrant, one.objective, planned):
                    record = self.record(run)
                    if record is not None:
                        yield self._held_against(record, run, one.objective.slo)

    @property
    def _menu(self) -> Menu:
        return Menu.parse(self.info.menu)

    def _scored(self, objective: Objective, planned: list[PlannedRun]) -> Scored:
        rounds: dict[Entrant, dict[int, Run]] = {}
        entrants = dict.fromkeys(run.entrant for run in planned if run.round != PRUNING and run.load == "all")
        for entrant in (SEPARATE, *entrants):
            for run in _of(entrant, objective, planned):
                shown = self.run(run, objective.slo)
                if shown is not None:
                    rounds.setdefault(entrant, {})[run.round] = shown
        gains = {
            entrant: self._gain(entrant, objective, planned, rounds[SEPARATE])
            for entrant in rounds
            if entrant != SEPARATE
        }
        rows = score(objective, rounds, {entrant: gain for entrant, gain in gains.items() if gain is not None})
        return Scored(objective, rows, marks(rows))

    def _gain(self, entrant: Entrant, objective: Objective, planned: list[PlannedRun], separate: Rounds) -> Gain | None:
        halves: dict[int, Run] = {}
        alone: dict[int, Run] = {}
        for run in _of(entrant, objective, planned):
            half = self.run(replace(run, load="half"), objective.slo)
            training = self.run(alone_run(run.round, self._menu), objective.slo)
            if half is not None and training is not None:
                halves[run.round], alone[run.round] = half, training
        return gain_over_dedicated(halves, alone, separate, objective.slo)

    def _held_against(self, record: Record, planned: PlannedRun, slo: Slo) -> Record:
        run = self.run(planned, slo)
        assert run is not None
        run_id = uuid.uuid5(uuid.UUID(record.info.run_id), str(slo)).hex
        known = {"run_id": run_id, "slo": slo, "summary": {name: run.metrics[name] for name in record.info.summary}}
        return replace(record, info=record.info.model_copy(update=known))


def _of(entrant: Entrant, objective: Objective, planned: list[PlannedRun]) -> list[PlannedRun]:
    """An entrant's runs of the rounds that count at an objective, round by round."""
    mine = [
        run
        for run in planned
        if run.entrant == entrant and run.round != PRUNING and run.load == "all" and run.objective in (None, objective)
    ]
    return sorted(mine, key=lambda run: run.round)


def compared(
    summary: Mapping[str, float | None], requests: pa.Table, updates: pa.Table, window_s: float
) -> dict[str, float | None]:
    """A run's ``summary`` with what a comparison counts in its own way, since runs end with their last answer.

    That comes the later the slower a policy makes decode, though within the SLO. Finetune tokens/s are therefore those
    of the updates committed in the first ``window_s`` seconds, which are the same for all policies: else the slowest
    would finetune longest on a device that is nearly empty. Whether requests are served as they come shows in
    ``ADMITTED``: completed ones over the seconds until the last of them was scheduled first.
    """
    inside = updates.filter(pc.less_equal(updates["time_s"], window_s))
    tokens_per_s = float(inside["tokens"].to_numpy().sum()) / window_s
    return {**summary, TOKENS: tokens_per_s, ADMITTED: _admitted_per_s(requests)}


def _admitted_per_s(requests: pa.Table) -> float | None:
    completed = requests.filter(pc.equal(requests["error"], ""))
    if not len(completed):
        return None
    admitted_s = completed["arrival_s"].to_numpy() + completed["queue_wait_ms"].to_numpy() / 1e3
    last_s = float(np.nanmax(admitted_s))
    return len(completed) / last_s if math.isfinite(last_s) and last_s > 0.0 else None
