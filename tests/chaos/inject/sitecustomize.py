"""Faults for a real server: Python imports this file by itself in each process that has its folder in PYTHONPATH.

A fault is there as long as a file of its name lies in the folder ``$HARLI_FAULTS``.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ["HARLI_FAULTS"])
HELD_S = 3
DAY_S = 86_400.0


# Faults of a unit: each is given the trainer and its own file.


def raising(trainer: Any, file: Path) -> None:
    raise RuntimeError("injected\nfault")


def ending_the_thread(trainer: Any, file: Path) -> None:
    raise SystemExit


def not_finite(trainer: Any, file: Path) -> None:
    for name, parameter in trainer._job.model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(float("nan"))


def out_of_memory(trainer: Any, file: Path) -> None:
    raise MemoryError


def allocating_too_much(trainer: Any, file: Path) -> None:
    import torch

    torch.empty(1 << 50, dtype=torch.uint8)


def stalling(trainer: Any, file: Path) -> None:
    while file.exists():
        time.sleep(0.05)


def holding_the_interpreter(trainer: Any, file: Path) -> None:
    file.unlink()  # once
    ctypes.PyDLL(None).sleep(HELD_S)  # unlike CDLL, PyDLL keeps the interpreter's lock


def segfault(trainer: Any, file: Path) -> None:
    ctypes.string_at(0)


FAULTS: tuple[Callable[[Any, Path], None], ...] = (
    raising,
    ending_the_thread,
    not_finite,
    out_of_memory,
    allocating_too_much,
    stalling,
    holding_the_interpreter,
    segfault,
)


def _add_faults(cls: type[Any]) -> None:
    """Called for each class of threads as it is made, so that the trainer's need not be imported here."""
    if cls.__module__ != "harli.finetune.trainer":
        return
    run_unit = cls._run_unit

    def run_unit_or_fail(trainer: Any, *unit: Any) -> None:
        for fault in FAULTS:
            if (file := FOLDER / fault.__name__).exists():
                fault(trainer, file)
        run_unit(trainer, *unit)

    cls._run_unit = run_unit_or_fail


threading.Thread.__init_subclass__ = classmethod(_add_faults)  # type: ignore[assignment]


# A fault of every process: its wall clock has jumped.

_now = time.time


def _jumped() -> float:
    days = (FOLDER / "clock_forward").exists() - (FOLDER / "clock_back").exists()
    return _now() + days * DAY_S


time.time = _jumped
