"""What an operator sees and changes while the server runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from harli.records.reader import Record, read_record
from tests.serve.server_process import KEY, Server, sums
from tests.serve.test_server import MANY, complete_text, create, updates, upload

pytestmark = pytest.mark.slow

HEADERS = {"Authorization": f"Bearer {KEY}"}
GENEROUS = {"itl_ms": 60_000.0, "tpot_ms": 60_000.0}
IMPOSSIBLE = {"itl_ms": 0.001}


def get(server: Server) -> Any:
    return httpx.get(f"{server.url}/harli/state", headers=HEADERS).json()


def put(server: Server, what: str, body: dict[str, Any]) -> Any:
    answer = httpx.put(f"{server.url}/harli/{what}", headers=HEADERS, json=body, timeout=None)
    answer.raise_for_status()
    return answer.json()


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.1)


def metric(server: Server, name: str) -> float:
    """The value of a metric, its labels included in ``name``."""
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.rpartition(" ")[2])
    raise KeyError(name)


@contextmanager
def requests(server: Server) -> Iterator[None]:
    """One request after the other, while inside."""
    end = threading.Event()

    def keep_asking() -> None:
        while not end.is_set():
            complete_text(server, "tiny", tokens=32)

    thread = threading.Thread(target=keep_asking)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


@pytest.fixture(scope="module")
def job(server: Server) -> Iterator[str]:
    """One that runs all the time."""
    job = create(server, upload(server, sums(20)), MANY)
    until(lambda: updates(server.client.fine_tuning.jobs.retrieve(job)) > 0)
    yield job
    put(server, "slo", {})
    put(server, "finetuning", {"enabled": True})
    server.client.fine_tuning.jobs.cancel(job)


def done(server: Server, job: str) -> int:
    return updates(server.client.fine_tuning.jobs.retrieve(job))


def test_finetuning_is_switched_off_and_on_without_losing_the_job(server: Server, job: str) -> None:
    state = put(server, "finetuning", {"enabled": False})
    assert state["finetuning"]["enabled"] is False
    assert (state["finetuning"]["state"], state["finetuning"]["job"]) == ("switched off", job)
    time.sleep(0.5)  # an update that was committed meanwhile is counted by now
    before = done(server, job)
    assert complete_text(server, "tiny", tokens=4)
    time.sleep(1.5)
    assert done(server, job) == before
    health = httpx.get(f"{server.url}/harli/health")
    assert (health.status_code, health.json()) == (200, {"decode": "ok", "finetuning": "switched off"})
    assert metric(server, "harli_finetuning_enabled") == 0.0
    put(server, "finetuning", {"enabled": True})
    until(lambda: done(server, job) > before)
    assert server.client.fine_tuning.jobs.retrieve(job).status == "running"


def test_metrics_follow_what_is_served_and_trained(server: Server, job: str) -> None:
    put(server, "slo", GENEROUS)
    names = ["harli_finetune_tokens_total", "harli_finetune_updates_total", "harli_decision_seconds_count"]
    names += ['harli_slo_asked_total{objective="itl"}', 'harli_slo_attained_total{objective="itl"}']
    before = {name: metric(server, name) for name in names}
    complete_text(server, "tiny", tokens=33)
    until(lambda: metric(server, names[-1]) - before[names[-1]] >= 32)
    rise = {name: metric(server, name) - before[name] for name in names}
    assert rise[names[3]] == rise[names[4]] == 32
    assert rise[names[2]] >= 33
    until(lambda: metric(server, names[0]) > before[names[0]] and metric(server, names[1]) > before[names[1]])
    assert metric(server, 'harli_slo_seconds{objective="tpot"}') == 60.0
    assert metric(server, 'harli_slo_attainment_ratio{objective="tpot"}') == 1.0
    assert get(server)["attainment"] == {"itl": 1.0, "tpot": 1.0}


def test_the_breaker_opens_when_decode_misses_its_objective_beside_a_job(server: Server, job: str) -> None:
    assert put(server, "slo", IMPOSSIBLE)["slo"] == {"itl_ms": 0.001, "tpot_ms": None}
    with requests(server):
        until(lambda: get(server)["breaker"]["open"])
    state = get(server)
    assert state["finetuning"]["state"] == "breaker open"
    assert state["breaker"]["retry_s"] > 0.0
    assert state["breaker"]["reason"] in [event.message for event in server.client.fine_tuning.jobs.list_events(job)]
    assert httpx.get(f"{server.url}/harli/health").status_code == 200
    until(lambda: metric(server, "harli_breaker_open") == 1.0)
    before = done(server, job)
    put(server, "slo", GENEROUS)  # closes it
    until(lambda: done(server, job) > before)
    assert get(server)["breaker"]["open"] is False


def test_what_was_served_under_one_objective_is_a_record_of_its_own(server: Server, job: str) -> None:
    complete_text(server, "tiny", tokens=8)
    until(lambda: get(server)["share"] == "idle")
    put(server, "slo", {"tpot_ms": 500.0})

    def finished() -> list[Record]:
        found = [read_record(folder) for folder in sorted((server.state / "records").iterdir())]
        return [record for record in found if record.info.status == "finished"]

    def objectives() -> list[tuple[float | None, float | None]]:
        return [(record.info.slo.itl_ms, record.info.slo.tpot_ms) for record in finished()]

    until(lambda: objectives()[-2:] == [(0.001, None), (60_000.0, 60_000.0)])  # written beside the server
    records = finished()
    assert {record.info.role for record in records} == {"mixed"}
    assert all(len(record.steps) for record in records)
    assert sum(len(record.updates) for record in records) > 0
    assert records[-1].steps["time_s"][0].as_py() == 0.0


@pytest.mark.parametrize(
    ("what", "body"),
    [("slo", {"itl_ms": -1.0}), ("slo", {"ttft_ms": 1.0}), ("finetuning", {}), ("finetuning", {"enabled": "often"})],
)
def test_nonsense_is_refused(server: Server, what: str, body: dict[str, Any]) -> None:
    before = get(server)["slo"]
    assert httpx.put(f"{server.url}/harli/{what}", headers=HEADERS, json=body).status_code in (400, 422)
    assert get(server)["slo"] == before


@pytest.mark.parametrize(("method", "path"), [("GET", "state"), ("PUT", "finetuning"), ("PUT", "slo")])
def test_only_a_key_operates(server: Server, method: str, path: str) -> None:
    answer = httpx.request(method, f"{server.url}/harli/{path}", json={"enabled": False})
    assert answer.status_code == 401
