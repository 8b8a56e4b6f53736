"""Reading public request traces; the names of a file's columns tell its format."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from harli.types import HarliError
from harli.workload.base import Request, Workload

Row = Mapping[str | None, object]


def _iso_seconds(value: str) -> float:
    moment = datetime.fromisoformat(value)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """The three columns that are read, and how an arrival becomes seconds."""

    name: str
    arrival: str
    prompt: str
    output: str
    seconds: Callable[[str], float]

    @property
    def columns(self) -> tuple[str, str, str]:
        return self.arrival, self.prompt, self.output

    def request(self, row: Row) -> Request:
        """One row's request, its arrival on the trace's own clock. Raises ValueError when it has none."""
        arrival, prompt, output = (str(row.get(column)) for column in self.columns)
        request = Request(self.seconds(arrival), int(prompt), int(output))
        if None in row or not math.isfinite(request.arrival_s) or min(request[:3]) < 0:
            raise ValueError
        return request


FORMATS = (
    TraceFormat("Azure 2023", "TIMESTAMP", "ContextTokens", "GeneratedTokens", _iso_seconds),
    TraceFormat("BurstGPT", "Timestamp", "Request tokens", "Response tokens", float),
    TraceFormat("Mooncake", "timestamp", "input_length", "output_length", lambda value: float(value) / 1000.0),
)


def read_trace(path: Path) -> Workload:
    """The requests of a trace, in CSV or JSON lines, by arrival; the earliest arrives at 0 s.

    Known are the traces in ``FORMATS``: Azure 2023 (time stamps), BurstGPT (seconds) and Mooncake
    (milliseconds). A row without output tokens is a request that failed, and is left out.

    Raises HarliError for a file that cannot be read, is of no known format or has a malformed row.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            requests = sorted(_requests(path, file), key=lambda request: request.arrival_s)
    except OSError as error:
        raise HarliError(f"cannot read the trace {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise HarliError(f"{path} is not a trace in CSV or JSON lines: {error}") from None
    if not requests:
        raise HarliError(f"the trace {path} has no requests")
    first_s = requests[0].arrival_s
    return Workload(path.stem, tuple(request._replace(arrival_s=request.arrival_s - first_s) for request in requests))


def _requests(path: Path, file: TextIO) -> Iterator[Request]:
    trace_format: TraceFormat | None = None
    for line, row in _rows(path, file):
        trace_format = trace_format or _recognise(path, row)
        try:
            request = trace_format.request(row)
        except (ValueError, OverflowError):
            cells = ", ".join(f"{column}={row.get(column)!r}" for column in trace_format.columns)
            surplus = f" and surplus cells {row[None]}" if None in row else ""
            raise HarliError(
                f"{path}, line {line}: expected a time and two token counts ({trace_format.name} trace), "
                f"found {cells}{surplus}; correct or remove the line"
            ) from None
        if request.output_tokens:
            yield request


def _rows(path: Path, file: TextIO) -> Iterator[tuple[int, Row]]:
    """Line number and cells by column of each row."""
    is_json = file.read(1) == "{"
    file.seek(0)
    if not is_json:
        reader = csv.DictReader(file)
        if reader.fieldnames is not None:
            _recognise(path, dict.fromkeys(reader.fieldnames))
        for cells in reader:
            yield reader.line_num, cells
        return
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise HarliError(f"{path}, line {line}: not JSON ({error}); correct or remove the line") from None
        if not isinstance(row, dict):
            raise HarliError(f"{path}, line {line}: not a JSON object; correct or remove the line")
        yield line, row


def _recognise(path: Path, row: Row) -> TraceFormat:
    for trace_format in FORMATS:
        if all(column in row for column in trace_format.columns):
            return trace_format
    known = "; ".join(f"{trace_format.name}: {', '.join(trace_format.columns)}" for trace_format in FORMATS)
    found = ", ".join(str(column) for column in row)
    raise HarliError(f"{path} has the columns {found}, which no known trace has ({known})")
