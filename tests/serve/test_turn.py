"""A job's turn, against an engine that only answers commands."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harli.config import FinetuneSettings
from harli.serve.jobs import JobRequest
from harli.serve.planning import HELD_OUT, TRAINING
from harli.serve.store import Store
from harli.serve.turn import Turn


class Engine:
    """Has a job that is ready when ``ready`` is set, to the answer of ``prepared``."""

    errored = False

    def __init__(self, ready: dict[str, Any] | None = None) -> None:
        self.asked: list[str] = []
        self.settings: FinetuneSettings | None = None
        self._ready = ready
        self._training = False

    async def collective_rpc(self, _: str, args: tuple[Any, ...]) -> list[Any]:
        name, *rest = args
        self.asked.append(name)
        return [await getattr(self, name)(*rest)]

    async def prepare(self, settings: str, folder: str, resume: str | None) -> None:
        self.settings = FinetuneSettings.model_validate_json(settings)

    async def prepared(self) -> dict[str, Any] | None:
        return self._ready

    async def status(self) -> dict[str, Any]:
        training = self._training
        return {"policy_failure": "", "finetune_failure": "", "training": training, "ended": not training}

    async def drain_updates(self) -> list[Any]:
        return []

    async def finish(self) -> None:
        self._training = False

    async def release(self) -> None:
        pass


class LosesTheAnswer(Engine):
    """Starts the job and says so to nobody."""

    async def prepared(self) -> dict[str, Any] | None:
        self._training = True
        await asyncio.sleep(3600)
        return None


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "jobs.sqlite")
    store.add_job("a", JobRequest(model="tiny", training_file="f"))
    store.set_settings("a", FinetuneSettings(data=Path("/elsewhere/training.jsonl"), held_out=Path("/elsewhere/v")))
    yield store
    store.close()


def turn(engine: Any, store: Store, folder: Path) -> Turn:
    return Turn(engine, store, store.job("a"), folder, lambda rows: None)


def test_the_data_is_taken_from_where_the_state_is_now(store: Store, tmp_path: Path) -> None:
    engine = Engine()
    assert asyncio.run(turn(engine, store, tmp_path).run(lambda: True)) is None
    assert engine.settings is not None
    assert (engine.settings.data, engine.settings.held_out) == (tmp_path / TRAINING, tmp_path / HELD_OUT)


def test_a_problem_of_the_machine_is_no_failure_of_the_job(store: Store, tmp_path: Path) -> None:
    engine = Engine({"transient": f"cannot read {tmp_path}/training.jsonl: Too many open files"})
    with pytest.raises(OSError, match=r"^cannot read training\.jsonl: Too many open files$"):
        asyncio.run(turn(engine, store, tmp_path).run(lambda: False))
    assert "Too many open files" in store.events("a", None, 1)[0].message
    assert engine.asked[-2:] == ["release", "status"]


def test_a_job_that_has_started_as_the_server_is_told_to_end_is_saved(store: Store, tmp_path: Path) -> None:
    engine = LosesTheAnswer()

    async def told_to_end() -> None:
        task = asyncio.create_task(turn(engine, store, tmp_path).run(lambda: False))
        while "prepared" not in engine.asked:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()

    asyncio.run(told_to_end())
    assert "finish" in engine.asked
    assert engine.asked[-1] == "release"
