"""``harli runs``, ``harli show`` and ``harli publish``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harli.cli import app, main
from tests.records.builders import small_run


def test_runs_lists_records_and_names_damaged_ones(tmp_path: Path) -> None:
    small_run(tmp_path / "one", policy="static", started_at="2026-02-01T09:30:00+00:00")
    small_run(tmp_path / "two[b]", policy="separate", simulated=True)
    small_run(tmp_path / "broken")
    (tmp_path / "broken" / "steps.parquet").write_bytes(b"nonsense")
    result = CliRunner().invoke(app, ["runs", str(tmp_path)])
    assert result.exit_code == 0
    listed = result.stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["record", "two[b]", "one"]  # by time
    assert "(simulated)" in listed[1]
    assert "2026-02-01 09:30" in listed[2]
    assert "static" in listed[2]
    assert sum("steps.parquet" in line for line in result.stderr.splitlines()) == 1


def test_a_record_is_one_line_however_narrow_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    small_run(tmp_path / "20260131-120000-separate", policy="separate")
    _, row = CliRunner().invoke(app, ["runs", str(tmp_path)]).stdout.splitlines()
    assert row.split()[:4] == ["20260131-120000-separate", "2026-01-31", "12:00", "separate"]


def test_show_prints_the_table_or_json(tmp_path: Path) -> None:
    record = small_run(tmp_path / "one", policy="static")
    assert "static" in CliRunner().invoke(app, ["show", str(record.folder)]).stdout
    shown = json.loads(CliRunner().invoke(app, ["show", str(record.folder), "--json"]).stdout)
    assert shown == record.info.summary


def test_publishing_twice_gives_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    record = small_run(tmp_path / "one")
    first, second = (CliRunner().invoke(app, ["publish", str(record.folder)]) for _ in range(2))
    assert first.exit_code == second.exit_code == 0
    assert first.stdout == second.stdout != ""


@pytest.mark.parametrize("arguments", [["show", "nowhere"], ["publish", "nowhere"], ["runs", "nowhere"]])
def test_a_missing_folder_is_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["harli", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2
    assert len(lines) == 1
    assert "nowhere" in lines[0]
