"""A comparison from its settings to its folder: one engine, run after run, a drain between."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from harli import crashes
from harli.compare.cell import SEPARATE, Entrant, groups
from harli.compare.plan import PRUNING, PlannedRun, alone_run, expected_s, planned_runs
from harli.compare.results import ComparisonFolder
from harli.compare.settings import COMPARISON_FILE, ComparisonInfo, ComparisonSettings, check_same
from harli.config import RunSettings, SloSettings
from harli.engine import device
from harli.engine.launch import engine_arguments, launched, prepare_environment
from harli.engine.log import warnings
from harli.experiment import ENGINE_LOG, check_data
from harli.finetune.builtin import write_builtin_dataset
from harli.finetune.trainer import CHECKPOINTS
from harli.forecasting import Chosen, choose
from harli.live import Progress as RunProgress
from harli.records.schema import FinetuneInfo, RunInfo
from harli.records.writer import RecordWriter, make_folder, replacing
from harli.run import EngineDiedError, PolicyRun
from harli.types import HarliError, Slo
from harli.workload.base import Workload
from harli.workload.make import make_workload

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

TRIAL_SLO_MS = 100.0
"""Policies are tried with it while the SLO still has to be measured."""


class Progress(NamedTuple):
    """What a comparison tells its caller every second, and when a run has ended."""

    planned: PlannedRun
    done_s: float
    """Seconds of workload that are over."""
    total_s: float
    live: RunProgress | None
    """None when the run has ended."""


class Comparison:
    """Making it checks the settings; nothing is written before ``execute``."""

    def __init__(self, settings: ComparisonSettings, resume: Path | None = None) -> None:
        """``resume``: the folder of a comparison to go on with; it has to be of the same settings.

        Raises HarliError for whatever the user can mend.
        """
        prepare_environment()
        self.settings = settings
        self.menu = device.menu()
        self.variants = groups(settings.policies, self.menu)
        self._before = ComparisonFolder(resume) if resume else None
        if self._before is not None:
            check_same(self._before.info, settings, [str(share) for share in self.menu.shares])
        self.job = crashes.job_name(settings.run.engine.model, settings.run.finetune)
        crashes.check(self.job)
        arguments = engine_arguments(settings.run.engine)
        self.workload = make_workload(settings.run.workload, arguments["max_model_len"])
        finetune = settings.run.finetune
        if finetune.data is not None:
            check_data(finetune.data, arguments["model"], finetune.microbatch_tokens)
        if any(len(group) > 1 for group in self.variants):
            self.requests(PlannedRun(PRUNING, SEPARATE))
        self.predictors = {entrant: self._chosen(entrant) for entrant in self._entrants()}
        if self._before is not None:
            self._check_predictors(self._before)

    async def execute(
        self, folder: Path, on_start: Callable[[list[str]], None], on_progress: Callable[[Progress], None]
    ) -> None:
        """Run whatever is not complete in ``folder``, which is created unless it is gone on with.

        Cancelling keeps all that is complete. Raises HarliError when the engine fails; what there is can be
        resumed.
        """
        self.prepare(folder)
        if ComparisonFolder(folder).is_complete():
            return
        with ExitStack() as cleanup:
            data = self.settings.run.finetune.data
            if data is None:
                data = Path(cleanup.enter_context(TemporaryDirectory(prefix="harli-"))) / "docstrings.jsonl"
                write_builtin_dataset(data)
            async with launched(self.settings.run.engine, folder / ENGINE_LOG) as engine:
                on_start(warnings(folder / ENGINE_LOG))
                await Sitting(self, folder, data, on_progress).run(engine)

    def prepare(self, folder: Path) -> None:
        """Create ``folder`` and describe the comparison in it, unless one is gone on with."""
        if self._before is None:
            make_folder(folder)
            with replacing(folder / COMPARISON_FILE) as path:
                path.write_text(self._info().model_dump_json(indent=2) + "\n", encoding="utf-8")

    def run_settings(self, planned: PlannedRun) -> RunSettings:
        """The settings of one run."""
        slo = planned.objective.slo if planned.objective else Slo()
        workload = self.settings.run.workload
        longest_s = self.settings.prune_s if planned.round == PRUNING else workload.duration_s
        changes: dict[str, Any] = {
            "policy": planned.entrant.policy,
            "params": dict(planned.entrant.params),
            "slo": SloSettings(itl_ms=slo.itl_ms, tpot_ms=slo.tpot_ms),
            "workload": workload.model_copy(update={"duration_s": min(longest_s, workload.duration_s)}),
        }
        return self.settings.run.model_copy(update=changes)

    def requests(self, planned: PlannedRun) -> Workload:
        """The requests of one run. Raises HarliError when the pruning pass is too short to have one."""
        requests = self.workload.requests
        if planned.load == "none":
            requests = ()
        elif planned.load == "half":
            requests = requests[::2]
        elif planned.round == PRUNING:
            requests = tuple(one for one in requests if one.arrival_s < self.settings.prune_s)
            if not requests:
                raise HarliError(f"no request is due in the first {self.settings.prune_s:g} s; raise --prune-s")
        return replace(self.workload, requests=requests)

    def _entrants(self) -> list[Entrant]:
        alone = [alone_run(1, self.menu).entrant] if self.settings.dedicated else []
        return [SEPARATE, *alone, *(entrant for group in self.variants for entrant in group)]

    def _chosen(self, entrant: Entrant) -> Chosen:
        slo = self.settings.run.slo
        trial = Slo(slo.itl_ms, slo.tpot_ms)
        if self.settings.slo_scales:
            trial = Slo(**{f"{self.settings.slo_on}_ms": TRIAL_SLO_MS})
        return choose(self.run_settings(PlannedRun(1, entrant)), trial)

    def _check_predictors(self, before: ComparisonFolder) -> None:
        """Raises HarliError unless each entrant would go on with the predictor that it began with."""
        for planned in before.planned():
            record = before.record(planned)
            used, chosen = record and record.info.predictor, self.predictors[planned.entrant].info
            if record and (used and used.data_sha256) != (chosen and chosen.data_sha256):
                raise HarliError(
                    f"{planned} ran with another predictor than {self.settings.run.predictor} is now; "
                    "promote that one again (harli predictors), or begin a new comparison"
                )

    def _info(self) -> ComparisonInfo:
        return ComparisonInfo(
            settings=self.settings,
            menu=[str(share) for share in self.menu.shares],
            device=device.describe(),
            versions=device.versions(),
            started_at=datetime.now(UTC).isoformat(),
        )


class Sitting:
    """Runs with one engine what is not complete yet."""

    def __init__(
        self, comparison: Comparison, folder: Path, data: Path, on_progress: Callable[[Progress], None]
    ) -> None:
        self._comparison = comparison
        self._folder = folder
        self._data = data
        self._on_progress = on_progress
        self._results = ComparisonFolder(folder)
        self._done_s = 0.0
        self._total_s = expected_s(comparison.settings, comparison.variants)

    async def run(self, engine: AsyncLLM) -> None:
        """Raises HarliError when the engine dies."""
        comparison = self._comparison
        for planned in planned_runs(comparison.settings, comparison.variants, comparison.menu, self._results):
            missing = not self._results.complete(planned)
            if missing:
                await self._run(engine, planned)
            self._done_s += comparison.run_settings(planned).workload.duration_s
            if missing:
                self._tell(planned, None)

    async def _run(self, engine: AsyncLLM, planned: PlannedRun) -> None:
        """One run into its own folder, in place of what an interrupted one left there."""
        folder, settings = self._folder / planned.folder, self._comparison.run_settings(planned)
        if folder.exists():
            shutil.rmtree(folder)
        chosen = self._comparison.predictors[planned.entrant]
        info = self._info(planned, settings, chosen)
        finetune = settings.finetune.model_copy(update={"data": self._data})
        run = PolicyRun(
            settings.model_copy(update={"finetune": finetune}),
            self._comparison.requests(planned),
            RecordWriter(folder, info),
            info,
            lambda live: self._tell(planned, live),
            chosen.folder,
        )
        try:
            await run.execute(engine, folder, None)
        except EngineDiedError:
            crashes.note(self._comparison.job)
            reason = f"the engine process died in {planned}; {self._folder / ENGINE_LOG} may say why"
            run.end("failed", reason)
            raise HarliError(f"{reason}; go on with --resume {self._folder}") from None
        except BaseException as error:
            run.end("interrupted" if isinstance(error, asyncio.CancelledError) else "failed", str(error))
            raise
        crashes.forget(self._comparison.job)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # nobody goes on with this job, and it takes room

    def _tell(self, planned: PlannedRun, live: RunProgress | None) -> None:
        duration_s = self._comparison.run_settings(planned).workload.duration_s
        done_s = self._done_s + (min(live.elapsed_s, duration_s) if live else 0.0)
        self._on_progress(Progress(planned, done_s, max(self._total_s, done_s), live))

    def _info(self, planned: PlannedRun, settings: RunSettings, chosen: Chosen) -> RunInfo:
        whole = self._results.info
        return RunInfo(
            name=str(planned),
            policy=settings.policy,
            policy_params=dict(settings.params),
            settings=settings.model_dump(mode="json"),
            model=settings.engine.model,
            role=settings.engine.role,
            slo=Slo(settings.slo.itl_ms, settings.slo.tpot_ms),
            menu=whole.menu,
            device=whole.device,
            versions=device.versions(),
            started_at=datetime.now(UTC).isoformat(),
            status="running",
            finetune=FinetuneInfo(state="off"),
            predictor=chosen.info,
        )
