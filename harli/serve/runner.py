"""Runs the jobs of the store in the engine, one at a time, in turns.

A turn ends when the job does, when it is paused or cancelled, when a job of higher priority waits, or
when others of the same priority wait and the turn's time is over. What a turn has learned is in the
job's checkpoint, from which its next turn goes on exactly.
"""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.v1.engine.exceptions import EngineDeadError

from harli.config import FinetuneSettings
from harli.crashes import DEATHS_ALLOWED
from harli.finetune.trainer import ADAPTER
from harli.rows import UpdateRecord
from harli.serve.adapters import Adapters, model_name
from harli.serve.files import FileFolder
from harli.serve.jobs import NEXT, Job, JobError, Status
from harli.serve.planning import Planner
from harli.serve.store import Store
from harli.serve.threads import in_daemon_thread
from harli.serve.turn import POLL_S, Turn
from harli.transient import is_transient
from harli.types import HarliError, one_line

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

LOG = logging.getLogger(__name__)
RETRY_S = 5.0
LONGEST_RETRY_S = 600.0
"""What a job met that may pass is waited for, twice as long every time up to this."""


class JobRunner:
    """Two tasks that follow the store: one validates new jobs, one trains queued ones."""

    def __init__(
        self,
        engine: AsyncLLM,
        store: Store,
        files: FileFolder,
        planner: Planner,
        adapters: Adapters,
        folder: Path,
        turn_s: float,
        held_back: Callable[[], bool],
        on_updates: Callable[[Sequence[UpdateRecord]], None],
    ) -> None:
        """``folder``: gets a folder for each job, with its data, checkpoints and adapter.

        ``turn_s``: a turn's length while jobs of the same priority wait. ``held_back``: whether finetuning is switched
        off, so that no turn should begin. ``on_updates``: told of committed updates.
        """
        self._engine = engine
        self._store = store
        self._files = files
        self._planner = planner
        self._adapters = adapters
        self._folder = folder
        self._turn_s = turn_s
        self._held_back = held_back
        self._on_updates = on_updates
        self._tasks: list[asyncio.Task[None]] = []
        self._postponed: dict[str, tuple[float, float]] = {}
        """By job: when it is tried again, and after what delay, if the machine was not fit for it the last time."""
        self._suspect = ""
        """The job for which a death is noted, in case that the process dies of its files."""
        self.stopping = False

    async def start(self) -> None:
        """Serve the adapters of finished jobs again, and go on with the others. Raises EngineDeadError."""
        finished = self._store.jobs_in(Status.SUCCEEDED)
        await self._adapters.serve_again({job.model: self._folder / job.id / ADAPTER for job in finished if job.model})
        # What requests to deleted models may have needed to their end, and what a server left that was killed.
        await self._remove_folders(*(job for job in finished if not job.model), *self._store.jobs_in(Status.CANCELLED))
        for job in self._store.jobs_in(Status.RUNNING):  # the server was killed: perhaps by what the job did at once
            if job.updates_done == job.turn_began:
                with suppress(sqlite3.OperationalError):  # a full disk is no reason not to start
                    self._store.note_death(job.id)
        self._tasks = [asyncio.create_task(self._forever(step)) for step in (self._validate_next, self._train_next)]

    async def stop(self) -> None:
        """End after the running unit; the job that runs is saved, and queued again."""
        self.stopping = self.stopping or not self._engine.errored
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _forever(self, step: Callable[[], Awaitable[None]]) -> None:
        """Whatever goes wrong in a step, requests are served on."""
        while True:
            try:
                await step()
                await asyncio.sleep(POLL_S)
            except EngineDeadError:
                return  # vLLM's server ends now
            except Exception:
                LOG.exception("jobs go on in %.0f s", RETRY_S)
                await asyncio.sleep(RETRY_S)

    async def _validate_next(self) -> None:
        if self._held_back():  # reading files slows the server's event loop
            return
        for job in [job for job in self._store.jobs_in(Status.VALIDATING) if not self._is_postponed(job)][:1]:
            if job.id != self._suspect and job.deaths > DEATHS_ALLOWED:
                self._fail(job, "quarantined", "the server died twice while it read the job's files", "training_file")
            else:
                with self._death_noted(job), self._postponing(job):
                    plan = await self._plan(job)
                if isinstance(plan, str):
                    self._fail(job, "invalid_file", plan, "training_file")
                elif self._store.job(job.id).status is Status.VALIDATING:
                    self._store.set_settings(job.id, plan)
                    self._store.move(job.id, Status.QUEUED)
            if self._store.job(job.id).status is not Status.QUEUED:
                await self._remove_folders(job)

    @contextmanager
    def _death_noted(self, job: Job) -> Iterator[None]:
        """Inside, a death is noted for the job, which stays if the process does die."""
        if job.id != self._suspect:  # else a full disk has kept it from being taken back
            self._store.note_death(job.id)
            self._suspect = job.id
        try:
            yield
        finally:
            self._store.forgive_death(job.id)
            self._suspect = ""

    @contextmanager
    def _postponing(self, job: Job) -> Iterator[None]:
        """Inside, an exception lets others be tried before the job is again."""
        try:
            yield
        except Exception:
            _, before_s = self._postponed.get(job.id, (0.0, RETRY_S / 2))
            delay_s = min(2.0 * before_s, LONGEST_RETRY_S)
            self._postponed[job.id] = time.monotonic() + delay_s, delay_s
            raise
        self._postponed.pop(job.id, None)

    def _is_postponed(self, job: Job) -> bool:
        return time.monotonic() < self._postponed.get(job.id, (0.0, 0.0))[0]

    def _next_job(self) -> Job | None:
        return next((job for job in self._store.queue() if not self._is_postponed(job)), None)

    async def _plan(self, job: Job) -> FinetuneSettings | str:
        """How the job is trained, or what is wrong with its files."""
        request = job.request
        try:
            training = self._files.path(request.training_file)
            validation = self._files.path(request.validation_file) if request.validation_file else None
            planned = partial(self._planner.plan, request, training, validation, self._folder / job.id)
            return await in_daemon_thread(planned)
        except Exception as error:  # whatever is wrong with one job's files, the next job is looked at
            if is_transient(error):
                raise
            if isinstance(error, HarliError):
                return str(error)
            return one_line(error).replace(f"{self._folder.parent}/", "")

    async def _train_next(self) -> None:
        for interrupted in self._store.jobs_in(Status.RUNNING):  # left by a killed server, or by a full disk
            self._store.add_event(interrupted.id, "interrupted; the job goes on from its last checkpoint", "warn")
            self._store.move(interrupted.id, Status.QUEUED)
        job = self._next_job()
        if job is None or self._held_back():
            return
        if job.deaths > DEATHS_ALLOWED:
            self._fail(job, "quarantined", "the engine process died twice while the job was running")
            return
        self._store.take_turn(job.id)
        try:
            turn = Turn(self._engine, self._store, job, self._folder / job.id, self._on_updates)
            with self._postponing(job):
                status = await turn.run(self._until(job))
                if status is not None and self._store.job(job.id).status is Status.RUNNING:
                    await self._conclude(job, status)
        except HarliError as error:
            self._fail(job, "not_started", str(error).replace(f"{self._folder / job.id}/", ""))
        finally:
            if self._engine.errored and not self.stopping:
                self._store.note_death(job.id)
                self._store.add_event(job.id, "the engine process died while the job was running", "warn")
            after = self._store.job(job.id).status
            if after is Status.RUNNING:
                self._store.move(job.id, Status.QUEUED)
            elif after is Status.CANCELLED:
                await self._remove_folders(job)

    def _until(self, job: Job) -> Callable[[], bool]:
        """Whether the turn of ``job`` is over; it begins with the first call. Equals get an update or more."""
        end, priority = math.inf, job.request.harli.priority

        def over() -> bool:
            nonlocal end
            now = time.monotonic()
            end = min(end, now + self._turn_s)
            present = self._store.job(job.id)
            if present.status is not Status.RUNNING:
                return True
            other = self._next_job()
            if other is None or other.request.harli.priority < priority:
                return False
            return other.request.harli.priority > priority or (now > end and present.updates_done > job.updates_done)

        return over

    async def _conclude(self, job: Job, status: dict[str, Any]) -> None:
        """The job has ended by itself: serve its adapter if that is good for anything."""
        if status["complete"] and not status["saved"]:
            raise OSError(status["finetune_failure"] or "the adapter was not saved in time")  # perhaps the next time
        if not status["complete"]:
            self._fail(job, "training_failed", status["finetune_failure"] or "training ended early")
            return
        base, adapter = status["held_out"]
        losses = f"held-out loss {adapter:.4f} with the adapter, {base:.4f} without"
        self._store.add_event(job.id, losses, data={"full_valid_loss": adapter, "base_valid_loss": base})
        if not adapter < base:
            self._fail(job, "held_out_loss", f"{losses}: the adapter is kept and not served")
            return
        name = model_name(job)
        try:
            await self._adapters.load(name, self._folder / job.id / ADAPTER)
        except HarliError as error:
            self._fail(job, "adapter_not_served", str(error))
            return
        served = False
        try:
            if self._store.job(job.id).status is Status.RUNNING:  # neither cancelled nor paused while it was loaded
                self._store.move(job.id, Status.SUCCEEDED, model=name)
                served = True
        finally:
            if not served:  # nor listed, so that it can be loaded again
                await self._adapters.unload(name)

    async def _remove_folders(self, *jobs: Job) -> None:
        """In a thread, since they may hold gigabytes."""

        def remove() -> None:
            for job in jobs:
                shutil.rmtree(self._folder / job.id, ignore_errors=True)

        await asyncio.to_thread(remove)

    def _fail(self, job: Job, code: str, message: str, param: str | None = None) -> None:
        """Unless it was paused or cancelled meanwhile."""
        self._postponed.pop(job.id, None)
        if Status.FAILED in NEXT[self._store.job(job.id).status]:
            self._store.move(job.id, Status.FAILED, JobError(code=code, message=message, param=param))
