"""Writing a record folder, so that a reader never sees half a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from harli.records.schema import REQUESTS, RUN_FILE, SETTINGS_FILE, STEPS, UPDATES, RunInfo, TableSpec
from harli.rows import RequestRecord, StepRecord, UpdateRecord
from harli.types import HarliError


class Tables:
    """Collects a run's rows in memory, for one thread."""

    def __init__(self) -> None:
        self._steps = Rows(STEPS)
        self._requests = Rows(REQUESTS)
        self._updates = Rows(UPDATES)

    def add_steps(self, rows: Iterable[StepRecord]) -> None:
        self._steps.pending.extend(rows)

    def add_requests(self, rows: Iterable[RequestRecord]) -> None:
        self._requests.pending.extend(rows)

    def add_updates(self, rows: Iterable[UpdateRecord]) -> None:
        self._updates.pending.extend(rows)

    @property
    def steps(self) -> pa.Table:
        """All steps so far."""
        return self._steps.collect()

    @property
    def requests(self) -> pa.Table:
        """All requests so far."""
        return self._requests.collect()

    @property
    def updates(self) -> pa.Table:
        """All finetuning updates so far."""
        return self._updates.collect()


class RecordWriter(Tables):
    """Writes a run's rows, with ``run.json``, as often as asked.

    The folder can be read from the beginning on: it then says that the run is running.
    """

    def __init__(self, folder: Path, info: RunInfo) -> None:
        """Creates ``folder``. Raises HarliError when it is not empty or cannot be written."""
        super().__init__()
        self.folder = folder
        make_folder(folder)
        self.write(info.model_copy(update={"status": "running"}))

    def write(self, info: RunInfo) -> None:
        """Write all rows so far, then ``info``; each file replaces the one before at once.

        ``run.json`` comes last, so that what it says of a finished run holds for the tables too.
        Raises HarliError when the disk refuses; the files from before stay.
        """
        for rows in (self._steps, self._requests, self._updates):
            rows.write(self.folder)
        with replacing(self.folder / SETTINGS_FILE) as path:
            path.write_text(yaml.safe_dump(info.settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
        with replacing(self.folder / RUN_FILE) as path:
            path.write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")


def make_folder(folder: Path) -> None:
    """Create ``folder``, or take it if it is empty. Raises HarliError when it is not, or cannot be created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        raise HarliError(f"cannot create the folder {folder}: {error.strerror}; choose another") from error
    if occupied:
        raise HarliError(f"the folder {folder} is not empty; choose another, or remove it")


class Rows:
    """The rows of one table, kept as arrow once collected: a long run's rows would be large as objects."""

    def __init__(self, spec: TableSpec, table: pa.Table | None = None) -> None:
        """``table``: rows to go on from."""
        self.spec = spec
        self.pending: list[tuple[Any, ...]] = []
        self._table = spec.table([]) if table is None else table

    def collect(self) -> pa.Table:
        if self.pending:
            self._table = pa.concat_tables([self._table, self.spec.table(self.pending)])
            self.pending = []
        return self._table

    def write(self, folder: Path) -> None:
        """Put all rows so far into their file. Raises HarliError when the disk refuses."""
        with replacing(folder / self.spec.file) as path:
            pq.write_table(self.collect(), path, compression="zstd")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` that takes its place when the block ends well."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise HarliError(f"cannot write {path}: {reason}; make room, or choose another record folder") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
