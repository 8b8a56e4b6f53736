"""Fine-tuning jobs that come and go, through an unmodified OpenAI client."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
from safetensors import SafetensorError
from safetensors.torch import load_file

from harli.finetune.builtin import write_builtin_dataset

if TYPE_CHECKING:
    from openai.types.fine_tuning import FineTuningJob

ACTIVE = 2
"""Jobs that wait or train at a time."""
SAMPLES = 20
UPDATES_BEFORE = 2
"""A job is cancelled, or paused, after as many updates."""
PAUSED_S = 10.0


class Fate(Enum):
    """What becomes of a job."""

    FINISH = auto()
    PAUSE = auto()
    """Paused for a while, then left to finish."""
    CANCEL = auto()


FATES = (Fate.FINISH, Fate.PAUSE, Fate.FINISH, Fate.CANCEL)
"""Of one job after the other, again and again."""


class Jobs:
    """Jobs of one epoch over a few docstrings; ``attend`` once a second keeps ``ACTIVE`` of them going.

    A finished job's adapter is tried and then deleted, since each one that is served takes memory.
    """

    def __init__(self, client: openai.AsyncOpenAI, model: str, folder: Path) -> None:
        """``folder``: of the server's jobs."""
        self._client = client
        self._model = model
        self._folder = folder
        self._usable = 0
        self._file = ""
        self._created = 0
        self._resumed = 0
        self._fates: dict[str, Fate] = {}
        """Of the jobs that have not ended."""
        self._resume_s: dict[str, float] = {}
        self._ended: list[FineTuningJob] = []

    async def upload(self) -> None:
        """The file of all jobs; to be called once, before ``attend``."""
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder, "data.jsonl")
            write_builtin_dataset(data, SAMPLES)
            self._file = (await self._client.files.create(file=data, purpose="fine-tune")).id

    async def attend(self) -> None:
        """See what has become of the jobs, do to each what its fate says, and create new ones."""
        running = sum(job.status != "paused" for job in await self._follow_all())
        for _ in range(ACTIVE - running):
            await self._create()

    async def finish(self, within_s: float) -> None:
        """Let the jobs that are left meet their fates, and wait for that at most ``within_s``."""
        end_s = time.monotonic() + within_s
        while await self._follow_all() and time.monotonic() < end_s:
            await asyncio.sleep(1.0)

    async def report(self) -> dict[str, Any]:
        """How many jobs ended how, and of how many the adapter could be used."""
        unfinished = await self._unfinished()
        return {
            "created": self._created,
            "ended": dict(Counter(job.status for job in self._ended)),
            "unfinished": len(unfinished),
            "paused_and_resumed": self._resumed,
            "adapters_usable": self._usable,
            "errors": [job.error.message for job in self._ended if job.error],
        }

    async def _unfinished(self) -> list[FineTuningJob]:
        """As they are now; those that have ended since the last call are put aside."""
        jobs = [await self._client.fine_tuning.jobs.retrieve(id_) for id_ in self._fates]
        for job in jobs:
            if job.finished_at is not None:
                del self._fates[job.id]
                self._ended.append(job)
                if job.status == "succeeded":
                    self._usable += await self._is_usable(job, self._folder / job.id)
                    await self._client.models.delete(job.fine_tuned_model or "")
        return [job for job in jobs if job.id in self._fates]

    async def _follow_all(self) -> list[FineTuningJob]:
        unfinished = await self._unfinished()
        for job in unfinished:
            with suppress(openai.BadRequestError):  # it has ended meanwhile
                await self._follow(job)
        return unfinished

    async def _follow(self, job: FineTuningJob) -> None:
        jobs, fate = self._client.fine_tuning.jobs, self._fates[job.id]
        if fate is Fate.FINISH or job.model_extra["harli"]["updates_done"] < UPDATES_BEFORE:
            return
        if fate is Fate.CANCEL:
            await jobs.cancel(job.id)
        elif job.status != "paused":
            await jobs.pause(job.id)
            self._resume_s[job.id] = time.monotonic() + PAUSED_S
        elif time.monotonic() >= self._resume_s[job.id]:
            await jobs.resume(job.id)
            self._resumed += 1
            self._fates[job.id] = Fate.FINISH

    async def _create(self) -> None:
        job = await self._client.fine_tuning.jobs.create(
            model=self._model,
            training_file=self._file,
            seed=self._created,
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
        )
        self._fates[job.id] = FATES[self._created % len(FATES)]
        self._created += 1

    async def _is_usable(self, job: FineTuningJob, folder: Path) -> bool:
        """Whether its file has finite numbers, and its name is listed and answers."""
        name = job.fine_tuned_model or ""
        try:
            finite = await asyncio.to_thread(_is_finite, folder / "adapter" / "adapter_model.safetensors")
            listed = name in [model.id async for model in self._client.models.list()]
            await self._client.completions.create(model=name, prompt="Write", max_tokens=1)
        except (OSError, SafetensorError, openai.OpenAIError):
            return False
        return listed and finite


def _is_finite(adapter: Path) -> bool:
    """Beside the event loop, which times the requests."""
    return all(bool(tensor.isfinite().all()) for tensor in load_file(adapter).values())
