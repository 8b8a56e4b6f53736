"""Killing the process at random moments never leaves a half-written checkpoint or record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def losses(path: Path) -> dict[int, set[str]]:
    """Every loss that was seen for each update; the last line may be cut off."""
    seen: dict[int, set[str]] = {}
    text = path.read_text()
    for line in text[: text.rfind("\n")].splitlines():
        update, loss = line.split()
        seen.setdefault(int(update), set()).add(loss)
    return seen


def test_twenty_kills_leave_the_loss_curve_of_an_uninterrupted_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.finetune.killed_training", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert result["straight"] == result["last"] == 0, done.stderr[-3000:]
    assert result["killed"] >= 15, result
    assert result["unreadable"] == []
    assert len(set(result["resumed_from"])) > 3, "the kills did not hit different stages"
    straight = losses(tmp_path / "straight.txt")
    assert {len(values) for values in straight.values()} == {1}
    seen = losses(tmp_path / "losses.txt")
    assert {update: straight[update] for update in seen} == seen
    # A kill may come after a checkpoint and before the line of the updates just before it.
    resumed_from = {int(name.removeprefix("update-")) for name in result["resumed_from"]}
    assert straight.keys() - seen.keys() <= {number - back for number in resumed_from for back in (1, 2)}
