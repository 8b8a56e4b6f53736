"""A comparison on the terminal: how far it is, and its table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harli.commands.engine_bar import EngineBar

if TYPE_CHECKING:
    from harli.compare.base import Progress as Compared
    from harli.compare.means import Interval
    from harli.compare.results import Scored
    from harli.compare.score import Row

TABLE_WIDTH = 160
"""One line per policy, in a narrow terminal and in a pipe too; reasons come below."""


class MeasuredBar(EngineBar):
    """How far a comparison on an engine is, and what runs."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, total=None)

    def update(self, now: Compared) -> None:
        facts = "" if now.live is None else f"{now.live.finished} requests, {now.live.tokens_per_s:.0f} tokens/s"
        self._bar.update(self._task, completed=now.done_s, total=now.total_s, description=str(now.planned), facts=facts)
        if now.live is None:
            left_s = now.total_s - now.done_s
            self._console.print(Text(f"{now.planned}: done, about {left_s / 60:.0f} min left"), soft_wrap=True)


def print_scored(scored: Scored, under: str) -> None:
    """One line per entrant; below it what is wrong with whom. ``under``: what else tells this table from others."""
    from harli.compare.verdict import ADMITTED, TOKENS, WAIT

    rounds = max((len(row.points) for row in scored.rows), default=0)
    title = f"{scored.objective}{under}, {rounds} round{'s' * (rounds != 1)}, 95% intervals"
    table = Table(title=title, box=None, title_justify="left", title_style="bold", pad_edge=False)
    columns = {
        "": [str(row.entrant) for row in scored.rows],
        "finetune tokens/s": [_number(row.metrics[TOKENS], row.interval, "{:,.1f}") for row in scored.rows],
        "vs best rival": [_number(row.ratio, row.ratio_interval, "{:.2f}") for row in scored.rows],
        "vs oracle": [_number(row.of_oracle, None, "{:.2f}") for row in scored.rows],
        "vs dedicated": [_number(row.gain.value if row.gain else None, None, "{:+.1%}") for row in scored.rows],
        "attained": [f"{row.attainment:.2%}" for row in scored.rows],
        "requests/s": [_number(row.metrics[ADMITTED], None, "{:.2f}") for row in scored.rows],
        "wait p99": [_number(row.metrics[WAIT], None, "{:,.0f} ms") for row in scored.rows],
        "decode": [f"{'unharmed' if row.unharmed else 'harmed'}{'?' * row.verdict.undecided}" for row in scored.rows],
    }
    for name in ("vs oracle", "vs dedicated"):
        if set(columns[name]) == {"-"}:
            del columns[name]
    for name in columns:
        table.add_column(name)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, cells))
    console = Console(width=TABLE_WIDTH)
    console.print(table)
    for line in (*_reasons(scored.rows), *scored.marks):
        console.print(f"note: {line}", markup=False, highlight=False, soft_wrap=True)


def _reasons(rows: list[Row]) -> list[str]:
    return [f"{row.entrant} {row.verdict.reason}" for row in rows if row.verdict.reason]


def _number(value: float | None, interval: Interval | None, shown: str) -> str:
    if value is None:
        return "-"
    between = "" if interval is None else f" ({' to '.join(shown.format(end) for end in interval)})"
    return shown.format(value) + between
