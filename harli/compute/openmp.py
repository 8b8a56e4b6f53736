"""The OpenMP runtime that torch and vLLM share, and the threads of its teams.

Core splits need a runtime whose worker threads stay: Intel's, with KMP_HOT_TEAMS_MODE=1, keeps the
workers of a shrunken team asleep and uses the same ones, in the same order, when the team grows
again, so each can be pinned once. GNU's ends them and starts new ones, which no pin survives.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

set_team_size: Callable[[int], None] = torch.set_num_threads
"""Sets the team of the calling thread. Taken before vLLM's CPU worker replaces torch's function."""


def environment() -> dict[str, str]:
    """Environment variables a process needs, before it starts, for core splits; empty where there is no such runtime.

    Spinning for a millisecond after a parallel region spans the gaps within a decode step, so decode
    is as fast as with the default of 200 ms, and frees the core for the other side right after.
    """
    library = Path(sys.prefix, "lib", "libiomp5.so")
    if not library.exists():
        return {}
    preload = os.environ.get("LD_PRELOAD", "")
    return {
        "LD_PRELOAD": preload if "libiomp5" in preload else ":".join(filter(None, (str(library), preload))),
        "KMP_AFFINITY": "disabled",
        "KMP_BLOCKTIME": "1",
        "KMP_HOT_TEAMS_MODE": "1",
    }


def keeps_workers() -> bool:
    """Whether the runtime in this process keeps the workers of a team."""
    return hasattr(ctypes.CDLL(None), "kmp_set_blocktime") and os.environ.get("KMP_HOT_TEAMS_MODE") == "1"


def pin_team(cores: tuple[int, ...]) -> list[int]:
    """Give the calling thread a team of ``len(cores)`` and pin its i-th thread to the i-th core.

    Every thread pins itself in a parallel region, entered as compiled code enters one: new workers and
    those of an earlier team are all reached, each by its number. Returns the clocks of the threads' CPU
    times, for ``time.clock_gettime``.
    """
    runtime = ctypes.CDLL(None)
    clocks: list[int] = []

    def pin(_: object) -> None:
        os.sched_setaffinity(0, {cores[runtime.omp_get_thread_num()]})
        clocks.append(cpu_clock(threading.get_native_id()))

    set_team_size(len(cores))
    runtime.GOMP_parallel(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(pin), None, len(cores), 0)
    return clocks


def cpu_clock(thread_id: int) -> int:
    """The clock of a thread's CPU time (Linux, ``include/linux/posix-timers_types.h``: per thread, scheduled time)."""
    return (~thread_id << 3) | 6
