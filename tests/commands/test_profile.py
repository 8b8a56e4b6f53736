"""``harli profile``: what it refuses before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harli.cli import main
from harli.records.profile import PROFILE_FILE, ProfileInfo
from harli.types import UnitTime
from profiling.folder import ProfileFolder
from profiling.settings import ProfileSettings


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
            settings=settings.model_dump(mode="json"), plan={}, started_at="2026-01-01T00:00:00+00:00",
            status="interrupted", unit_times=(UnitTime("forward", 2, 256, 0, 4.0, 1.5, 2.0),),
        )
    )  # fmt: skip
    return tmp_path / "profile"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget-minutes", "0.01"], "--budget-minutes is too short"),
        (["--budget-minutes", "nan"], "--budget-minutes"),
        (["--shares", "5/9"], "no share '5/9' on this device"),
        (["--model", "no/folder/here"], "no/folder/here"),
        (["--microbatch-tokens", "1"], "--microbatch-tokens"),
        (["--resume", "nowhere"], "nowhere is not a profile"),
        (["--max-model-len", "0"], "--max-model-len"),
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
    for arguments, flag in (
        (["--model", "small"], "--model"),
        (["--budget-minutes", "2"], "--budget-minutes"),
        (["--lora-rank", "4"], "--lora"),
        (["--shares", "1/1"], "--shares"),
    ):
        line = refused(capsys, monkeypatch, "--resume", str(interrupted), *arguments)
        assert flag in line
        assert "leave it out to resume" in line
    assert (interrupted / PROFILE_FILE).read_bytes() == before


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
