"""What the store gives out beside jobs: uploaded files, and what happened to a job."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["info", "warn", "error"]


@dataclass(frozen=True, slots=True)
class File:
    """An uploaded file; its content lies in the folder of files under its id."""

    id: str
    filename: str
    bytes: int
    created_at: int

    def describe(self) -> dict[str, Any]:
        """The object of OpenAI's API."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "filename": self.filename,
            "purpose": "fine-tune",
            "status": "processed",
        }


@dataclass(frozen=True, slots=True)
class Event:
    number: int
    created_at: int
    level: str
    type: str
    message: str
    data: dict[str, Any] | None

    @property
    def id(self) -> str:
        return f"ftevent-{self.number}"

    @staticmethod
    def number_of(id_: str) -> int:
        """The number in an id. Raises KeyError if no event can have that id."""
        if (match := re.fullmatch(r"ftevent-(\d{1,18})", id_)) is None:
            raise KeyError(id_)
        return int(match[1])

    def describe(self) -> dict[str, Any]:
        """The object of OpenAI's API."""
        return {
            "id": self.id,
            "object": "fine_tuning.job.event",
            "created_at": self.created_at,
            "level": self.level,
            "message": self.message,
            "type": self.type,
            "data": self.data,
        }
