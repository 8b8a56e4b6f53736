"""What long work says of itself where there is no terminal."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from harli.commands import work_bar
from harli.commands.work_bar import WorkBar


def test_a_line_has_the_description_or_the_percentage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_bar, "LINE_EVERY_S", 0.0)
    said = StringIO()
    with WorkBar(Console(file=said), "simulating", 4.0) as bar:
        bar.update(1.0)
        bar.update(2.0, "round 1: static [1/1]: done")
    assert said.getvalue().splitlines() == [
        "simulating: 25% done, about 0 min left",
        "round 1: static [1/1]: done, about 0 min left",
    ]
