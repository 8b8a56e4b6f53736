"""A progress bar for work that begins with starting an engine."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


def print_started(console: Console, warnings: list[str], began_s: float) -> None:
    """The engine is up; each of its warnings takes one line. ``began_s``: ``time.monotonic()`` before it started."""
    for warning in warnings:
        console.print(Text(f"vLLM: {warning}"), soft_wrap=True)
    console.print(f"the engine was up after {time.monotonic() - began_s:.0f} s")


class EngineBar:
    """Shown while its block runs, where there is a terminal; ``_task`` is the work, whose unit is seconds."""

    def __init__(self, console: Console, total: float | None) -> None:
        self._console = console
        self._began = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[facts]}"), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("starting the engine", total=total, facts="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def started(self, warnings: list[str]) -> None:
        """The engine is up; each of its warnings takes one line."""
        print_started(self._console, warnings, self._began)
