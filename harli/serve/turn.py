"""One turn of a job in the engine: from its last checkpoint until it ends or its turn is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harli.engine.launch import command
from harli.finetune import checkpoint
from harli.finetune.trainer import CHECKPOINTS
from harli.rows import UpdateRecord
from harli.serve.jobs import Job
from harli.serve.store import Store
from harli.types import HarliError

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

POLL_S = 0.25
SAVE_TIMEOUT_S = 60.0


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
        Cancelling saves too. Raises HarliError if the job cannot begin, EngineDeadError if the engine dies.
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
        settings = self._job.settings
        if settings is None:
            raise HarliError("the job's files were not validated")
        saved = checkpoint.complete(self._folder / CHECKPOINTS)
        resume = str(saved[-1]) if saved else None
        await command(self._engine, "prepare", settings.model_dump_json(), str(self._folder), resume)
        while await command(self._engine, "prepared") is None:
            if over():
                await command(self._engine, "release")
                return False
            await asyncio.sleep(POLL_S / 5)
        return True

    async def _training(self) -> bool:
        status = await command(self._engine, "status")
        notice = status["policy_failure"] or status["finetune_failure"]
        if notice and notice != self._notice:
            self._store.add_event(self._job.id, notice, "warn")
        self._notice = notice
        await self._note_updates()
        return bool(status["training"])

    async def _stop(self) -> dict[str, Any]:
        await command(self._engine, "finish")
        deadline = time.monotonic() + SAVE_TIMEOUT_S
        status: dict[str, Any] = await command(self._engine, "status")
        while not status["ended"] and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S / 5)
            status = await command(self._engine, "status")
        await self._note_updates()
        await command(self._engine, "release")
        return status

    async def _note_updates(self) -> None:
        self._unnoted += [UpdateRecord(*row) for row in await command(self._engine, "drain_updates")]
        if self._unnoted:
            self._store.add_updates(self._job.id, self._unnoted)  # when the database refuses, they are tried again
            rows, self._unnoted = self._unnoted, []
            self._on_updates(rows)
