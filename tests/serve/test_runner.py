"""What the runner does around turns: validation, going live, and what a start finds."""

from __future__ import annotations

import asyncio
import errno
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harli.config import FinetuneSettings
from harli.finetune.trainer import ADAPTER
from harli.serve.adapters import model_name
from harli.serve.files import FileFolder
from harli.serve.jobs import JobRequest, Status
from harli.serve.objects import File
from harli.serve.runner import RETRY_S, JobRunner
from harli.serve.server import _running
from harli.serve.store import Store
from tests.serve.stand_ins import LoraEngine, adapters_of, write_adapter

GOOD = {"complete": True, "saved": True, "held_out": (2.0, 1.0)}


class Planner:
    """Does what it is told in place of planning."""

    def __init__(self) -> None:
        self.calls = 0
        self.work: Callable[[], None] = lambda: None

    def plan(self, request: JobRequest, training: Path, validation: Path | None, folder: Path) -> FinetuneSettings:
        folder.mkdir(parents=True, exist_ok=True)
        self.calls += 1
        self.work()
        return FinetuneSettings()


class Around:
    """A runner and what it works with."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "jobs.sqlite")
        self.store.add_file(File("file-1", "data.jsonl", 1, 0))
        self.planner = Planner()
        self.engine = LoraEngine()
        self.adapters, self.served = adapters_of(self.engine)
        self.folder = folder / "jobs"
        self.held_back = False
        files = FileFolder(folder / "files", self.store)
        engine, planner, held_back = self.engine, self.planner, lambda: self.held_back
        arguments: Any = (engine, self.store, files, planner, self.adapters, self.folder, 1.0, held_back, print)
        self.runner = JobRunner(*arguments)

    def add(self, name: str, *way: Status, model: str | None = None) -> None:
        """A job that has gone this way, with a folder."""
        self.store.add_job(name, JobRequest(model="tiny", training_file="file-1"))
        for status in way:
            self.store.move(name, status, model=model if status is Status.SUCCEEDED else None)
        write_adapter(self.folder / name / ADAPTER)

    def status(self, name: str) -> Status:
        return self.store.job(name).status


@pytest.fixture
def around(tmp_path: Path) -> Iterator[Around]:
    around = Around(tmp_path)
    yield around
    around.store.close()


def refusing(method: Callable[..., None], *refused: Any) -> Callable[..., None]:
    """``method`` of a store whose disk is full when it is called with ``refused``."""

    def called(*args: Any, **more: Any) -> None:
        if set(refused) <= set(args):
            raise sqlite3.OperationalError("database or disk is full")
        method(*args, **more)

    return called


def test_an_adapter_whose_success_cannot_be_noted_is_served_the_next_time(
    around: Around, monkeypatch: pytest.MonkeyPatch
) -> None:
    around.add("a", Status.QUEUED, Status.RUNNING)
    job = around.store.job("a")

    async def twice() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(around.store, "move", refusing(around.store.move, Status.SUCCEEDED))
            with pytest.raises(sqlite3.OperationalError):
                await around.runner._conclude(job, GOOD)
        assert (around.status("a"), list(around.served)) == (Status.RUNNING, [])
        await around.runner._conclude(job, GOOD)

    asyncio.run(twice())
    assert (around.status("a"), list(around.served)) == (Status.SUCCEEDED, [model_name(job)])


def test_a_job_that_is_cancelled_while_its_adapter_is_loaded_is_not_served(around: Around) -> None:
    around.add("a", Status.QUEUED, Status.RUNNING)
    job = around.store.job("a")

    async def add_lora(request: Any) -> bool:
        around.store.move("a", Status.CANCELLED)
        return True

    around.engine.add_lora = add_lora  # type: ignore[method-assign]
    asyncio.run(around.runner._conclude(job, GOOD))
    assert (around.status("a"), list(around.served)) == (Status.CANCELLED, [])


def test_while_a_jobs_files_are_read_a_death_is_noted(around: Around) -> None:
    around.add("a")
    reading, read = threading.Event(), threading.Event()

    def work() -> None:
        reading.set()
        read.wait()

    around.planner.work = work

    async def validate() -> None:
        task = asyncio.create_task(around.runner._validate_next())
        await asyncio.to_thread(reading.wait)
        deaths = around.store.job("a").deaths
        read.set()
        await task
        assert deaths == 1

    asyncio.run(validate())
    assert (around.status("a"), around.store.job("a").deaths) == (Status.QUEUED, 0)


def test_a_job_whose_files_killed_the_server_twice_is_quarantined(around: Around) -> None:
    around.add("a")
    for _ in range(2):
        around.store.note_death("a")
    asyncio.run(around.runner._validate_next())
    failed = around.store.job("a")
    assert failed.error is not None
    assert (failed.status, failed.error.code, around.planner.calls) == (Status.FAILED, "quarantined", 0)
    assert not (around.folder / "a").exists()


def test_a_full_disk_is_no_death(around: Around, monkeypatch: pytest.MonkeyPatch) -> None:
    around.add("a")
    with monkeypatch.context() as patch:
        patch.setattr(around.store, "forgive_death", refusing(around.store.forgive_death, "a"))
        for _ in range(3):
            with pytest.raises(sqlite3.OperationalError):
                asyncio.run(around.runner._validate_next())
    asyncio.run(around.runner._validate_next())
    assert (around.status("a"), around.store.job("a").deaths) == (Status.QUEUED, 0)


def test_files_that_cannot_be_read_now_are_read_later(around: Around) -> None:
    around.add("a")

    def work() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    around.planner.work = work
    with pytest.raises(OSError, match="Too many open files"):
        asyncio.run(around.runner._validate_next())
    assert (around.status("a"), around.store.job("a").deaths) == (Status.VALIDATING, 0)


def test_what_cannot_be_read_now_keeps_no_other_job_waiting(around: Around, monkeypatch: pytest.MonkeyPatch) -> None:
    around.add("a")
    around.add("b")

    def work() -> None:
        if around.planner.calls != 2:
            raise OSError(errno.EIO, "Input/output error")

    around.planner.work = work
    with pytest.raises(OSError, match="Input/output error"):
        asyncio.run(around.runner._validate_next())
    for _ in range(3):
        asyncio.run(around.runner._validate_next())
    assert (around.status("a"), around.status("b"), around.planner.calls) == (Status.VALIDATING, Status.QUEUED, 2)
    later = time.monotonic() + RETRY_S
    monkeypatch.setattr("harli.serve.runner.time.monotonic", lambda: later)
    with pytest.raises(OSError, match="Input/output error"):
        asyncio.run(around.runner._validate_next())
    later += 1.9 * RETRY_S  # twice as long this time
    asyncio.run(around.runner._validate_next())
    assert around.planner.calls == 3


def test_a_job_that_cannot_begin_lets_a_lesser_one_have_its_turn(around: Around) -> None:
    around.add("a", Status.QUEUED)
    around.add("b", Status.QUEUED)
    with pytest.raises(OSError, match="no room"), around.runner._postponing(around.store.job("a")):
        raise OSError("no room")
    following = around.runner._next_job()
    assert following is not None
    assert following.id == "b"


def test_files_are_not_read_while_finetuning_is_held_back(around: Around) -> None:
    around.add("a")
    around.held_back = True
    asyncio.run(around.runner._validate_next())
    assert (around.status("a"), around.planner.calls) == (Status.VALIDATING, 0)


def test_a_start_with_a_full_disk(around: Around, monkeypatch: pytest.MonkeyPatch) -> None:
    around.add("a", Status.QUEUED, Status.RUNNING)
    monkeypatch.setattr(around.store, "note_death", refusing(around.store.note_death, "a"))

    async def start() -> None:
        await around.runner.start()
        await around.runner.stop()

    asyncio.run(start())


def test_a_start_serves_what_was_served_and_removes_what_nobody_needs(around: Around) -> None:
    ways = {
        "served": (Status.QUEUED, Status.RUNNING, Status.SUCCEEDED),
        "deleted": (Status.QUEUED, Status.RUNNING, Status.SUCCEEDED),
        "cancelled": (Status.CANCELLED,),
        "paused": (Status.QUEUED, Status.PAUSED),
    }
    for name, way in ways.items():
        around.add(name, *way, model=f"ft:{name}")
    around.store.forget_model("deleted")

    async def start() -> None:
        await around.runner.start()
        await around.runner.stop()

    asyncio.run(start())
    assert list(around.served) == ["ft:served"]
    assert sorted(path.name for path in around.folder.iterdir()) == ["paused", "served"]


def test_a_start_that_fails_leaves_the_engine_to_end_by_itself(around: Around, monkeypatch: pytest.MonkeyPatch) -> None:
    def shutdown(timeout: float | None = None) -> None:
        pass

    async def fail() -> None:
        raise RuntimeError("no luck")

    engine: Any = around.engine
    engine.shutdown = shutdown
    monkeypatch.setattr(around.runner, "start", fail)

    async def start() -> None:
        with pytest.raises(RuntimeError, match="no luck"):
            async with _running(around.runner, engine):
                pass

    asyncio.run(start())
    assert engine.shutdown is shutdown
