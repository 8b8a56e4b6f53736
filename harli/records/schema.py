"""What a record folder holds: ``run.json`` and three tables."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, Self, get_type_hints

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, field_validator

from harli.config import RunSettings
from harli.rows import RequestRecord, StepRecord, UpdateRecord
from harli.types import Slo

SCHEMA_VERSION = 1
VERSION_KEY = b"harli_schema_version"
"""Where a parquet file's metadata has the schema version."""

RUN_FILE = "run.json"
SETTINGS_FILE = "run.yaml"
"""The settings again, as `harli run --config` reads them."""

ARROW_TYPES: dict[Any, pa.DataType] = {
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    str: pa.string(),
    tuple[float, ...]: pa.list_(pa.float64()),
}


def arrow_schema(row: type) -> pa.Schema:
    """The arrow schema of a NamedTuple: a column per field, in the same order."""
    fields = [pa.field(name, ARROW_TYPES[hint], nullable=False) for name, hint in get_type_hints(row).items()]
    return pa.schema(fields, metadata={VERSION_KEY: str(SCHEMA_VERSION)})


@dataclass(frozen=True)
class TableSpec:
    """One table of a record: its file name and its columns."""

    file: str
    schema: pa.Schema

    def table(self, rows: Sequence[tuple[Any, ...]]) -> pa.Table:
        """An arrow table of ``rows``, which are NamedTuples of this table's kind."""
        if not rows:
            return self.schema.empty_table()
        columns = zip(*rows, strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self.schema, strict=True)]
        return pa.Table.from_arrays(arrays, schema=self.schema)


STEPS = TableSpec("steps.parquet", arrow_schema(StepRecord))
REQUESTS = TableSpec("requests.parquet", arrow_schema(RequestRecord))
UPDATES = TableSpec("finetune.parquet", arrow_schema(UpdateRecord))

RECORD_FILES = (STEPS.file, REQUESTS.file, UPDATES.file, SETTINGS_FILE, RUN_FILE)


class Info(BaseModel):
    """Base of what a folder's JSON file says."""

    # A policy's parameter may be infinite, which plain JSON cannot say.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    @classmethod
    def described(cls) -> str:
        """What a folder with this file is called in messages."""
        return "a run's record"


class FinetuneInfo(Info):
    """What became of a run's finetuning."""

    state: Literal["off", "running", "finished", "failed"]
    reason: str = ""
    """Why it is off or has failed."""
    adapter: str | None = None
    """Where the adapter was saved: an absolute path, or one relative to the record folder."""
    shared_bytes: NonNegativeInt = 0
    """Bytes of base weights that finetuning uses in place, out of ``base_bytes``."""
    base_bytes: NonNegativeInt = 0
    samples: NonNegativeInt = 0
    """Of the finetuning data, those that are trained on."""
    truncated: NonNegativeInt = 0
    """Of ``samples``, those longer than a micro-batch, cut on the right."""
    dropped: NonNegativeInt = 0
    """Samples left out, since cutting left them without a target."""
    memory: dict[str, NonNegativeInt] = {}
    """Borrowed memory by the end: bytes at most, layers whose activations were kept, and those dropped by a recall."""


class PredictorInfo(Info):
    """The predictor that a run used."""

    source: str
    """Where it came from: a folder or a version in the registry."""
    data_sha256: str
    """Of the data that it was trained on."""
    correction: dict[str, FiniteFloat] = {}
    """What it had learned of this run by its end."""


class RunInfo(Info):
    """``run.json``: everything about a run that is not a row of a table."""

    schema_version: int = SCHEMA_VERSION
    run_id: str = Field(default_factory=lambda: uuid.uuid4().hex, pattern="^[0-9a-f]{32}$")
    name: str
    kind: Literal["run"] = "run"
    simulated: bool = False
    policy: str
    policy_params: dict[str, bool | int | float | str] = {}
    settings: dict[str, Any]
    """The resolved settings; plain JSON values."""
    model: str
    role: str
    slo: Slo
    menu: list[str]
    """Names of the partitioner's shares, "decode alone" first."""
    device: dict[str, Any]
    versions: dict[str, str]
    """Of the libraries that matter to the result."""
    started_at: str
    """ISO 8601, UTC."""
    duration_s: Annotated[FiniteFloat, Field(ge=0.0)] = 0.0
    """Length of the measured part."""
    status: Literal["running", "finished", "interrupted", "failed"]
    finetune: FinetuneInfo
    predictor: PredictorInfo | None = None
    summary: dict[str, FiniteFloat | None] = {}
    """The metrics of ``harli.records.summary``; None where there was no data."""

    @classmethod
    def begun(cls, settings: RunSettings, **known: Any) -> Self:
        """A run that begins now under these settings; ``known`` has what they do not say."""
        described: dict[str, Any] = {
            "name": settings.policy,
            "policy": settings.policy,
            "policy_params": dict(settings.params),
            "settings": settings.model_dump(mode="json"),
            "model": settings.engine.model,
            "role": settings.engine.role,
            "slo": settings.slo.objective,
            "started_at": datetime.now(UTC).isoformat(),
            "status": "running",
            "finetune": FinetuneInfo(state="off"),
        }
        return cls(**described | known)

    @field_validator("started_at")
    @classmethod
    def _is_utc(cls, value: str) -> str:
        if datetime.fromisoformat(value).utcoffset() != timedelta(0):
            raise ValueError("not a time in UTC, such as 2026-01-31T12:00:00+00:00")
        return value
