"""What a profile folder holds, ``profile.json`` and three tables, and reading it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import Field, FiniteFloat

from harli.records.reader import read_info, read_table
from harli.records.schema import SCHEMA_VERSION, STEPS, Info, TableSpec, arrow_schema
from harli.rows import UnitRecord
from harli.types import Costs, UnitTime

PROFILE_FILE = "profile.json"

PROFILE_STEPS = TableSpec(
    "steps.parquet",
    pa.schema(
        [pa.field("segment", pa.int64(), nullable=False), pa.field("point", pa.int64(), nullable=False), *STEPS.schema],
        metadata=STEPS.schema.metadata,
    ),
)
"""A StepRecord's columns, and before them the ids of segment and operating point.

A segment's first steps are left out. Steps outside every segment, with their admissions, have the
segment and point -1; they count as data, not as repeats.
"""


class SegmentRecord(NamedTuple):
    """A few steps in a row at one operating point: a row of ``segments.parquet``."""

    segment: int
    point: int
    """The operating point: segments that repeat it have the same."""
    group: int
    """Points of a group share batch, contexts and finetune shape and differ in the share."""
    purpose: str
    """``corner``, ``fill``, ``reference`` or ``window``."""
    time_s: float
    """When its first step began, in seconds since the profile began; a resumed one goes on where it was."""
    decode_units: int
    finetune_units: int
    exclusive_ms: float
    steps: int
    """Kept steps."""


SEGMENTS = TableSpec("segments.parquet", arrow_schema(SegmentRecord))
UNITS = TableSpec("units.parquet", arrow_schema(UnitRecord))


class ProfileInfo(Info):
    """``profile.json``: everything about a profile that is not a row of a table."""

    @classmethod
    def described(cls) -> str:
        return "a profile"

    schema_version: int = SCHEMA_VERSION
    profile_id: str
    kind: Literal["profile"] = "profile"
    model: str
    role: str
    menu: list[str]
    """Names of the partitioner's shares, "decode alone" first."""
    device: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    """Engine and finetuning, as in a run's settings."""
    plan: dict[str, Any]
    """Seed, budget in seconds, and what else the plan follows from."""
    started_at: str
    """ISO 8601, UTC."""
    duration_s: FiniteFloat = 0.0
    """Time spent measuring, in all sittings together."""
    status: Literal["running", "finished", "interrupted", "failed"]
    costs: Costs = Costs()
    unit_times: tuple[UnitTime, ...] = ()
    finetune_alone_tokens_per_s: dict[str, FiniteFloat] = Field(default_factory=dict)
    """By compute units and tokens of a micro-batch: "0/2 256" is two units and 256 tokens."""
    summary: dict[str, FiniteFloat | None] = Field(default_factory=dict)
    """``profile/points``, ``profile/steps``, ``profile/noise_floor_solo`` and so on."""
    verdict: list[str] = Field(default_factory=list)
    """What keeps this profile from being good to train on, one line each."""


@dataclass(frozen=True)
class Profile:
    """A profile as it was measured."""

    folder: Path
    info: ProfileInfo
    steps: pa.Table
    """Columns of PROFILE_STEPS."""
    segments: pa.Table
    """Columns of SegmentRecord."""
    units: pa.Table
    """Columns of UnitRecord."""


def read_profile(folder: Path) -> Profile:
    """The profile in ``folder``. Raises HarliError when a file is missing, damaged, or of a newer schema."""
    return Profile(
        folder=folder,
        info=read_info(folder / PROFILE_FILE, ProfileInfo),
        steps=read_table(folder, PROFILE_STEPS),
        segments=read_table(folder, SEGMENTS),
        units=read_table(folder, UNITS),
    )
