"""``harli predictors``: the registered latency predictors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harli.types import HarliError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harli.tracking.registry import Version

LINE_WIDTH = 1000
"""One line per version, in a narrow terminal and in a pipe too."""

SCORES = ("solo_mape", "corun_mape", "bound_coverage")


def predictors(
    promote: Annotated[int | None, typer.Option(help="Make this version the champion, which runs use.")] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="Make the champion before this one champion.")] = False,
) -> None:
    """List the registered predictors with their scores, the oldest first; times are UTC.

    Example: harli predictors --promote 3
    """
    from harli.tracking.registry import open_registry

    if promote is not None and rollback:
        raise HarliError("--promote and --rollback exclude each other: give one")
    registry = open_registry()
    if promote is not None:
        registry.promote(promote)
        typer.echo(f"version {promote} is the champion")
        return
    if rollback:
        typer.echo(f"version {registry.rollback().number} is the champion again")
        return
    headings = ("version", "alias", "time", "kind", "model", "shares", "MAPE alone", "beside", "within bound", "reason")
    table = Table(*headings, box=None, pad_edge=False)
    for version in registry.versions():
        table.add_row(*map(Text, _row(version)))
    if not table.rows:
        raise HarliError("no predictor is registered yet: run `harli train-predictor`")
    Console(width=LINE_WIDTH).print(table)


def _row(version: Version) -> Iterator[str]:
    tags = version.tags
    yield str(version.number)
    yield ", ".join(version.aliases) or "-"
    yield f"{version.created_at:%Y-%m-%d %H:%M}"
    for name in ("kind", "model", "menu"):
        yield tags.get(name, "-")
    for name in SCORES:
        yield f"{100 * float(tags[name]):.1f}%" if name in tags else "-"
    yield tags.get("reason", "-")
