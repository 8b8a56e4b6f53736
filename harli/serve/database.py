"""The SQLite database of a server: opened for one server alone, made or refused by its version."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harli.types import HarliError

VERSION = 1
SCHEMA = """
CREATE TABLE files (
    id TEXT PRIMARY KEY, filename TEXT NOT NULL, bytes INTEGER NOT NULL, created_at INTEGER NOT NULL
);
CREATE TABLE jobs (
    id TEXT PRIMARY KEY,
    request TEXT NOT NULL,
    priority INTEGER NOT NULL,
    status TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    finished_at INTEGER,
    turn INTEGER NOT NULL DEFAULT 0,
    turn_began INTEGER NOT NULL DEFAULT 0,
    deaths INTEGER NOT NULL DEFAULT 0,
    settings TEXT,
    updates_done INTEGER NOT NULL DEFAULT 0,
    trained_tokens INTEGER NOT NULL DEFAULT 0,
    model TEXT,
    error TEXT
);
CREATE INDEX jobs_by_status ON jobs (status, priority, turn);
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    job TEXT NOT NULL REFERENCES jobs (id),
    created_at INTEGER NOT NULL,
    level TEXT NOT NULL,
    type TEXT NOT NULL,
    message TEXT NOT NULL,
    data TEXT
);
CREATE INDEX events_by_job ON events (job, number);
"""


class Database:
    """One connection, which one server has to itself. A call takes well under a millisecond, but for durable ones."""

    def __init__(self, path: Path) -> None:
        """Raises HarliError if another server uses the database, or a newer Harli made it."""
        self._connection = sqlite3.connect(path, isolation_level=None, timeout=1.0)
        self._connection.row_factory = sqlite3.Row
        try:
            self.run("PRAGMA locking_mode = EXCLUSIVE")
            (version,) = self.run("PRAGMA user_version").fetchone()
            if version > VERSION:
                raise HarliError(f"{path} was made by a newer Harli; use that one, or another folder")
            self.run("PRAGMA journal_mode = WAL")
            self.run("PRAGMA synchronous = NORMAL")
            self.run("PRAGMA foreign_keys = ON")
            if version < VERSION:
                with self.transaction():
                    for statement in SCHEMA.split(";\n"):
                        self.run(statement)
                    self.run(f"PRAGMA user_version = {VERSION}")
        except (sqlite3.Error, HarliError) as error:
            self._connection.close()
            if isinstance(error, sqlite3.OperationalError):
                raise HarliError(f"cannot open {path}: {error}; is another server using it?") from error
            if isinstance(error, sqlite3.Error):
                raise HarliError(f"cannot open {path}: {error}; move it away to begin with an empty one") from error
            raise

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def transaction(self, durable: bool = False) -> Iterator[None]:
        """All of it or nothing; inside another, a part of that one.

        ``durable``: not even a loss of power undoes it, or what was written before. The server waits for the disk
        meanwhile, so this is for what a client is told, and not for updates, which come several times a second.
        """
        if self._connection.in_transaction:
            yield
            return
        if durable:
            self.run("PRAGMA synchronous = FULL")
        try:
            self.run("BEGIN")
            yield
            self.run("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # SQLite itself rolls back for some errors of the disk
                self.run("ROLLBACK")
            raise
        finally:
            if durable:
                self.run("PRAGMA synchronous = NORMAL")

    def run(self, statement: str, *values: Any) -> sqlite3.Cursor:
        """Execute one statement."""
        return self._connection.execute(statement, values)
