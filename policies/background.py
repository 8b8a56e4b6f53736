"""Slow work beside a policy's hot path: done again and again, the latest answer at hand."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class Background(Generic[Answer]):
    """Does ``work`` every so often, in a daemon thread of its own or, for determinism, while ``step`` waits.

    ``work`` returns None to keep the answer of before, and must not refer to the owner of this object: the
    thread, which begins with the first step, ends when this object is collected.
    """

    def __init__(self, work: Callable[[], Answer | None], every_s: float, threaded: bool) -> None:
        self._box = _Box(work)
        self._every_s = every_s
        self._threaded = threaded
        self._next_s = float("-inf")

    def step(self, now_s: float) -> Answer | None:
        """The latest answer, None before the first; ``now_s`` is the step's own time. Raises what the work raised."""
        box = self._box
        if now_s >= self._next_s:
            if self._threaded:
                self._next_s = float("inf")
                threading.Thread(target=box.serve, args=(self._every_s,), name="harli-policy", daemon=True).start()
                weakref.finalize(self, box.ended.set)
            else:
                self._next_s = now_s + self._every_s
                box.work_once()
        if box.error is not None:
            raise box.error
        return box.answer


class _Box(Generic[Answer]):
    """What the thread may hold on to while the owner goes."""

    def __init__(self, work: Callable[[], Answer | None]) -> None:
        self.answer: Answer | None = None
        self.error: Exception | None = None
        self.ended = threading.Event()
        self._work = work

    def serve(self, every_s: float) -> None:
        self.work_once()
        while self.error is None and not self.ended.wait(every_s):
            self.work_once()

    def work_once(self) -> None:
        try:
            answer = self._work()
        except Exception as error:
            self.error = error
            return
        if answer is not None:
            self.answer = answer
