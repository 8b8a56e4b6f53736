"""The database of files, jobs and events."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import product
from pathlib import Path

import pytest

from harli.rows import UpdateRecord
from harli.serve.jobs import ENDED, NEXT, Extension, Job, JobError, JobRequest, Status
from harli.serve.rows import File
from harli.serve.store import StateError, Store
from harli.types import HarliError


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "jobs.sqlite")
    yield store
    store.close()


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
        job = store.next_job()
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


def test_a_database_of_the_first_version_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite"
    Store(path).close()
    with closing(sqlite3.connect(path)) as connection:
        for column in ("turn_began", "deaths"):
            connection.execute(f"ALTER TABLE jobs DROP COLUMN {column}")
        connection.execute("PRAGMA user_version = 1")
    with closing(Store(path)) as store:
        job = add(store, "a", status=Status.RUNNING)
        store.note_death("a")
        assert (job.deaths, store.job("a").deaths) == (0, 1)


def test_it_knows_which_models_its_unfinished_jobs_and_served_adapters_are_for(store: Store) -> None:
    for name, model in (("a", "old"), ("b", "gone"), ("c", "new")):
        store.add_job(name, JobRequest(model=model, training_file="f"))
    store.move("a", Status.QUEUED)
    store.move("a", Status.RUNNING)
    store.move("a", Status.SUCCEEDED, model="ft:old")
    store.move("b", Status.CANCELLED)
    assert store.base_models() == {"old", "new"}
