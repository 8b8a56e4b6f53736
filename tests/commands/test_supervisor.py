"""The engine process dies in the middle of load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harli import crashes
from harli.cli import main
from harli.config import FinetuneSettings
from harli.finetune.checkpoint import complete
from harli.records.reader import read_record
from harli.types import HarliError

pytestmark = pytest.mark.slow

RUN = (
    *("run", "--policy", "static", "--model", "tiny", "--requests-per-s", "3", "--duration", "25"),
    *("--max-model-len", "256", "--kv-cache-gib", "0.5", "--microbatch-tokens", "64", "--checkpoint-every", "2"),
)


def engine_of(process: subprocess.Popen[str]) -> psutil.Process:
    """vLLM's engine process among the children of ``process``."""
    children = psutil.Process(process.pid).children(recursive=True)
    return max(children, key=lambda child: child.memory_info().rss)


def test_decode_is_restarted_without_finetuning(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "harli", *RUN, "--out", "record"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "running" in line:
            break
    folder = tmp_path / "record"
    while not complete(folder / "checkpoints"):
        time.sleep(0.2)
    os.kill(engine_of(process).pid, signal.SIGKILL)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr
    record = read_record(folder)
    assert record.info.status == "finished"
    assert record.info.finetune.state == "failed"
    assert "died" in record.info.finetune.reason
    errors = [error for error in record.requests["error"].to_pylist() if error]
    assert 0 < len(errors) < len(record.requests) / 2
    assert len(complete(folder / "checkpoints")) >= 1
    settings = FinetuneSettings(microbatch_tokens=64, checkpoint_every=2)
    name = crashes.job_name("tiny", settings)
    assert crashes._read()[name] == 1
    crashes.forget(name)


def test_a_job_at_two_deaths_is_quarantined_until_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HARLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    name = crashes.job_name("tiny", FinetuneSettings(microbatch_tokens=64))
    crashes.note(name)
    crashes.check(name)
    crashes.note(name)
    with pytest.raises(HarliError, match=f"--release-job {name}"):
        crashes.check(name)
    monkeypatch.setattr(sys, "argv", ["harli", *RUN])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert f"--release-job {name}" in capsys.readouterr().err
    assert not (tmp_path / "records").exists()
    crashes.forget(name)
    crashes.check(name)


def test_a_damaged_list_of_crashes_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARLI_CACHE", str(tmp_path))
    (tmp_path / "crashes.json").write_text("[not json")
    crashes.check("job")
    crashes.note("job")
    crashes.note("job")
    with pytest.raises(HarliError, match="2 times"):
        crashes.check("job")
