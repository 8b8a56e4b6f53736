"""One turn of a job in the engine: from its last checkpoint until it ends or its turn is over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harli.engine.launch import command, finish
from harli.finetune import checkpoint
from harli.finetune.trainer import CHECKPOINTS
from harli.rows import UpdateRecord
from harli.serve.jobs import Job
from harli.serve.planning import HELD_OUT, TRAINING
from harli.serve.store import Store
from harli.types import HarliError

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

POLL_S = 0.25


class Turn:
    """Used once. What the job learns goes into the store as it happens."""

    def __init__(
        self,
        engine: AsyncLLM,
        store: Store,
        job: Job,
        folder: Path,
        on_updates: Callable[[Sequence[UpdateRecord]], None],
    ) -> None:
        """``on_updates``: told of committed updates."""
        self._engine = engine
        self._store = store
        self._job = job
        self._folder = folder
        self._on_updates = on_updates
        self._notice = ""
        self._unnoted: list[UpdateRecord] = []

    async def run(self, over: Callable[[], bool]) -> dict[str, Any] | None:
        """Train, until ``over`` says so or the job ends by itself, and save.

        Returns the engine's last ``status`` if the job has ended by itself, None if its turn was over.
        Cancelling saves too. Raises HarliError if the job cannot begin, OSError if it cannot for now, and
        EngineDeadError if the engine dies.
        """
        if not await self._start(over):
            return None
        try:
            while await self._training():
                if over():
                    return None
                await asyncio.sleep(POLL_S)
        finally:
            status = await self._stop()
        return status

    async def _start(self, over: Callable[[], bool]) -> bool:
        """False if the turn was over before the job was ready."""
        settings, folder = self._job.settings, self._folder
        if settings is None:
            raise HarliError("the job's files were not validated")
        # Where the data lay when it was put there may be another place than now: a backup's.
        settings = settings.model_copy(update={"data": folder / TRAINING, "held_out": folder / HELD_OUT})
        saved = checkpoint.complete(folder / CHECKPOINTS)
        resume = str(saved[-1]) if saved else None
        try:
            await command(self._engine, "prepare", settings.model_dump_json(), str(folder), resume)
            while (ready := await command(self._engine, "prepared")) is None:
                if over():
                    await command(self._engine, "release")
                    return False
                await asyncio.sleep(POLL_S / 5)
            if problem := ready.get("transient"):
                problem = problem.replace(f"{folder}/", "")
                self._store.add_event(self._job.id, f"cannot begin yet: {problem}", "warn")
                raise OSError(problem)
        except BaseException:
            await self._withdraw()
            raise
        return True

    async def _withdraw(self) -> None:
        """Nobody waits for the job any more: it does not start, or ends if it has started and its answer was lost."""
        await command(self._engine, "release")
        if (await command(self._engine, "status"))["training"]:
            await self._stop()

    async def _training(self) -> bool:
        status = await command(self._engine, "status")
        self._tell(status["policy_failure"] or status["finetune_failure"])
        await self._note_updates()
        return bool(status["training"])

    async def _stop(self) -> dict[str, Any]:
        status = await finish(self._engine)
        try:
            self._tell(status["finetune_failure"] if status["ended"] else "the job was not saved in time")
            await self._note_updates()
        finally:
            await command(self._engine, "release")
        return status

    def _tell(self, notice: str) -> None:
        """An event for what is new."""
        if notice and notice != self._notice:
            self._store.add_event(self._job.id, notice, "warn")
        self._notice = notice

    async def _note_updates(self) -> None:
        self._unnoted += [UpdateRecord(*row) for row in await command(self._engine, "drain_updates")]
        if self._unnoted:
            self._store.add_updates(self._job.id, self._unnoted)  # when the database refuses, they are tried again
            rows, self._unnoted = self._unnoted, []
            self._on_updates(rows)
