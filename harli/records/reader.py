"""Reading a record folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from harli.records.schema import (
    REQUESTS,
    RUN_FILE,
    SCHEMA_VERSION,
    STEPS,
    UPDATES,
    VERSION_KEY,
    Info,
    RunInfo,
    TableSpec,
)
from harli.types import HarliError

SomeInfo = TypeVar("SomeInfo", bound=Info)


@dataclass(frozen=True)
class Record:
    """A run as it was recorded."""

    folder: Path
    info: RunInfo
    steps: pa.Table
    """Columns of StepRecord."""
    requests: pa.Table
    """Columns of RequestRecord."""
    updates: pa.Table
    """Columns of UpdateRecord."""


def read_record(folder: Path) -> Record:
    """The record in ``folder``. Raises HarliError when a file is missing, damaged, or of a newer schema."""
    return Record(
        folder=folder,
        info=read_info(folder / RUN_FILE, RunInfo),
        steps=read_table(folder, STEPS),
        requests=read_table(folder, REQUESTS),
        updates=read_table(folder, UPDATES),
    )


def read_info(path: Path, kind: type[SomeInfo]) -> SomeInfo:
    """A folder's JSON file. Raises HarliError when it is missing, damaged, or of a newer schema."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise HarliError(f"{path.parent} is not {kind.described()}: {path.name} is missing") from None
    except OSError as error:
        raise _unreadable(path, error) from error
    except json.JSONDecodeError as error:
        raise _damaged(path, f"line {error.lineno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise _damaged(path, "not UTF-8 text") from error
    _check_version(path, content.get("schema_version") if isinstance(content, dict) else None)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except HarliError as error:  # an impossible SLO
        raise _damaged(path, str(error)) from error


def read_table(folder: Path, spec: TableSpec) -> pa.Table:
    """One of a folder's tables. Raises HarliError when it is missing, damaged, or of a newer schema."""
    path = folder / spec.file
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except FileNotFoundError:
        raise HarliError(
            f"the record {folder} is incomplete: {path.name} is missing; copy it again, or run again"
        ) from None
    except pa.ArrowInvalid as error:
        raise _damaged(path, str(error).splitlines()[0].rstrip(".")) from error
    except OSError as error:
        # pyarrow reports a corrupt page as a plain OSError without an errno.
        raise (_unreadable(path, error) if error.errno else _damaged(path, str(error).splitlines()[0])) from error
    _check_version(path, (table.schema.metadata or {}).get(VERSION_KEY))
    if not table.schema.equals(spec.schema):
        raise _damaged(path, f"its columns are not those of schema {SCHEMA_VERSION}")
    return table


def _check_version(path: Path, version: object) -> None:
    try:
        number = int(version)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise HarliError(f"{path} has no schema version, so it is not part of a record") from None
    if number > SCHEMA_VERSION:
        newer = f"schema {number}, this one reads up to {SCHEMA_VERSION}"
        raise HarliError(f"{path} was written by a newer Harli ({newer}); upgrade Harli")


def _damaged(path: Path, reason: str) -> HarliError:
    return HarliError(f"{path} is damaged ({reason}); copy the record again, or run again")


def _unreadable(path: Path, error: OSError) -> HarliError:
    return HarliError(f"cannot read {path}: {error.strerror or error}; check its permissions")
