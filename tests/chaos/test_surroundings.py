"""What a run or a server needs around it is missing, damaged or held by others."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harli.cli import app, main
from harli.records.reader import read_record
from predictor.artifact import FILE
from tests.predictor.fitted import artifact
from tests.records.builders import small_run

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

HOLD = """\
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.read(1)
"""


@contextmanager
def unreachable() -> Iterator[str]:
    """The address of an MLflow server that is not there."""
    with socket.socket() as taken:  # bound, so that nobody else listens there meanwhile
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_a_run_without_mlflow_keeps_its_record_to_publish_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("run", "--policy", "static", "--model", "tiny", "--requests-per-s", "4", "--duration", "6")
    run += ("--max-model-len", "256", "--kv-cache-gib", "0.3", "--microbatch-tokens", "64", "--out", "record")
    with unreachable() as uri:
        done = subprocess.run(
            [sys.executable, "-m", "harli", *run],
            cwd=tmp_path,
            env=os.environ | {"MLFLOW_TRACKING_URI": uri},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert f"runs without a predictor: MLflow at {uri} cannot be used" in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("harli: ")]
    assert len(lines) == 1
    assert "the record is kept, publish it later with: harli publish record" in lines[0]
    info = read_record(tmp_path / "record").info
    assert (info.status, info.finetune.state) == ("finished", "finished")
    assert info.summary["decode/requests_failed"] == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert CliRunner().invoke(app, ["publish", str(tmp_path / "record")]).exit_code == 0


@contextmanager
def held(database: Path) -> Iterator[subprocess.Popen[str]]:
    """Inside, another process has the SQLite database to itself, unless it is told earlier to let go."""
    pipe = subprocess.PIPE
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(database)], stdin=pipe, stdout=pipe, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        yield holder
    finally:
        if holder.poll() is None:
            holder.communicate("x")


def test_a_store_of_mlflow_that_another_process_holds_is_waited_for_and_then_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    database = tmp_path / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    first, second, third = (small_run(tmp_path / name).folder for name in ("first", "second", "third"))
    assert CliRunner().invoke(app, ["publish", str(first)]).exit_code == 0
    with held(database) as holder:
        threading.Timer(2.0, lambda: holder.communicate("x")).start()
        assert CliRunner().invoke(app, ["publish", str(second)]).exit_code == 0
    with held(database):
        line = refusal(monkeypatch, capsys, "publish", str(third))
    assert "database is locked" in line
    assert f"the record is kept, publish it later with: harli publish {third}" in line


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--policy", "qos", "--slo-itl-ms", "60"), "no predictor is the champion yet"),
        (("--policy", "static", "--predictor", "nothing"), "no predictor 'nothing': give a folder"),
        (("--policy", "static", "--predictor", "damaged"), "damaged"),
    ],
)
def test_a_server_without_the_predictor_that_it_was_told_to_use_does_not_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    reason: str,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    artifact().save(tmp_path / "damaged")
    file = tmp_path / "damaged" / FILE
    file.write_bytes(file.read_bytes()[:200])
    assert reason in refusal(monkeypatch, capsys, "serve", "--model", "tiny", *arguments)
    assert not (tmp_path / "serve").exists()


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command says before it ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["harli", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("harli: "))
    return line
