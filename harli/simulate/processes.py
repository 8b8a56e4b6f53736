"""Simulations side by side, one process each at a time."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from harli.types import HarliError

Answer = TypeVar("Answer")


def usable_jobs() -> int:
    """Processes that this machine can run side by side."""
    return len(os.sched_getaffinity(0))


def spread(
    work: Callable[..., Answer], tasks: Sequence[tuple[Any, ...]], jobs: int | None = None
) -> Iterator[tuple[int, Answer]]:
    """``work(*task)`` of every task in up to ``jobs`` fresh processes: each one's place and answer, as they end.

    ``work`` is a function of a module, and tasks and answers can be pickled. What one raises is raised here. When
    the caller stops early, Ctrl-C included, tasks that run are waited for and the others never begin. Raises
    HarliError when a process dies.
    """
    jobs = min(jobs or usable_jobs(), len(tasks))
    if jobs <= 1:
        for place, task in enumerate(tasks):
            yield place, work(*task)
        return
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_ignore_interrupts)
    try:
        places = {pool.submit(work, *task): place for place, task in enumerate(tasks)}
        for done in as_completed(places):
            yield places.pop(done), done.result()
    except BrokenProcessPool:
        raise HarliError(
            "a simulating process died, probably for lack of memory; try again with fewer --jobs"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches every process of the terminal; the one that started these ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
