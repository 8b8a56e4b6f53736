"""``harli profile``: what it refuses before anything starts, and Ctrl-C while the engine does."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from harli.cli import main
from harli.config import EngineSettings
from harli.predictor_choice import identity
from harli.records.profile import PROFILE_FILE, ProfileInfo
from harli.types import UnitTime
from profiling.folder import ProfileFolder
from profiling.settings import ProfileSettings
from tests.profiling.builders import make_plan


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The one line that ``harli profile`` says before it ends with exit code 2."""
    monkeypatch.setattr("sys.argv", ["harli", "profile", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "Traceback" not in said
    return said.splitlines()[-1]


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A profile of ``tiny`` that was stopped at once."""
    settings = ProfileSettings.model_validate({"engine": {"model": "tiny"}, "budget_s": 60.0})
    folder = ProfileFolder(tmp_path / "profile")
    folder.write(
        ProfileInfo(
            profile_id="0" * 32, model="tiny", role="decode", menu=["2/0", "1/1", "0/2"], device={}, versions={},
            settings=settings.model_dump(mode="json"), plan=make_plan().described, status="interrupted",
            started_at="2026-01-01T00:00:00+00:00", unit_times=(UnitTime("forward", 2, 256, 0, 4.0, 1.5),),
        )
    )  # fmt: skip
    return tmp_path / "profile"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget-minutes", "0.01"], "--budget-minutes is too short"),
        (["--budget-minutes", "nan"], "--budget-minutes: Input should be a finite number"),
        (["--budget-minutes", "inf"], "--budget-minutes: Input should be a finite number"),
        (["--kv-cache-gib", "inf"], "--kv-cache-gib: Input should be a finite number"),
        (["--shares", "5/9"], "no share '5/9' on this device"),
        (["--model", "no/folder/here"], "no/folder/here"),
        (["--microbatch-tokens", "1"], "--microbatch-tokens"),
        (["--resume", "nowhere"], "nowhere is not a profile"),
        (["--max-model-len", "0"], "--max-model-len"),
        (["--lora-rank", "0"], "--lora-rank: Input should be greater than or equal to 1, not 0"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, monkeypatch, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_flags_that_contradict_a_resumed_profile(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, interrupted: Path
) -> None:
    before = (interrupted / PROFILE_FILE).read_bytes()
    for name, value, known in (
        ("--model", "small", "tiny"),
        ("--budget-minutes", "2", "1.0"),
        ("--lora-rank", "4", "8"),
        ("--shares", "1/1", "()"),
        ("--finetune-data", "other.jsonl", "None"),
        ("--seed", "7", "0"),
    ):
        line = refused(capsys, monkeypatch, "--resume", str(interrupted), name, value)
        assert line.endswith(f"was begun with another {name} ({known}); leave it out to resume")
    assert (interrupted / PROFILE_FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": {"kind": "abacus", "rods": 7}}, "device (kind abacus, rods 7) is not ("),
        ({"versions": {"vllm": "0.0.1"}}, "vllm 0.0.1 is not "),
        ({"role": "mixed"}, "role mixed is not decode"),
    ],
)
def test_a_profile_of_something_else_is_not_resumed(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    interrupted: Path,
    changes: dict[str, Any],
    said: str,
) -> None:
    path = interrupted / PROFILE_FILE
    content = json.loads(path.read_text()) | identity(EngineSettings(model="tiny"))
    path.write_text(json.dumps(content | changes))
    line = refused(capsys, monkeypatch, "--resume", str(interrupted))
    assert f"cannot be resumed here: {said}" in line


@pytest.mark.parametrize("resumed", [False, True])
def test_ctrl_c_while_the_engine_starts(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    interrupted: Path,
    tmp_path: Path,
    *,
    resumed: bool,
) -> None:
    """A new profile leaves nothing; one that is resumed stays."""

    @asynccontextmanager
    async def starting(settings: EngineSettings, log: Path) -> AsyncIterator[None]:
        log.write_text("starting")
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(30.0)
        yield

    path = interrupted / PROFILE_FILE
    content = json.loads(path.read_text()) | identity(EngineSettings(model="tiny"))
    path.write_text(json.dumps(content | {"status": "running"}))  # as one that was killed says
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr("profiling.run.launched", starting)
    new = ["--model", "tiny", "--out", str(tmp_path / "new")]
    monkeypatch.setattr("sys.argv", ["harli", "profile", *(["--resume", str(interrupted)] if resumed else new)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert path.exists()
    assert not (tmp_path / "new").exists()
    assert resumed or said.splitlines()[-1] == "interrupted before anything was measured: there is no profile"


def test_a_damaged_or_newer_profile_is_not_resumed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, interrupted: Path
) -> None:
    path = interrupted / PROFILE_FILE
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "schema_version": 99}))
    assert "newer Harli" in refused(capsys, monkeypatch, "--resume", str(interrupted))
    path.write_text("{")
    assert "damaged" in refused(capsys, monkeypatch, "--resume", str(interrupted))


def test_a_folder_in_use_is_left_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, interrupted: Path
) -> None:
    before = sorted(interrupted.iterdir())
    assert "not empty" in refused(capsys, monkeypatch, "--model", "tiny", "--out", str(interrupted))
    assert sorted(interrupted.iterdir()) == before
