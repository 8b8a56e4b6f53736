"""``harli runs``, ``harli show`` and ``harli publish``: records that are already there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harli.commands import flags
from harli.commands.table import run_table
from harli.types import HarliError

if TYPE_CHECKING:
    from harli.records.reader import Record

Folder = Annotated[Path, typer.Argument(help="A record folder.")]

LINE_WIDTH = 1000
"""More than a row needs: one line per record, its name never cut, in a narrow terminal and in a pipe too."""


def runs(folder: Annotated[Path, typer.Argument(help="The folder that holds the records.")] = Path("records")) -> None:
    """List the records in a folder, the oldest first; times are UTC.

    Example: harli runs records
    """
    from harli.records.reader import read_record
    from harli.records.schema import RUN_FILE

    if not folder.is_dir():
        raise HarliError(f"no folder {folder}; `harli run` makes one, or name another")
    records, damaged = [], []
    for path in sorted(folder.glob(f"*/{RUN_FILE}")):
        try:
            records.append(read_record(path.parent))
        except HarliError as error:
            damaged.append(str(error))
    headings = ("record", "time", "policy", "model", "status", "TPOT p99", "ITL p99", "attained", "finetune tokens/s")
    table = Table(*headings, box=None, pad_edge=False)
    for record in sorted(records, key=lambda record: datetime.fromisoformat(record.info.started_at)):
        table.add_row(*map(Text, _row(record)))
    Console(width=LINE_WIDTH).print(table)
    for line in damaged:
        Console(stderr=True, soft_wrap=True).print(f"harli: {line}", markup=False, highlight=False)


def _row(record: Record) -> Iterator[str]:
    info, metrics = record.info, record.info.summary
    yield record.folder.name
    yield f"{datetime.fromisoformat(info.started_at):%Y-%m-%d %H:%M}"
    yield info.policy
    yield info.model
    yield f"{info.status} (simulated)" if info.simulated else info.status
    attained = [metrics.get(f"slo/{name}_attainment") for name in ("itl", "tpot")]
    for value, shown in (
        (metrics.get("decode/tpot_p99_ms"), "{:.1f} ms"),
        (metrics.get("decode/itl_p99_ms"), "{:.1f} ms"),
        (min((part for part in attained if part is not None), default=None), "{:.1%}"),
        (metrics.get("finetune/tokens_per_s"), "{:.1f}"),
    ):
        yield "-" if value is None else shown.format(value)


def show(folder: Folder, json_: flags.Json = False) -> None:
    """Print a record again.

    Example: harli show records/20260131-120000-static
    """
    from harli.records.reader import read_record

    info = read_record(folder).info
    if json_:
        typer.echo(json.dumps(info.summary))
    else:
        Console().print(run_table(info))


def publish(folder: Folder) -> None:
    """Publish a record to MLflow; one that is there already stays as it is.

    Example: MLFLOW_TRACKING_URI=http://localhost:5000 harli publish records/20260131-120000-static
    """
    from harli.records.reader import read_record
    from harli.tracking.publish import publish as publish_record

    typer.echo(f"MLflow run {publish_record(read_record(folder))}")
