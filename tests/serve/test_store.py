"""The database of files, jobs and events."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from harli.rows import UpdateRecord
from harli.serve import store as store_module
from harli.serve.jobs import ENDED, NEXT, Extension, Job, JobError, JobRequest, Status
from harli.serve.objects import File
from harli.serve.store import StateError, Store
from harli.types import HarliError


def add(store: Store, name: str, priority: int = 0, status: Status = Status.QUEUED) -> Job:
    """A job that has gone the shortest way to ``status``."""
    job = store.add_job(name, JobRequest(model="tiny", training_file="f", harli=Extension(priority=priority)))
    ways = {Status.VALIDATING: [], Status.QUEUED: [Status.QUEUED]}
    for step in ways.get(status) or [Status.QUEUED, Status.RUNNING, status][: 2 if status is Status.RUNNING else 3]:
        if status is not Status.VALIDATING:
            store.move(job.id, step)
    return store.job(name)


def update(number: int, tokens: int = 100) -> UpdateRecord:
    return UpdateRecord(number, float(number), 1.0 / (number + 1), tokens, 1e-3)


@pytest.mark.parametrize(("before", "after"), product(Status, Status))
def test_a_job_goes_only_where_the_table_says(store: Store, before: Status, after: Status) -> None:
    job = add(store, "a", status=before)
    assert job.status is before
    if after in NEXT[before]:
        store.move("a", after)
        assert store.job("a").status is after
        assert (store.job("a").finished_at is not None) == (after in ENDED)
    else:
        with pytest.raises(StateError, match=f"is {before} and cannot become {after}"):
            store.move("a", after)
        assert store.job("a").status is before


def test_what_is_written_is_there_after_a_restart(store: Store, tmp_path: Path) -> None:
    store.add_file(File("file-1", "data.jsonl", 12, 1_700_000_000))
    add(store, "a", priority=3, status=Status.RUNNING)
    store.add_updates("a", [update(0), update(1)])
    store.move("a", Status.FAILED, JobError(code="x", message="no luck"))
    store.close()
    again = Store(tmp_path / "jobs.sqlite")
    job = again.job("a")
    assert (job.status, job.updates_done, job.trained_tokens) == (Status.FAILED, 2, 200)
    assert job.error == JobError(code="x", message="no luck")
    assert job.request.harli.priority == 3
    assert again.file("file-1") == File("file-1", "data.jsonl", 12, 1_700_000_000)
    assert again.events("a", None, 1)[0].message == "no luck"
    again.close()


def test_jobs_of_a_higher_priority_come_first_and_equals_take_turns(store: Store) -> None:
    for name, priority in (("low", -1), ("a", 0), ("b", 0), ("high", 5)):
        add(store, name, priority)
    order = []
    for _ in range(5):
        job = next(store.queue(), None)
        assert job is not None
        order.append(job.id)
        store.take_turn(job.id)
        store.move(job.id, Status.CANCELLED if job.id == "high" else Status.QUEUED)
    assert order == ["high", "a", "b", "a", "b"]


def test_an_update_that_is_done_again_is_counted_once(store: Store) -> None:
    add(store, "a", status=Status.RUNNING)
    store.add_updates("a", [update(0), update(1), update(2)])
    store.add_updates("a", [update(1), update(2), update(3)])
    assert (store.job("a").updates_done, store.job("a").trained_tokens) == (4, 400)


def test_pages_go_from_new_to_old_without_gaps(store: Store) -> None:
    for number in range(5):
        add(store, f"job-{number}", status=Status.VALIDATING)
    first = store.jobs(None, 2)
    second = store.jobs(first[-1].id, 10)
    assert [job.id for job in first + second] == [f"job-{number}" for number in (4, 3, 2, 1, 0)]
    events = store.events("job-0", None, 10)
    assert [event.message for event in events] == ["job created"]
    assert store.events("job-0", events[-1].id, 10) == []


def test_only_one_server_may_use_a_database(store: Store, tmp_path: Path) -> None:
    with pytest.raises(HarliError, match="is another server using it"):
        Store(tmp_path / "jobs.sqlite")


def test_a_database_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    before = path.read_bytes()
    with pytest.raises(HarliError, match="newer Harli"):
        Store(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    path.write_text("not a database at all, but long enough to be taken for one by its first bytes" * 20)
    with pytest.raises(HarliError, match=r"cannot open .*jobs\.sqlite"):
        Store(path)


def test_it_knows_which_models_its_unfinished_jobs_and_served_adapters_are_for(store: Store) -> None:
    for name, model in (("a", "old"), ("b", "gone"), ("c", "new")):
        store.add_job(name, JobRequest(model=model, training_file="f"))
    store.move("a", Status.QUEUED)
    store.move("a", Status.RUNNING)
    store.move("a", Status.SUCCEEDED, model="ft:old")
    store.move("b", Status.CANCELLED)
    assert store.base_models() == {"old", "new"}


@pytest.mark.parametrize(
    ("refused", "write"),
    [
        ("INSERT INTO events", lambda store: add(store, "b")),
        ("UPDATE jobs SET turn", lambda store: store.take_turn("a")),
    ],
)
def test_what_the_disk_refuses_in_part_is_not_done_at_all(
    store: Store, monkeypatch: pytest.MonkeyPatch, refused: str, write: Callable[[Store], Any]
) -> None:
    before = add(store, "a")
    run = store.run

    def refuse(statement: str, *values: Any) -> sqlite3.Cursor:
        if statement.startswith(refused):
            raise sqlite3.OperationalError("database or disk is full")
        return run(statement, *values)

    monkeypatch.setattr(store, "run", refuse)
    with pytest.raises(sqlite3.OperationalError):
        write(store)
    assert store.jobs(None, 10) == [before]


def test_what_a_client_is_told_of_waits_for_the_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    levels, run = [], store.run

    def watch(statement: str, *values: Any) -> sqlite3.Cursor:
        if statement == "COMMIT":
            levels.append(run("PRAGMA synchronous").fetchone()[0])
        return run(statement, *values)

    monkeypatch.setattr(store, "run", watch)
    normal, full = 1, 2
    store.add_file(File("file-1", "data.jsonl", 12, 1_700_000_000))
    store.delete_file("file-1")
    add(store, "a", status=Status.RUNNING)
    store.add_updates("a", [update(0)])
    store.move("a", Status.FAILED)
    assert levels == [full, full, full, normal, normal, normal, full]


def test_a_start_drops_old_losses_of_ended_jobs(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        add(store, name, status=Status.RUNNING)
        store.add_updates(name, [update(number) for number in range(6)])
    store.move("a", Status.CANCELLED)
    store.close()
    monkeypatch.setattr(store_module, "EVENTS_KEPT", 3)
    with closing(Store(tmp_path / "jobs.sqlite")) as again:
        kept = [event.message.split(":")[0] for event in again.events("a", None, 100)]
        assert kept == ["job cancelled", "update 6", "update 5", "job running", "job queued", "job created"]
        assert len(again.events("b", None, 100)) == 9


def test_a_place_in_the_list_of_files_outlives_the_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "DELETED_KNOWN", 1)
    for number in range(5):
        store.add_file(File(f"file-{number}", "data.jsonl", 12, 1_700_000_000))
    store.delete_file("file-1")
    store.delete_file("file-3")
    assert [file.id for file in store.files("file-3", 10)] == ["file-2", "file-0"]
    assert [file.id for file in store.files("file-3", 10, oldest_first=True)] == ["file-4"]
    with pytest.raises(KeyError):
        store.files("file-1", 10)


def test_jobs_are_found_by_all_of_the_metadata_asked_for(store: Store) -> None:
    odd = 'a.b"c'
    for name, metadata in (("a", None), ("b", {"who": "me"}), ("c", {"who": "me", odd: "1"}), ("d", {odd: "me"})):
        store.add_job(name, JobRequest(model="tiny", training_file="f", metadata=metadata))

    def found(**wanted: str) -> list[str]:
        return [job.id for job in store.jobs(None, 10, wanted)]

    assert found() == ["d", "c", "b", "a"]
    assert found(who="me") == ["c", "b"]
    assert found(**{"who": "me", odd: "1"}) == ["c"]
    assert found(who="1") == []
