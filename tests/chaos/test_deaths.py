"""The engine's or the server's process dies under load: one start later requests are answered and jobs go on.

The tests follow one another on the same three jobs.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

import pytest

from harli import crashes
from harli.serve.jobs import Status
from harli.serve.store import Store
from tests.chaos.harness import STREAMS, Load, all_answered, events, fault, goes_on, saved, steps, training_job, until
from tests.serve.server_process import Server, sums
from tests.serve.test_server import FEW, MANY, PROMPT, complete_text, create, ended, updates, upload, wait_for

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

CHECKPOINT_EVERY = 2
DIED = "harli: the engine process died; start the server again, and jobs go on from their checkpoints"


class Jobs(NamedTuple):
    finished: str
    model: str
    """The finished job's, and an answer of it."""
    answer: str
    first: str
    second: str
    """Waits until the first has ended."""


@pytest.fixture(scope="module")
def jobs(process: Server) -> Iterator[Jobs]:
    file = upload(process, sums(40))
    finished = wait_for(process, create(process, file, FEW), ended)
    assert finished.status == "succeeded", finished
    answer = complete_text(process, finished.fine_tuned_model)
    first = training_job(process, extra_body={"harli": {"priority": 1}})
    yield Jobs(finished.id, finished.fine_tuned_model, answer, first, create(process, file, MANY))
    crashes.forget(first)


def goes_on_after_a_restart(server: Server, jobs: Jobs, job: str) -> None:
    """One start, and requests are answered; ``job`` goes on from its checkpoint, and the finished one is served."""
    last = saved(server, job)[-1]
    server.start()
    with all_answered(server):
        goes_on(server, job)
        assert complete_text(server, jobs.model) == jobs.answer
    made = steps(server, job)
    again = len(made) - 1 - made[::-1].index(last + 1)  # it may have got further once before
    assert made[again:] == list(range(last + 1, last + 1 + len(made) - again))
    assert max(made[:again], default=last) <= last + CHECKPOINT_EVERY
    assert steps(server, jobs.finished) == list(range(1, len(steps(server, jobs.finished)) + 1))  # never run again


def test_after_a_segfault_in_a_unit_one_start_brings_everything_back(server: Server, jobs: Jobs) -> None:
    until(lambda: saved(server, jobs.first))
    with Load(server) as load:
        load.more(2 * STREAMS)
        with fault(server, "segfault"):
            assert server.wait() == 2
    assert load.wrong == []  # no client takes half an answer for a whole one
    assert server.log.count(DIED) == 1
    goes_on_after_a_restart(server, jobs, jobs.first)
    messages = [event.message for event in events(server, jobs.first)]
    assert messages.count("the engine process died while the job was running") == 1


def test_after_a_second_death_the_job_is_quarantined_and_the_next_one_trains(server: Server, jobs: Jobs) -> None:
    with Load(server) as load:
        load.more(2 * STREAMS)
        goes_on(server, jobs.first)
        os.kill(server.engine.pid, signal.SIGKILL)  # as the kernel does when memory has run out
        assert server.wait() == 2
    assert load.wrong == []
    server.start()
    with all_answered(server):
        failed = wait_for(server, jobs.first, ended)
        assert (failed.status, failed.error.code) == ("failed", "quarantined")
        assert failed.error.message == "the engine process died twice while the job was running"
        goes_on(server, jobs.second)


def test_after_the_server_is_killed_one_start_brings_everything_back(server: Server, jobs: Jobs) -> None:
    until(lambda: saved(server, jobs.second))
    engine = server.engine
    with Load(server) as load:
        load.more(2 * STREAMS)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
    assert load.wrong == []
    until(lambda: not engine.is_running())
    goes_on_after_a_restart(server, jobs, jobs.second)
    assert any("interrupted" in event.message for event in events(server, jobs.second))


def test_a_server_that_is_told_to_end_answers_what_is_in_flight_and_saves_the_job(server: Server, jobs: Jobs) -> None:
    goes_on(server, jobs.second)
    ask = server.client.completions.create
    streams = [
        iter(ask(model="tiny", prompt=PROMPT, max_tokens=200, stream=True, extra_body={"ignore_eos": True}))
        for _ in range(STREAMS)
    ]
    for stream in streams:
        next(stream)
    done = updates(server.client.fine_tuning.jobs.retrieve(jobs.second))
    server.process.send_signal(signal.SIGTERM)
    assert [list(stream)[-1].choices[0].finish_reason for stream in streams] == ["length"] * STREAMS
    assert server.wait() == 0
    assert saved(server, jobs.second)[-1] >= done
    with closing(Store(server.state / "jobs.sqlite")) as store:
        assert store.job(jobs.second).status is Status.QUEUED
