"""``/v1/fine_tuning/jobs``, after OpenAI's API."""

from __future__ import annotations

import asyncio
import math
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request

from harli.finetune import checkpoint
from harli.finetune.trainer import CHECKPOINTS
from harli.serve.http import bad_request, page
from harli.serve.jobs import Job, JobRequest, Status
from harli.serve.store import Store
from harli.types import HarliError

MAX_UNFINISHED = 100
Limit = Annotated[int, Query(ge=1, le=1000)]


def jobs_router(store: Store, jobs_folder: Path, base_model: str, max_rank: int) -> APIRouter:
    """``base_model``: the only one that can be fine-tuned. ``max_rank``: the highest that the engine serves."""
    router = APIRouter(prefix="/v1/fine_tuning/jobs")

    def known(id_: str) -> Job:
        with _not_found("job"):
            return store.job(id_)

    def moved(id_: str, status: Status) -> dict[str, Any]:
        known(id_)
        with bad_request():
            store.move(id_, status)
        return known(id_).describe()

    def check(request: JobRequest) -> None:
        """Raises HarliError for what can be told without reading the data."""
        if request.model != base_model:
            raise HarliError(f"model {request.model!r} is not the one that is served, {base_model!r}")
        if (request.harli.lora_rank or 0) > max_rank:
            raise HarliError(f"lora_rank is above {max_rank}; start the server with a higher --max-lora-rank")
        for id_ in filter(None, (request.training_file, request.validation_file)):
            if store.file(id_) is None:
                raise HarliError(f"no file {id_!r}")
        if store.count_unfinished() >= MAX_UNFINISHED:
            raise HarliError(f"{MAX_UNFINISHED} jobs are waiting already")

    @router.post("")
    async def create(request: JobRequest) -> dict[str, Any]:
        with bad_request():
            check(request)
        return store.add_job(f"ftjob-{secrets.token_hex(12)}", request).describe()

    @router.get("")
    async def list_jobs(request: Request, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
        asked = [(key, value) for key, value in request.query_params.items() if key.startswith("metadata[")]
        metadata = {key.removeprefix("metadata[").removesuffix("]"): value for key, value in asked}
        with _not_found("job"):
            return page(store.jobs(after, limit + 1, metadata), limit)

    @router.get("/{id_}")
    async def retrieve(id_: str) -> dict[str, Any]:
        return known(id_).describe()

    @router.get("/{id_}/events")
    async def events(id_: str, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
        job = known(id_)
        with _not_found("event"):
            return page(store.events(job.id, after, limit + 1), limit)

    @router.get("/{id_}/checkpoints")
    async def checkpoints(id_: str, after: str | None = None, limit: Limit = 10) -> dict[str, Any]:
        saved = _checkpoints(known(id_).id, jobs_folder / id_ / CHECKPOINTS)
        with _not_found("checkpoint"):
            before = math.inf if after is None else _updates_of(id_, after)
        return page([one for one in reversed(saved) if one.updates < before], limit)

    @router.post("/{id_}/cancel")
    async def cancel(id_: str) -> dict[str, Any]:
        before = known(id_).status
        job = moved(id_, Status.CANCELLED)
        if before in (Status.QUEUED, Status.PAUSED):  # of one that is at work, who works on it removes the folder
            await asyncio.to_thread(shutil.rmtree, jobs_folder / id_, ignore_errors=True)
        return job

    @router.post("/{id_}/pause")
    async def pause(id_: str) -> dict[str, Any]:
        return moved(id_, Status.PAUSED)

    @router.post("/{id_}/resume")
    async def resume(id_: str) -> dict[str, Any]:
        if known(id_).status is not Status.PAUSED:
            raise HTTPException(HTTPStatus.BAD_REQUEST, f"job {id_} is {known(id_).status}, not paused")
        return moved(id_, Status.QUEUED)

    return router


@contextmanager
def _not_found(what: str) -> Iterator[None]:
    """Inside, a KeyError becomes status 404."""
    try:
        yield
    except KeyError as error:
        raise HTTPException(HTTPStatus.NOT_FOUND, f"no {what} {error.args[0]!r}") from None


class _Checkpoint:
    """One from which the job would go on; it is not served."""

    def __init__(self, job: str, path: Path) -> None:
        """Raises FileNotFoundError if it is there no more."""
        self.id = f"{_id_prefix(job)}{path.name.removeprefix(checkpoint.PREFIX)}"
        self.updates = checkpoint.updates_of(path)
        self._job = job
        self._name = path.name
        self._created_at = int(path.stat().st_mtime)

    def describe(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "fine_tuning.job.checkpoint",
            "created_at": self._created_at,
            "fine_tuned_model_checkpoint": self._name,
            "fine_tuning_job_id": self._job,
            "metrics": {"step": self.updates},
            "step_number": self.updates,
        }


def _id_prefix(job: str) -> str:
    return f"ftckpt-{job.removeprefix('ftjob-')}-"


def _updates_of(job: str, id_: str) -> int:
    """Those before the checkpoint with this id, which may be there no more. Raises KeyError if none can have it."""
    number = id_.removeprefix(_id_prefix(job))
    if number == id_ or not number.isdecimal():
        raise KeyError(id_)
    return int(number)


def _checkpoints(job: str, folder: Path) -> list[_Checkpoint]:
    """The complete ones, oldest first."""
    found = []
    for path in checkpoint.complete(folder):
        with suppress(FileNotFoundError):  # the job has saved a newer one meanwhile, and dropped this
            found.append(_Checkpoint(job, path))
    return found
