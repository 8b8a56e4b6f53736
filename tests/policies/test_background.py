"""Work beside the hot path."""

from __future__ import annotations

import gc
import threading

import pytest

from policies.background import Background


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "harli-policy"}


def test_inline_works_at_its_own_times() -> None:
    before, answers = threads(), iter([1, None, 3])
    work: Background[int] = Background(lambda: next(answers), 1.0, threaded=False)
    assert [work.step(now_s) for now_s in (10.0, 10.9, 11.0, 11.5, 12.1)] == [1, 1, 1, 1, 3]
    assert threads() <= before


def test_the_caller_does_not_wait_for_the_thread() -> None:
    go = threading.Event()

    def slow() -> int:
        assert go.wait(30.0)
        return 7

    work = Background(slow, 0.001, threaded=True)
    assert work.step(0.0) is None
    assert work.step(5.0) is None
    go.set()
    while work.step(6.0) != 7:
        pass


def test_the_thread_works_again_and_ends_with_its_owner() -> None:
    before, counts = threads(), iter(range(1, 1_000_000))
    work: Background[int] = Background(lambda: next(counts), 0.001, threaded=True)
    while (work.step(0.0) or 0) < 3:
        pass
    (thread,) = threads() - before
    assert thread.daemon
    del work
    gc.collect()
    thread.join(30.0)
    assert not thread.is_alive()


@pytest.mark.parametrize("threaded", [False, True])
def test_an_exception_reaches_the_caller(threaded: bool) -> None:
    work: Background[float] = Background(lambda: 1 / 0, 1.0, threaded)

    def until_it_raises() -> None:
        while True:
            work.step(0.0)

    with pytest.raises(ZeroDivisionError):
        until_it_raises()
