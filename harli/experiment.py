"""From settings to a record: check everything, start the engine, run, and leave a folder behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from harli import crashes
from harli.config import RunSettings
from harli.engine import device
from harli.engine.launch import engine_arguments, launched, prepare_environment
from harli.engine.log import warnings
from harli.finetune import checkpoint
from harli.finetune.builtin import given_or_builtin
from harli.finetune.dataset import read_samples
from harli.live import Progress
from harli.predictor_choice import choose
from harli.records.schema import RunInfo
from harli.records.writer import RecordWriter
from harli.run import EngineDiedError, PolicyRun
from harli.types import HarliError
from harli.workload.make import make_workload

ENGINE_LOG = "engine.log"
DIED = "the engine process died; decode was restarted without finetuning"


class Experiment:
    """One run on an engine of its own. Making it checks the settings; nothing is written before ``execute``."""

    def __init__(self, settings: RunSettings, resume: Path | None = None, release_job: str | None = None) -> None:
        """Raises HarliError for whatever the user can mend.

        Args:
            settings: all of the run's.
            resume: a record or checkpoint to go on from.
            release_job: the name of a job to take out of quarantine.
        """
        prepare_environment()
        self.job = crashes.job_name(settings.engine.model, settings.finetune)
        if release_job:
            crashes.forget(release_job)
        crashes.check(self.job)
        self.resume = checkpoint.latest(resume).resolve() if resume else None
        self.slo = settings.slo.objective
        self.predictor = choose(settings, self.slo)
        arguments = engine_arguments(settings.engine)
        self.workload = make_workload(settings.workload, arguments["max_model_len"])
        self.settings = settings
        self._model = arguments["model"]
        if settings.finetune.data is not None:
            check_data(settings.finetune.data, arguments["model"], settings.finetune.microbatch_tokens)

    async def execute(
        self, folder: Path, on_start: Callable[[list[str]], None], on_progress: Callable[[Progress], None]
    ) -> RunInfo:
        """Run and write the record in ``folder``. ``on_start`` is called with vLLM's warnings when the engine is up.

        An engine that dies is replaced once, without finetuning. When that dies too, the record says
        so and a HarliError is raised.
        """
        settings = self.settings
        with given_or_builtin(settings.finetune.data) as data:
            settings = settings.model_copy(update={"finetune": settings.finetune.model_copy(update={"data": data})})
            if self.resume:
                checkpoint.check(self.resume, settings.finetune, self._model)
            info = self._info()
            writer = RecordWriter(folder, info)
            run = PolicyRun(settings, self.workload, writer, info, on_progress, self.predictor.folder)
            try:
                return await self._supervise(run, settings, folder, on_start)
            except BaseException as error:
                run.end("interrupted" if isinstance(error, asyncio.CancelledError) else "failed", str(error))
                raise

    async def _supervise(
        self, run: PolicyRun, settings: RunSettings, folder: Path, on_start: Callable[[list[str]], None]
    ) -> RunInfo:
        log = folder / ENGINE_LOG
        try:
            async with launched(settings.engine, log) as engine:
                on_start(warnings(log))
                info = await run.execute(engine, folder, self.resume)
            crashes.forget(self.job)
            return info
        except EngineDiedError:
            crashes.note(self.job)
        try:
            async with launched(settings.engine, log) as engine:
                return await run.carry_on(engine, DIED)
        except EngineDiedError:
            raise HarliError(f"the engine process died twice; {log} may say why, the record is kept") from None

    def _info(self) -> RunInfo:
        return RunInfo.begun(
            self.settings,
            menu=[str(share) for share in device.menu().shares],
            device=device.describe(),
            versions=device.versions(),
            predictor=self.predictor.info,
        )


def check_data(data: Path, model: str, microbatch_tokens: int) -> None:
    """Read finetuning data once, so that a bad line is told before the engine starts. Raises HarliError for one."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise HarliError(f"cannot load the tokenizer of {model}: {str(error).splitlines()[0]}") from error
    read_samples(data, tokenizer, max_tokens=microbatch_tokens)
