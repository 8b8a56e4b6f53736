"""A fine-tuning job: what was asked for, the states it goes through, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from harli.config import FinetuneSettings


class Status(StrEnum):
    """OpenAI's, and ``paused``."""

    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


NEXT: dict[Status, frozenset[Status]] = {
    Status.VALIDATING: frozenset({Status.QUEUED, Status.FAILED, Status.CANCELLED}),
    Status.QUEUED: frozenset({Status.RUNNING, Status.PAUSED, Status.FAILED, Status.CANCELLED}),
    Status.RUNNING: frozenset({Status.QUEUED, Status.PAUSED, Status.SUCCEEDED, Status.FAILED, Status.CANCELLED}),
    Status.PAUSED: frozenset({Status.QUEUED, Status.CANCELLED}),
    Status.SUCCEEDED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}
"""Where a job may go from each state. A running one whose turn is over is queued again."""
ENDED = frozenset(status for status, following in NEXT.items() if not following)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Hyperparameters(_Body):
    """OpenAI's; ``auto`` leaves a value to the server."""

    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, le=1000)] = "auto"
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = "auto"
    """Samples per update, about: whole micro-batches are taken."""
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(gt=0.0, le=1000.0)] = "auto"


class Supervised(_Body):
    hyperparameters: Hyperparameters | None = None


class Method(_Body):
    type: Literal["supervised"]
    supervised: Supervised = Supervised()


class Extension(_Body):
    """What OpenAI's API has no words for: ``extra_body={"harli": {...}}`` in its client."""

    lora_rank: Annotated[int, Field(ge=1, le=512)] | None = None
    lora_alpha: Annotated[float, Field(gt=0.0)] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Jobs of a higher one run first; those of the same take turns."""


MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class JobRequest(_Body):
    """Body of ``POST /v1/fine_tuning/jobs``."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: Annotated[str, StringConstraints(pattern=r"^[\w-]{1,64}$")] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None
    """There are none; clients may say so."""
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """The older place of the method's."""
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    harli: Extension = Extension()

    @property
    def chosen(self) -> Hyperparameters:
        of_method = self.method.supervised.hyperparameters if self.method else None
        return of_method or self.hyperparameters or Hyperparameters()

    @field_validator("seed", mode="before")
    @classmethod
    def _any_seed(cls, value: Any) -> Any:
        return 0 if value is None else value


class JobError(_Body):
    """Why a job failed, in OpenAI's form."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A row of the store."""

    id: str
    request: JobRequest
    status: Status
    created_at: int
    finished_at: int | None
    settings: FinetuneSettings | None
    """Known once the files are validated."""
    updates_done: int
    trained_tokens: int
    turn_began: int
    """Updates that were done when its last turn began."""
    deaths: int
    """Processes that died while it was running, as far as it may be the cause."""
    model: str | None
    """What its adapter answers to, once it is served."""
    error: JobError | None

    def describe(self) -> dict[str, Any]:
        """The object of OpenAI's API."""
        settings, request, ended = self.settings, self.request, self.status in ENDED
        chosen = request.chosen.model_dump()
        return {
            "id": self.id,
            "object": "fine_tuning.job",
            "created_at": self.created_at,
            "error": self.error.model_dump() if self.error else None,
            "fine_tuned_model": self.model,
            "finished_at": self.finished_at,
            "hyperparameters": chosen,
            "model": request.model,
            "organization_id": "harli",
            "result_files": [],
            "seed": request.seed,
            "status": self.status,
            "trained_tokens": self.trained_tokens if ended else None,
            "training_file": request.training_file,
            "validation_file": request.validation_file,
            "estimated_finish": None,
            "integrations": [],
            "metadata": request.metadata,
            "method": {"type": "supervised", "supervised": {"hyperparameters": chosen}},
            "harli": {
                **request.harli.model_dump(),
                "updates": settings.updates if settings else None,
                "updates_done": self.updates_done,
                "trained_tokens": self.trained_tokens,
            },
        }
