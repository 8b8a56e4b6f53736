"""How far long work is, with an estimate."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

LINE_EVERY_S = 30.0


class WorkBar:
    """A bar while its block runs; without a terminal a line now and then, and nothing on a quiet console."""

    def __init__(self, console: Console, name: str, total: float) -> None:
        self._console, self._name, self._total = console, name, total
        self._began = self._told = time.monotonic()
        self._bar = Progress(
            name, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=console, transient=True, disable=console.quiet or not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, done: float, description: str = "") -> None:
        """``done`` of the total; ``description`` says where that is, in place of the percentage on a line."""
        self._bar.update(self._task, completed=done, description=description)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._told >= LINE_EVERY_S and done > 0.0:
            self._told = now
            left_s = (now - self._began) * max(0.0, self._total / done - 1.0)
            where = description or f"{self._name}: {done / self._total:.0%} done"
            self._console.print(Text(f"{where}, about {left_s / 60:.0f} min left"), soft_wrap=True)
