"""Work beside the hot path."""

from __future__ import annotations

import gc
import threading

import pytest

from policies.background import Background


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "harli-policy"}


def wait_for(work: Background[int, float]) -> None:
    while work.answer is None:
        pass


def test_inline_answers_at_once() -> None:
    before = threads()
    work: Background[int, int] = Background(lambda question: question + 1, threaded=False)
    assert work.answer is None
    assert work.ask(1)
    assert work.answer == 2
    assert work.ask(5)
    assert work.answer == 6
    assert threads() <= before


def test_one_question_at_a_time_and_the_asker_does_not_wait() -> None:
    go, done = threading.Event(), threading.Event()

    def slow(question: int) -> int:
        assert go.wait(30.0)
        done.set()
        return question

    work = Background(slow, threaded=True)
    assert work.ask(1)
    assert not work.ask(2)
    assert work.answer is None
    go.set()
    assert done.wait(30.0)
    while not work.ask(3):
        pass
    while work.answer != 3:
        pass


def test_the_thread_ends_with_its_owner() -> None:
    work: Background[int, int] = Background(abs, threaded=True)
    before = threads()
    work.ask(-1)
    while work.answer is None:
        pass
    (thread,) = threads() - before
    assert thread.daemon
    del work
    gc.collect()
    thread.join(30.0)
    assert not thread.is_alive()


@pytest.mark.parametrize("threaded", [False, True])
def test_an_exception_reaches_the_asker(threaded: bool) -> None:
    work: Background[int, float] = Background(lambda question: 1 / question, threaded)
    work.ask(0)
    with pytest.raises(ZeroDivisionError):
        wait_for(work)
