"""Which errors are the machine's, and how they come out of the engine process."""

from __future__ import annotations

import errno
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from harli.compute.cpu import CpuPartitioner
from harli.engine.control import Control
from harli.finetune.dataset import check_lines
from harli.runtime.session import Session
from harli.serve.files import errors_name
from harli.transient import is_transient
from harli.types import HarliError


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (MemoryError(), True),
        (OSError(errno.EMFILE, "Too many open files"), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.ENOENT, "No such file or directory"), False),
        (ValueError("no luck"), False),
        (HarliError("no luck"), False),
    ],
)
def test_errors_of_the_machine_pass(error: Exception, transient: bool) -> None:
    assert is_transient(error) is transient
    wrapped = HarliError("cannot read it")
    wrapped.__cause__ = error
    assert is_transient(wrapped) is transient


def test_an_error_of_the_machine_is_known_under_a_file_s_public_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(HarliError, match="data file-1: Too many") as raised, errors_name(tmp_path, "file-1"):
        check_lines(tmp_path)
    assert is_transient(raised.value)


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (MemoryError(), {"transient": "MemoryError: "}),
        (HarliError("no luck"), {"error": "no luck"}),
        (ValueError("no luck"), {"error": "ValueError: no luck"}),
    ],
)
def test_the_engine_tells_problems_that_pass_from_others(error: Exception, answer: dict[str, str]) -> None:
    nothing: Any = None
    control = Control(Session(CpuPartitioner((0,)), lambda: False), nothing, nothing, 1, [])
    control._preparing = Future()
    control._preparing.set_exception(error)
    assert control.prepared() == answer
