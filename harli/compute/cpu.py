"""Core splits: decode's OpenMP team on the first cores, finetuning's on the last.

Both sides' threads are pinned once: decode's i-th to the i-th core, finetuning's i-th to the i-th
core from the end. A share is then nothing but two team sizes, and switching it moves no thread. Team
sizes that add up to the number of cores never meet on a core.
"""

from __future__ import annotations

import math
import threading
import time

from harli.compute import openmp
from harli.compute.base import Partitioner
from harli.compute.cores import usable_cores
from harli.types import Menu, Share

MAX_SPLITS = 7


class CpuPartitioner(Partitioner):
    """Splits ``cores``; without an OpenMP runtime that keeps its workers, there is time slicing only."""

    def __init__(self, cores: tuple[int, ...] | None = None) -> None:
        self.cores = usable_cores() if cores is None else cores
        self.menu = core_menu(len(self.cores), splits=openmp.keeps_workers())
        self._decode = self._finetune = len(self.cores)
        self._decode_clocks: list[int] = []
        self._finetune_clocks: list[int] = []

    def adopt_decode(self) -> None:
        self._decode_clocks = self._adopt(self.cores)

    def adopt_finetune(self) -> None:
        self._finetune_clocks = self._adopt(self.cores[::-1])
        self._finetune = len(self.cores)

    def set_decode(self, units: int) -> None:
        if units != self._decode:
            openmp.set_team_size(units)
            self._decode = units

    def set_finetune(self, units: int) -> None:
        if units != self._finetune:
            openmp.set_team_size(units)
            self._finetune = units

    def cpu_ms(self) -> tuple[float, float]:
        return _read_ms(self._decode_clocks), _read_ms(self._finetune_clocks)

    def _adopt(self, cores: tuple[int, ...]) -> list[int]:
        if openmp.keeps_workers():
            return openmp.pin_team(cores)
        openmp.set_team_size(len(cores))
        return [openmp.cpu_clock(threading.get_native_id())]


def _read_ms(clocks: list[int]) -> float:
    try:
        return sum(map(time.clock_gettime_ns, clocks)) / 1e6
    except OSError:  # a thread has ended
        return math.nan


def core_menu(cores: int, *, splits: bool = True) -> Menu:
    """Decode alone, at most ``MAX_SPLITS`` evenly spaced splits, finetuning alone."""
    count = min(cores - 1, MAX_SPLITS) if splits else 0
    finetune = sorted({round(cores * i / (count + 1)) for i in range(1, count + 1)} | {0, cores})
    return Menu(tuple(Share(cores - n, n) for n in finetune))
