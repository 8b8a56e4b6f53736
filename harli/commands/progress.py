"""A run on the terminal: a live view, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from harli.commands.engine_bar import print_started

if TYPE_CHECKING:
    from harli.live import Progress
    from harli.types import Slo

LINE_EVERY_S = 10.0


class RunProgress:
    """Shows how far a run is. ``notice``s are printed once, above."""

    def __init__(self, console: Console, duration_s: float, requests: int, slo: Slo) -> None:
        self._console = console
        self._duration_s = duration_s
        self._requests = requests
        self._slo = slo
        self._began = time.monotonic()
        self._phase = "starting the engine, usually half a minute"
        self._progress: Progress | None = None
        self._notice = ""
        self._last_line_s = 0.0
        self._live = Live(get_renderable=self._view, console=console, transient=True, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        else:
            self._console.print(self._phase)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def started(self, warnings: list[str]) -> None:
        """The engine is up; each of its warnings takes one line."""
        print_started(self._console, warnings, self._began)
        self._phase = f"running for {self._duration_s:g} s"
        if not self._console.is_terminal:
            self._console.print(self._phase)

    def update(self, progress: Progress) -> None:
        """Take the numbers of this second."""
        self._progress = progress
        if progress.notice and progress.notice != self._notice:
            self._notice = progress.notice
            self._console.print(Text(f"harli: {progress.notice}"))
        if not self._console.is_terminal and progress.elapsed_s - self._last_line_s >= LINE_EVERY_S:
            self._last_line_s = progress.elapsed_s
            facts = ", ".join(f"{name} {value}" for name, value in self._facts(progress))
            self._console.print(Text(f"{progress.elapsed_s:.0f} s: {facts}"), soft_wrap=True)

    def _view(self) -> Table:
        """One row per number; drawn several times a second, so that the clock moves."""
        view = Table.grid(padding=(0, 2))
        view.add_column(style="dim")
        view.add_column(min_width=30)
        progress = self._progress
        if progress is None:
            view.add_row(f"{time.monotonic() - self._began:.0f} s", self._phase)
            return view
        left = self._duration_s - progress.elapsed_s
        bar = ProgressBar(total=self._duration_s, completed=min(progress.elapsed_s, self._duration_s), width=30)
        view.add_row("time left", f"{left:.0f} s" if left > 0 else "finishing the last requests")
        view.add_row("", bar)
        for name, value in self._facts(progress):
            view.add_row(name, value)
        return view

    def _facts(self, progress: Progress) -> list[tuple[str, str]]:
        done = f"{progress.finished} of {self._requests} done"
        failed = f", {progress.failed} failed" if progress.failed else ""
        facts = [
            ("requests", f"{done}{failed}, {progress.running} running, {progress.waiting} waiting"),
            ("TPOT", _against(progress.tpot_ms, self._slo.tpot_ms)),
            ("ITL p99", _against(progress.itl_ms, self._slo.itl_ms)),
        ]
        if progress.attainment is not None:
            facts.append(("attainment", f"{progress.attainment:.1%}"))
        loss = "" if progress.loss is None else f", loss {progress.loss:.3f}"
        facts.append(("share", progress.share))
        if progress.lent:
            facts.append(("KV cache lent", f"{progress.lent:.0%}"))
        facts.append(("finetune", f"{progress.tokens_per_s:.0f} tokens/s, {progress.updates} updates{loss}"))
        return facts


def _against(value_ms: float | None, slo_ms: float | None) -> str:
    shown = "-" if value_ms is None else f"{value_ms:.1f} ms"
    return shown if slo_ms is None else f"{shown} (SLO {slo_ms:g} ms)"
