"""What of vLLM's log reaches the user."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from harli.engine.log import output_to, warnings


def test_each_warning_that_is_news_comes_once(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text(
        "(EngineCore pid=1) WARNING 11-21 07:28:18 [vllm.py:1703] Enforce eager set, disabling everything.\n"
        "(EngineCore pid=1) WARNING 11-21 07:28:19 [scheduler.py:9] The cache is small. Consider more of it.\n"
        "(EngineCore pid=1) INFO 11-21 07:28:19 [scheduler.py:9] Nothing to see.\n"
        "(EngineCore pid=1) WARNING 11-21 07:28:20 [scheduler.py:9] The cache is small. Consider more of it.\n"
        "not a line of vLLM's: WARNING\n"
    )
    assert warnings(log) == ["The cache is small"]


def test_output_goes_to_the_file_and_comes_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "engine.log"
    with output_to(log):
        os.write(1, b"to the file\n")
        os.write(2, b"this too\n")
    os.write(1, b"to the terminal\n")
    assert log.read_text() == "to the file\nthis too\n"
    assert capfd.readouterr().out == "to the terminal\n"


def test_it_comes_back_after_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), output_to(tmp_path / "engine.log"):
        raise RuntimeError
    sys.stdout.flush()
    os.write(1, b"to the terminal\n")
    assert capfd.readouterr().out == "to the terminal\n"
