"""One policy over one workload on a running engine, from the first request to the record on disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from harli.engine.launch import command, finish
from harli.finetune.trainer import ADAPTER
from harli.live import LiveNumbers, Progress
from harli.records.schema import FinetuneInfo, RunInfo
from harli.records.summary import summarise
from harli.records.writer import RecordWriter
from harli.rows import StepRecord, UpdateRecord
from harli.workload.base import Workload
from harli.workload.client import OpenLoopClient

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

    from harli.config import RunSettings

Status = Literal["finished", "interrupted", "failed"]
POLL_S = 1.0
MEMORY = ("peak_bytes", "kept", "revoked")
CAPTURING_TIMEOUT_S = 30.0


class EngineDiedError(Exception):
    """The engine process died; the run can be carried on with another."""


@contextmanager
def _engine_death() -> Iterator[None]:
    """Turns vLLM's word for a dead engine into ours."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineDiedError from error


class PolicyRun:
    """Runs once. ``execute`` begins it; ``carry_on`` ends it on a second engine if the first one dies."""

    def __init__(
        self,
        settings: RunSettings,
        workload: Workload,
        writer: RecordWriter,
        info: RunInfo,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        predictor: Path | None = None,
    ) -> None:
        """``info``: what is known before the run; this object fills in the rest. ``predictor``: its folder."""
        self.info = info
        self._settings = settings
        self._workload = workload
        self._writer = writer
        self._on_progress = on_progress
        self._predictor = str(predictor) if predictor else None
        self._clock_zero: float | None = None
        self._client: OpenLoopClient
        self._serving: asyncio.Task[None] | None = None
        self._live = LiveNumbers(info.slo)
        self._finetune = FinetuneInfo(state="off")

    async def execute(self, engine: AsyncLLM, folder: Path, resume: Path | None) -> RunInfo:
        """Serve the workload with finetuning beside it, then save the adapter and write the record.

        Checkpoints and the adapter go into ``folder``; ``resume`` is a checkpoint to go on from.
        Cancelling aborts what is in flight and saves what was learned. Whatever is raised, the caller
        ends the run with ``end``, or with ``carry_on`` after an EngineDiedError.
        """
        self._engine = engine
        vocabulary, seed = engine.model_config.get_vocab_size(), self._settings.workload.seed
        self._client = OpenLoopClient(engine, self._workload, vocab_size=vocabulary, seed=seed)
        with _engine_death():
            await self._start_finetuning(folder.resolve(), resume)
            await self._begin()
            if await self._captured():
                await command(self._engine, "drain")  # what was trained meanwhile is no part of the run
                self._clock_zero = None
                await self._begin()
        return await self._to_the_end()

    async def carry_on(self, engine: AsyncLLM, reason: str) -> RunInfo:
        """Serve what is left on another engine, without finetuning; ``reason`` says why. Raises EngineDiedError."""
        self._engine = engine
        self._finetune = self._finetune.model_copy(update={"state": "failed", "reason": reason})
        with _engine_death():
            await self._begin()
        self._client.use(engine)
        return await self._to_the_end()

    def end(self, status: Status, reason: str) -> None:
        """Write the record of a run that cannot go on, with what there is of it."""
        if self._serving is not None:
            self._serving.cancel()
        if self._finetune.state == "running":
            self._finetune = self._finetune.model_copy(update={"state": "failed", "reason": reason})
        if self.info.status == "running":
            self._write(status)

    async def _begin(self) -> None:
        settings = self._settings
        arguments = (settings.policy, settings.params, settings.slo.model_dump(), settings.workload.seed)
        begun = await command(self._engine, "begin", *arguments, self._clock_zero, self._predictor)
        self._clock_zero = begun["clock_zero"]
        self.info = self.info.model_copy(update={"menu": begun["menu"]})

    async def _to_the_end(self) -> RunInfo:
        if self._serving is None:
            self._serving = asyncio.create_task(self._client.run(self._clock_zero))
        try:
            with _engine_death():
                try:
                    await self._serve()
                finally:
                    if not self._engine.errored:
                        await self._finish()
        except EngineDiedError:
            self._client.pause()
            raise
        self._write("finished")
        return self.info

    async def _start_finetuning(self, folder: Path, resume: Path | None) -> None:
        settings, checkpoint = self._settings.finetune.model_dump_json(), str(resume) if resume else None
        started = await command(self._engine, "finetune", settings, str(folder), checkpoint)
        told = ("shared_bytes", "base_bytes", "samples", "truncated", "dropped")
        self._finetune = FinetuneInfo(state="running", **{name: started[name] for name in told})

    async def _captured(self) -> bool:
        """Wait while finetuning makes its CUDA graphs; False if it made none."""
        deadline, waited = time.monotonic() + CAPTURING_TIMEOUT_S, False
        while (await command(self._engine, "status"))["capturing"] and time.monotonic() < deadline:
            waited = True
            await asyncio.sleep(0.05)
        return waited

    async def _serve(self) -> None:
        """Poll until the last request has ended and the duration is over."""
        end = self._zero + self._settings.workload.duration_s
        serving = self._serving
        assert serving is not None
        try:
            while not serving.done() or time.monotonic() < end:
                left = end - time.monotonic()
                if serving.done():
                    await asyncio.sleep(min(POLL_S, left))
                else:
                    await asyncio.wait({serving}, timeout=POLL_S)
                await self._poll()
            serving.result()
        except asyncio.CancelledError:
            serving.cancel()
            await asyncio.wait({serving})
            raise

    @property
    def _zero(self) -> float:
        assert self._clock_zero is not None
        return self._clock_zero

    async def _poll(self) -> None:
        status = await command(self._engine, "status")
        await self._drain()
        notice = self._finetune.reason or status["policy_failure"] or status["finetune_failure"]
        elapsed_s = time.monotonic() - self._zero
        self._on_progress(self._live.progress(elapsed_s, self._client.running, notice))

    async def _drain(self) -> None:
        rows = await command(self._engine, "drain")
        steps = [StepRecord(*row) for row in rows["steps"]]
        updates = [UpdateRecord(*row) for row in rows["updates"]]
        self._writer.add_steps(steps)
        self._writer.add_updates(updates)
        self._live.add(steps, updates, self._client.records)

    async def _finish(self) -> None:
        """Stop finetuning, wait until it is saved, and note how it went."""
        duration_s = time.monotonic() - self._zero
        await self._drain()
        self.info = self.info.model_copy(update={"duration_s": duration_s})
        if self.info.predictor is not None:
            correction = (await command(self._engine, "status"))["predictor"]
            predictor = self.info.predictor.model_copy(update={"correction": correction})
            self.info = self.info.model_copy(update={"predictor": predictor})
        if self._finetune.state != "running":
            return
        status = await finish(self._engine)
        await self._drain()  # an update whose optimizer step was under way is committed and saved
        failure = status["policy_failure"] or status["finetune_failure"]
        self._finetune = self._finetune.model_copy(
            update={
                "state": "failed" if failure else "finished",
                "reason": failure,
                "adapter": ADAPTER if status["saved"] else None,
                "memory": {name: status["memory"][name] for name in MEMORY if name in status["memory"]},
            }
        )

    def _write(self, status: Status) -> None:
        writer = self._writer
        if self._serving is not None:
            writer.add_requests(self._client.records)
        summary = summarise(
            writer.steps, writer.requests, writer.updates, slo=self.info.slo, duration_s=self.info.duration_s
        )
        self.info = self.info.model_copy(update={"status": status, "finetune": self._finetune, "summary": summary})
        writer.write(self.info)
