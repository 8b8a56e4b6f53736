"""A comparison on a real engine: one engine, run after run, a drain between."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harli import crashes
from harli.compare.base import Comparison, OnProgress, Progress
from harli.compare.cell import SEPARATE, Entrant
from harli.compare.plan import PRUNING, PlannedRun, expected_s, planned_runs
from harli.compare.results import ComparisonFolder
from harli.compare.settings import ComparisonSettings, check_identity
from harli.config import RunSettings
from harli.engine import device
from harli.engine.launch import engine_arguments, launched, prepare_environment
from harli.engine.log import warnings
from harli.experiment import ENGINE_LOG, check_data
from harli.finetune.builtin import given_or_builtin
from harli.finetune.trainer import CHECKPOINTS
from harli.live import Progress as RunProgress
from harli.predictor_choice import Chosen, choose
from harli.records.schema import RunInfo
from harli.records.writer import RecordWriter
from harli.run import EngineDiedError, PolicyRun
from harli.types import HarliError
from harli.workload.make import make_workload

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


class EngineComparison(Comparison):
    """Policies in turn on the engine of this machine."""

    def __init__(self, settings: ComparisonSettings, resume: Path | None = None) -> None:
        prepare_environment()
        super().__init__(settings, device.menu(), resume)
        if self.before is not None:
            check_identity(self.before.info, self.device(), device.versions())
        self.job = crashes.job_name(settings.run.engine.model, settings.run.finetune)
        crashes.check(self.job)
        arguments = engine_arguments(settings.run.engine)
        self.workload = make_workload(settings.run.workload, arguments["max_model_len"])
        finetune = settings.run.finetune
        if finetune.data is not None:
            check_data(finetune.data, arguments["model"], finetune.microbatch_tokens)
        if any(len(group) > 1 for group in self.variants):
            self.requests(PlannedRun(PRUNING, SEPARATE))
        trial = self.trial_slo()
        self.predictors = {
            entrant: choose(self.run_settings(PlannedRun(1, entrant)), trial) for entrant in self.entrants()
        }
        self.check_predictors()

    def device(self) -> dict[str, Any]:
        return device.describe()

    def data_sha256(self, entrant: Entrant) -> str:
        info = self.predictors[entrant].info
        return info.data_sha256 if info else ""

    async def execute(self, folder: Path, on_start: Callable[[list[str]], None], on_progress: OnProgress) -> None:
        """Run whatever is not complete in ``folder``, which is created unless it is resumed.

        Cancelling keeps all that is complete. Raises HarliError when the engine fails; what there is can be
        resumed.
        """
        self.prepare(folder)
        with given_or_builtin(self.settings.run.finetune.data) as data:
            async with launched(self.settings.run.engine, folder / ENGINE_LOG) as engine:
                on_start(warnings(folder / ENGINE_LOG))
                await Sitting(self, folder, data, on_progress).run(engine)


class Sitting:
    """Runs with one engine what is not complete yet."""

    def __init__(self, comparison: EngineComparison, folder: Path, data: Path, on_progress: OnProgress) -> None:
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
            raise HarliError(f"{reason}; resume with --resume {self._folder}") from None
        except BaseException as error:
            run.end("interrupted" if isinstance(error, asyncio.CancelledError) else "failed", str(error))
            raise
        crashes.forget(self._comparison.job)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # nobody resumes this job, and it takes room

    def _tell(self, planned: PlannedRun, live: RunProgress | None) -> None:
        duration_s = self._comparison.run_settings(planned).workload.duration_s
        done_s = self._done_s + (min(live.elapsed_s, duration_s) if live else 0.0)
        self._on_progress(Progress(planned, done_s, max(self._total_s, done_s), live))

    def _info(self, planned: PlannedRun, settings: RunSettings, chosen: Chosen) -> RunInfo:
        whole = self._results.info
        return RunInfo.begun(
            settings,
            name=str(planned),
            menu=whole.menu,
            device=whole.device,
            versions=device.versions(),
            predictor=chosen.info,
        )
