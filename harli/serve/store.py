"""Files, jobs and events in one SQLite database; the only place that knows SQL.

What it holds is the truth: routes change a job's state here, and what runs follows.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from harli.config import FinetuneSettings
from harli.rows import UpdateRecord
from harli.serve.database import Database
from harli.serve.jobs import ENDED, NEXT, Job, JobError, JobRequest, Status
from harli.serve.objects import Event, File, Level
from harli.types import HarliError

EVENTS_KEPT = 1000
"""Of a job that has ended; older losses of updates go, at a start."""
DELETED_KNOWN = 10_000
"""Deleted files whose place in the list is remembered."""


class StateError(HarliError):
    """The job is in a state from which it cannot go where it was asked to."""


class Store(Database):
    """The tables of one server."""

    def __init__(self, path: Path) -> None:
        """Raises HarliError as ``Database`` does."""
        super().__init__(path)
        self._deleted: dict[str, int] = {}
        with suppress(sqlite3.DatabaseError):  # a full disk is no reason not to start
            self._drop_old_events()

    # Files

    def add_file(self, file: File) -> None:
        with self.transaction(durable=True):
            self.run("INSERT INTO files VALUES (?, ?, ?, ?)", file.id, file.filename, file.bytes, file.created_at)

    def file(self, id_: str) -> File | None:
        row = self.run("SELECT * FROM files WHERE id = ?", id_).fetchone()
        return File(**row) if row else None

    def files(self, after: str | None, limit: int, oldest_first: bool = False) -> list[File]:
        """The newest first, from the one after ``after``. That may be deleted, as clients delete while they list.

        Raises KeyError if there is none.
        """
        place = None if after is None else self._deleted.get(after) or self._place("files", after)
        order = _OLDEST_FIRST if oldest_first else _NEWEST_FIRST
        return [File(**row) for row in self.run(f"SELECT * FROM files WHERE {order}", place, limit)]

    def count_files(self) -> int:
        return int(self.run("SELECT count(*) FROM files").fetchone()[0])

    def delete_file(self, id_: str) -> None:
        place = self._place("files", id_)
        with self.transaction(durable=True):  # its content goes next
            self.run("DELETE FROM files WHERE id = ?", id_)
        self._deleted[id_] = place
        if len(self._deleted) > DELETED_KNOWN:
            del self._deleted[next(iter(self._deleted))]

    # Jobs

    def add_job(self, id_: str, request: JobRequest) -> Job:
        with self.transaction(durable=True):
            self.run(
                "INSERT INTO jobs (id, request, priority, status, created_at) VALUES (?, ?, ?, ?, ?)",
                id_,
                request.model_dump_json(),
                request.harli.priority,
                Status.VALIDATING,
                int(time.time()),
            )
            self.add_event(id_, "job created")
        return self.job(id_)

    def job(self, id_: str) -> Job:
        """Raises KeyError if there is none."""
        row = self.run("SELECT * FROM jobs WHERE id = ?", id_).fetchone()
        if row is None:
            raise KeyError(id_)
        return _job(row)

    def jobs(self, after: str | None, limit: int, metadata: Mapping[str, str] | None = None) -> list[Job]:
        """The newest first of those that have all of ``metadata``, from the one after ``after``.

        Raises KeyError if there is none.
        """
        place = None if after is None else self._place("jobs", after)
        wanted = json.dumps(dict(metadata or {}))
        rows = self.run(f"SELECT * FROM jobs WHERE {_HAS_METADATA} AND {_NEWEST_FIRST}", wanted, place, limit)
        return [_job(row) for row in rows]

    def jobs_in(self, status: Status) -> list[Job]:
        """The oldest first."""
        return [_job(row) for row in self.run("SELECT * FROM jobs WHERE status = ? ORDER BY rowid", status)]

    def base_models(self) -> set[str]:
        """What the jobs that go on, and the adapters that are served, are for."""
        rows = self.run(
            "SELECT DISTINCT json_extract(request, '$.model') FROM jobs "
            f"WHERE model IS NOT NULL OR status NOT IN {_MARKS}",
            *ENDED,
        )
        return {row[0] for row in rows}

    def queue(self) -> Iterator[Job]:
        """Queued jobs as their turns come: by priority, then those that have waited longest for a turn."""
        rows = self.run("SELECT * FROM jobs WHERE status = ? ORDER BY priority DESC, turn, rowid", Status.QUEUED)
        return map(_job, rows)

    def take_turn(self, id_: str) -> None:
        """The queued job runs from here on, and is the last of its priority to have had a turn."""
        with self.transaction():
            self.move(id_, Status.RUNNING)
            self.run(
                "UPDATE jobs SET turn = (SELECT max(turn) + 1 FROM jobs), turn_began = updates_done WHERE id = ?", id_
            )

    def note_death(self, id_: str) -> None:
        """The process died while the job was running."""
        self.run("UPDATE jobs SET deaths = deaths + 1 WHERE id = ?", id_)

    def forgive_death(self, id_: str) -> None:
        """Take back a death that was noted before it could happen, and did not."""
        self.run("UPDATE jobs SET deaths = deaths - 1 WHERE id = ?", id_)

    def count_unfinished(self) -> int:
        return int(self.run(f"SELECT count(*) FROM jobs WHERE status NOT IN {_MARKS}", *ENDED).fetchone()[0])

    def move(self, id_: str, status: Status, error: JobError | None = None, model: str | None = None) -> None:
        """Bring the job into another state. Raises StateError where ``NEXT`` does not allow it."""
        present = self.job(id_).status
        if status not in NEXT[present]:
            raise StateError(f"job {id_} is {present} and cannot become {status}")
        finished_at = int(time.time()) if status in ENDED else None
        why = error.model_dump_json() if error else None
        with self.transaction(durable=status in ENDED):
            self.run(
                "UPDATE jobs SET status = ?, finished_at = ?, error = ?, model = ? WHERE id = ?",
                status,
                finished_at,
                why,
                model,
                id_,
            )
            self.add_event(id_, error.message if error else f"job {status}", "error" if error else "info")

    def set_settings(self, id_: str, settings: FinetuneSettings) -> None:
        self.run("UPDATE jobs SET settings = ? WHERE id = ?", settings.model_dump_json(), id_)

    def job_of_model(self, model: str) -> Job | None:
        """The job whose adapter is served as ``model``."""
        row = self.run("SELECT * FROM jobs WHERE model = ?", model).fetchone()
        return _job(row) if row else None

    def forget_model(self, id_: str) -> None:
        """The job's adapter is served no more."""
        with self.transaction(durable=True):
            self.run("UPDATE jobs SET model = NULL WHERE id = ?", id_)

    def add_updates(self, id_: str, updates: Iterable[UpdateRecord]) -> None:
        """Note committed updates, each with an event; one that is done again after a crash is counted once."""
        with self.transaction():
            for update in updates:
                step = update.update + 1
                data = {"step": step, "train_loss": update.loss, "learning_rate": update.learning_rate}
                self.add_event(id_, f"update {step}: loss {update.loss:.4f}", data=data)
                self.run(
                    "UPDATE jobs SET updates_done = ?, trained_tokens = trained_tokens + ? "
                    "WHERE id = ? AND updates_done < ?",
                    step,
                    update.tokens,
                    id_,
                    step,
                )

    # Events

    def add_event(self, id_: str, message: str, level: Level = "info", data: dict[str, Any] | None = None) -> None:
        self.run(
            "INSERT INTO events (job, created_at, level, type, message, data) VALUES (?, ?, ?, ?, ?, ?)",
            id_,
            int(time.time()),
            level,
            "metrics" if data else "message",
            message,
            json.dumps(data) if data else None,
        )

    def events(self, id_: str, after: str | None, limit: int) -> list[Event]:
        """The newest first, from the one after the event with the id ``after``; KeyError if no event can have it."""
        before = 1 << 62 if after is None else Event.number_of(after)
        rows = self.run(
            "SELECT number, created_at, level, type, message, data FROM events WHERE job = ? AND number < ? "
            "ORDER BY number DESC LIMIT ?",
            id_,
            before,
            limit,
        )
        return [Event(**{**row, "data": json.loads(row["data"]) if row["data"] else None}) for row in rows]

    def _drop_old_events(self) -> None:
        """Here and not when a job ends: it may be so much that requests would wait."""
        with self.transaction():
            for (id_,) in self.run(f"SELECT id FROM jobs WHERE status IN {_MARKS}", *ENDED).fetchall():
                self.run(_DROP_EVENTS, id_, id_, EVENTS_KEPT)

    def _place(self, table: str, id_: str) -> int:
        """Where it is in lists."""
        row = self.run(f"SELECT rowid FROM {table} WHERE id = ?", id_).fetchone()
        if row is None:
            raise KeyError(id_)
        return int(row[0])


_MARKS = f"({', '.join('?' * len(ENDED))})"
_NEWEST_FIRST = "rowid < coalesce(?, 1 << 62) ORDER BY rowid DESC LIMIT ?"
_OLDEST_FIRST = "rowid > coalesce(?, 0) ORDER BY rowid LIMIT ?"
_HAS_METADATA = """NOT EXISTS (
    SELECT key, value FROM json_each(?) EXCEPT SELECT key, value FROM json_each(jobs.request, '$.metadata')
)"""
_DROP_EVENTS = """DELETE FROM events WHERE job = ? AND type = 'metrics' AND number <= (
    SELECT number FROM events WHERE job = ? ORDER BY number DESC LIMIT 1 OFFSET ?
)"""


def _job(row: sqlite3.Row) -> Job:
    return Job(
        id=row["id"],
        request=JobRequest.model_validate_json(row["request"]),
        status=Status(row["status"]),
        created_at=row["created_at"],
        finished_at=row["finished_at"],
        settings=FinetuneSettings.model_validate_json(row["settings"]) if row["settings"] else None,
        updates_done=row["updates_done"],
        trained_tokens=row["trained_tokens"],
        turn_began=row["turn_began"],
        deaths=row["deaths"],
        model=row["model"],
        error=JobError.model_validate_json(row["error"]) if row["error"] else None,
    )
