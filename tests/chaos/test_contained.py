"""Faults in a job that its engine survives: requests do not notice, the job says what happened, the next one trains."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest
from safetensors.torch import load_file

from harli.finetune.checkpoint import WEIGHTS, complete
from harli.runtime.session import STALL_S
from tests.chaos.harness import all_answered, events, fault, goes_on, saved, training_job, until
from tests.serve.server_process import KEY, Server, sums
from tests.serve.test_server import ended, wait_for

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

HEADERS = {"Authorization": f"Bearer {KEY}"}


@contextmanager
def small_files_only(process: psutil.Process) -> Iterator[None]:
    """Inside, the kernel refuses what ``process`` writes beyond the first KiB of a file, as a full disk would."""
    before = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (1024, before[1]))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raising", "RuntimeError: injected"),
        ("ending_the_thread", "SystemExit"),
        ("not_finite", "NonFiniteLoss: the loss became nan"),
        ("out_of_memory", "MemoryError"),
        ("allocating_too_much", "can't allocate memory"),
        ("stalling", "a unit has been running for more than"),
    ],
)
def test_a_unit_that_fails_fails_its_job_and_nothing_else(server: Server, name: str, reason: str) -> None:
    with all_answered(server) as load:
        job = training_job(server)
        until(lambda: saved(server, job))
        with fault(server, name):
            until(lambda: any(reason in event.message for event in events(server, job)))
            load.more(2)
        failed = wait_for(server, job, ended)
        assert (failed.status, failed.error.code, failed.fine_tuned_model) == ("failed", "training_failed", None)
        assert reason in failed.error.message
        assert "\n" not in failed.error.message
        weights = load_file(complete(server.state / "jobs" / job / "checkpoints")[-1] / WEIGHTS)
        assert all(tensor.isfinite().all() for tensor in weights.values())
        following = training_job(server)
        server.client.fine_tuning.jobs.cancel(following)


def test_a_unit_that_holds_the_interpreter_delays_requests_and_its_job_goes_on(server: Server) -> None:
    with all_answered(server) as load:
        job = training_job(server)
        with fault(server, "holding_the_interpreter") as file:
            until(lambda: not file.exists())
        goes_on(server, job)
    assert max(load.answers_s) > 3.0  # nothing in the process can prevent that
    server.client.fine_tuning.jobs.cancel(job)


def test_an_engine_that_is_paused_delays_requests_and_its_job_goes_on(server: Server) -> None:
    """As when its machine moves: the unit that runs has not stalled, however long ago it began."""
    with all_answered(server) as load:
        job = training_job(server)
        server.engine.suspend()
        time.sleep(1.4 * STALL_S)
        server.engine.resume()
        goes_on(server, job)
    assert max(load.answers_s) > STALL_S
    server.client.fine_tuning.jobs.cancel(job)


def test_a_disk_that_refuses_checkpoints_stops_neither_job_nor_requests(server: Server) -> None:
    with all_answered(server):
        job = training_job(server)
        until(lambda: saved(server, job))
        with small_files_only(server.engine):
            until(lambda: any("checkpoint not saved" in event.message for event in events(server, job)))
            before = saved(server, job)
            goes_on(server, job)
            assert saved(server, job) == before
        until(lambda: saved(server, job)[-1] > before[-1])
        goes_on(server, job)
    server.client.fine_tuning.jobs.cancel(job)


def test_a_disk_that_refuses_the_database_loses_no_job(server: Server) -> None:
    def post(path: str, **options: Any) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/{path}", headers=HEADERS, timeout=None, **options)

    with all_answered(server):
        job = training_job(server)
        file = server.client.fine_tuning.jobs.retrieve(job).training_file
        before = [job.id for job in server.client.fine_tuning.jobs.list(limit=100)]
        with small_files_only(psutil.Process(server.process.pid)):
            until(lambda: "jobs go on in" in server.log)
            assert post("fine_tuning/jobs", json={"model": "tiny", "training_file": file}).status_code == 500
            answer = post("files", files={"file": ("data.jsonl", sums(2000))}, data={"purpose": "fine-tune"})
            assert answer.status_code == 400
            assert answer.json()["error"]["message"] == "the file cannot be kept: File too large"
        goes_on(server, job)
        assert [job.id for job in server.client.fine_tuning.jobs.list(limit=100)] == before
    server.client.fine_tuning.jobs.cancel(job)


@pytest.mark.parametrize("name", ["clock_forward", "clock_back"])
def test_a_wall_clock_that_jumps_by_a_day_stops_nothing(server: Server, name: str) -> None:
    def now() -> int:
        return server.client.completions.create(model="tiny", prompt="hello", max_tokens=1).created

    with all_answered(server) as load:
        job = training_job(server)
        before = now()
        with fault(server, name):
            assert abs(now() - before) > 80_000
            load.more(10)
            goes_on(server, job, 10)
            health = httpx.get(f"{server.url}/harli/health")
            assert (health.status_code, health.json()) == (200, {"decode": "ok", "finetuning": "training"})
        goes_on(server, job)
    server.client.fine_tuning.jobs.cancel(job)
