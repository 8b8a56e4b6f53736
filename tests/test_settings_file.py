"""A run's settings as a file: what is read, what is refused, and that a record repeats its run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from harli import settings_file
from harli.cli import app, main
from harli.config import RunSettings
from harli.records.schema import SETTINGS_FILE
from harli.types import HarliError
from tests.records.builders import small_run

FILE = """\
policy: static
params: {work_conserving: true, share: 1/1}
slo: {tpot_ms: 80}
workload: {duration_s: 5, seed: 3}
finetune:
  lora: {rank: 4}
"""


def printed(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["run", "--print-config", *arguments])
    assert result.exit_code == 0, result.output
    loaded: dict[str, Any] = yaml.safe_load(result.stdout)
    return loaded


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    return path


def test_the_file_is_read_and_defaults_are_filled_in(file: Path) -> None:
    settings = printed("--config", str(file))
    assert settings["policy"] == "static"
    assert settings["params"] == {"work_conserving": True, "share": "1/1"}
    assert settings["finetune"]["lora"]["rank"] == 4
    assert settings["engine"]["model"] == "small"


def test_flags_win(file: Path) -> None:
    flags = ("--slo-tpot-ms", "50", "--lora-rank", "2", "--param", "share=0/1", "--lora-targets", "q_proj, v_proj")
    settings = printed("--config", str(file), *flags, "--seed", "9")
    assert settings["slo"]["tpot_ms"] == 50
    assert settings["finetune"]["lora"]["rank"] == 2
    assert settings["finetune"]["lora"]["targets"] == ["q_proj", "v_proj"]
    assert settings["params"] == {"work_conserving": True, "share": "0/1"}
    assert {settings[section]["seed"] for section in ("engine", "workload", "finetune")} == {9}
    assert settings["workload"]["duration_s"] == 5


def test_what_is_printed_reads_back_as_the_same(file: Path, tmp_path: Path) -> None:
    settings = printed("--config", str(file))
    again = tmp_path / "again.yaml"
    again.write_text(settings_file.dump(settings))
    assert printed("--config", str(again)) == settings


def test_a_record_holds_its_settings(tmp_path: Path) -> None:
    settings = settings_file.validate({"policy": "static", "engine": {"model": "tiny"}})
    record = small_run(tmp_path / "record", settings=settings.model_dump(mode="json"))
    assert settings_file.validate(settings_file.load(record.folder / SETTINGS_FILE)) == settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policy: static\nslo: {tpot: 80}\n", "run.yaml: no setting is called 'slo.tpot'; did you mean 'tpot_ms'"),
        ("policy: static\nworkloda: {}\n", "'workloda'; did you mean 'workload'"),
        ("policy: static\nfinetune: {lora: {rnk: 4}}\n", "did you mean 'rank'"),
        ("engine: {model: tiny}\n", "'policy' is missing"),
        ("policy: static\nfinetune: {schedule: linear}\n", "needs a number of updates"),
        ("policy: static\nslo: {itl_ms: -4}\n", "run.yaml: slo.itl_ms: input should be greater than 0, not -4"),
        ("policy: static\nslo: 80\n", "slo: expected settings inside it, not 80"),
        ("policy: static\nparams: {share: [1, 1]}\n", "params.share: expected a number, a text, true or false"),
        ("policy: static\n1: 2\n", "run.yaml: 1: keys should be strings"),
        ("policy: st\0tic\n", "run.yaml: not YAML: unacceptable character"),
        ("policy: 2026-13-01\n", "run.yaml: not YAML: month must be in"),
        ("", "'policy' is missing"),
        ("policy: [static\n", "run.yaml:2: not YAML"),
        ("- policy\n", "expected settings such as"),
    ],
)
def test_what_is_wrong_is_one_line(
    text: str, message: str, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(text)
    monkeypatch.setattr(sys, "argv", ["harli", "run", "--config", str(file)])
    with pytest.raises(SystemExit) as exit_:
        main()
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]


def test_a_flag_gives_what_the_file_lacks(file: Path) -> None:
    file.write_text("finetune: {schedule: linear}\n")
    settings = printed("--config", str(file), "--policy", "static", "--updates", "7")
    assert (settings["policy"], settings["finetune"]["updates"]) == ("static", 7)


def test_a_rate_of_generated_requests_beside_a_trace_is_refused(file: Path) -> None:
    rate, trace = ("--requests-per-s", "2"), ("--trace", "requests.csv")
    file.write_text("policy: static\nworkload: {trace: requests.csv, requests_per_s: 3.0}\n")  # as in a record
    assert printed("--config", str(file))["workload"]["requests_per_s"] == 3.0
    for arguments in (("--policy", "static", *trace, *rate), ("--config", str(file), *rate)):
        result = CliRunner().invoke(app, ["run", "--print-config", *arguments])
        assert isinstance(result.exception, HarliError)
        assert str(result.exception).startswith("--requests-per-s is for generated requests")


def test_a_flag_does_not_hide_a_wrong_section(file: Path) -> None:
    file.write_text("policy: static\nslo: 80\n")
    result = CliRunner().invoke(app, ["run", "--print-config", "--config", str(file), "--slo-tpot-ms", "50"])
    assert isinstance(result.exception, HarliError)


def test_printing_settings_starts_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert printed("--policy", "static", "--model", "tiny")["engine"]["model"] == "tiny"
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(HarliError, match=r"nothing\.yaml: No such file"):
        settings_file.load(tmp_path / "nothing.yaml")


def test_every_flag_sets_a_setting_that_exists() -> None:
    from harli.commands.flags import SETTINGS

    for path in SETTINGS.values():
        section: Any = RunSettings
        *parents, last = path.split(".")
        for name in parents:
            section = section.model_fields[name].annotation
        assert last in section.model_fields, path
