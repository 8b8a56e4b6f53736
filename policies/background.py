"""Slow work beside a policy's hot path: one question at a time, the latest answer at hand."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Background(Generic[Question, Answer]):
    """Answers questions with ``work``, in a daemon thread of its own or, for determinism, while the asker waits.

    The thread starts with the first question and ends when this object is collected. ``work`` must not refer to it.
    """

    def __init__(self, work: Callable[[Question], Answer], threaded: bool) -> None:
        self._box = _Box(work)
        self._threaded = threaded
        self._started = False

    def ask(self, question: Question) -> bool:
        """Have ``question`` answered; False if the one before is not answered yet. Takes a few microseconds."""
        box = self._box
        if box.busy:
            return False
        box.busy = True
        if not self._threaded:
            box.answer_to(question)
            return True
        if not self._started:
            self._started = True
            threading.Thread(target=box.serve, name="harli-policy", daemon=True).start()
            weakref.finalize(self, box.questions.put, None)
        box.questions.put((question,))
        return True

    @property
    def answer(self) -> Answer | None:
        """The latest answer, None before the first. Raises what the work has raised."""
        if self._box.error is not None:
            raise self._box.error
        return self._box.answer


class _Box(Generic[Question, Answer]):
    """What the thread may hold on to while the owner goes."""

    def __init__(self, work: Callable[[Question], Answer]) -> None:
        self.questions: SimpleQueue[tuple[Question] | None] = SimpleQueue()
        self.answer: Answer | None = None
        self.error: Exception | None = None
        self.busy = False
        self._work = work

    def serve(self) -> None:
        while (question := self.questions.get()) is not None:
            self.answer_to(question[0])

    def answer_to(self, question: Question) -> None:
        try:
            self.answer = self._work(question)
        except Exception as error:
            self.error = error
        self.busy = False
