"""``harli`` itself: help, versions, exit codes, completion, and how errors are told."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from harli.cli import app, main
from harli.commands import complete

COMMANDS = sorted(typer.main.get_command(app).commands)


def test_version_names_engine_and_torch() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert all(f"{name} " in result.stdout for name in ("harli", "vllm", "torch"))


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_nothing_heavy_is_imported_before_a_command_needs_it(option: str) -> None:
    code = (
        "import sys, harli.cli\n"
        "try: harli.cli.main()\n"
        "except SystemExit as exit: assert not exit.code\n"
        "print(sorted({'torch', 'vllm', 'mlflow', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_documents_the_exit_codes() -> None:
    shown = CliRunner().invoke(app, ["--help"]).stdout
    assert all(code in shown for code in ("0 done", "2 bad input", "130 interrupted"))
    assert all(f" {command} " in shown for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(command: str) -> None:
    assert "Example: " in CliRunner().invoke(app, [command, "--help"]).stdout


def test_completion_offers_policies_and_models() -> None:
    assert complete.policies("sta") == ["static"]
    assert "separate" in complete.policies("")
    assert complete.models("") == ["tiny", "small"]
    assert complete.models("ti") == ["tiny"]


def test_an_unknown_flag_is_bad_input() -> None:
    assert CliRunner().invoke(app, ["run", "--polycy", "static"]).exit_code == 2


def test_a_parameter_without_a_name_is_bad_input() -> None:
    result = CliRunner().invoke(app, ["policies", "check", "static", "--param", "=1"])
    assert str(result.exception) == "--param wants key=value, not '=1'"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("harli.records.reader.read_record", broken)
    monkeypatch.setattr(sys, "argv", ["harli", "show", "record"])
    with pytest.raises(RuntimeError, match="a bug"):
        main()
