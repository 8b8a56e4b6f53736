"""The finetuning thread: what it saves, what stops it, and what does not."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harli.compute.base import Recorder
from harli.compute.cpu import CpuPartitioner
from harli.compute.gate import Gate
from harli.config import LoraSettings
from harli.finetune import checkpoint
from harli.finetune.trainer import Trainer
from harli.types import HarliError
from tests.finetune.builders import make_job

PATIENCE_S = 60.0


def start(tmp_path: Path, **settings: Any) -> Trainer:
    gate = Gate(1)
    trainer = Trainer(make_job(tmp_path / "data.jsonl", **settings), gate, CpuPartitioner((0,)), tmp_path)
    trainer.start()
    gate.allow(1)
    return trainer


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.005)


def end(trainer: Trainer) -> None:
    trainer.finish()
    trainer.join(PATIENCE_S)
    assert not trainer.is_alive()


def test_it_saves_when_its_updates_are_done_and_waits_to_be_told(tmp_path: Path) -> None:
    trainer = start(tmp_path, updates=5, checkpoint_every=2)
    wait_until(lambda: trainer.saved)
    assert not trainer.state.ready
    assert trainer.is_alive()
    assert [update.update for update in trainer.updates] == list(range(5))
    end(trainer)
    assert (trainer.failure, trainer.save_failure) == ("", "")
    names = [path.name for path in checkpoint.complete(tmp_path / "checkpoints")]
    assert names == ["update-000004", "update-000005"]
    assert (tmp_path / "adapter" / checkpoint.WEIGHTS).is_file()


def test_a_job_that_has_ended_can_let_go_of_its_memory(tmp_path: Path) -> None:
    trainer = start(tmp_path, updates=1)
    wait_until(lambda: trainer.saved)
    model = weakref.ref(trainer._job.model)
    trainer.release()  # not yet: it has not been told to end
    assert model() is not None
    end(trainer)
    trainer.release()
    trainer.release()
    gc.collect()
    assert model() is None
    assert (trainer.saved, trainer.capturing, len(trainer.updates)) == (True, False, 1)


def test_finishing_in_the_middle_keeps_the_committed_updates(tmp_path: Path) -> None:
    trainer = start(tmp_path)
    wait_until(lambda: len(trainer.updates) >= 3)
    end(trainer)
    committed = len(trainer.updates)
    newest = checkpoint.latest(tmp_path)
    assert newest.name == f"update-{committed:06d}"
    again = make_job(tmp_path / "data.jsonl")
    assert checkpoint.restore(again, newest) == committed
    assert again.update.passes == committed  # nothing of the update that was dropped


def test_a_full_disk_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file, full = checkpoint.save_file, True

    def save(*args: Any) -> None:
        if full:
            raise OSError(28, "No space left on device")
        save_file(*args)

    monkeypatch.setattr(checkpoint, "save_file", save)
    trainer = start(tmp_path, checkpoint_every=1)
    wait_until(lambda: len(trainer.updates) >= 3)
    assert "No space left on device" in trainer.save_failure
    assert trainer.state.ready
    assert checkpoint.complete(tmp_path / "checkpoints") == []
    full = False
    wait_until(lambda: not trainer.save_failure)
    end(trainer)
    assert checkpoint.complete(tmp_path / "checkpoints")
    assert not trainer.failure


def test_an_exception_in_a_unit_keeps_what_was_learned_before(tmp_path: Path) -> None:
    trainer = start(tmp_path)
    wait_until(lambda: len(trainer.updates) >= 2)
    trainer._job.update._layers[1].forward = None
    wait_until(lambda: bool(trainer.failure))
    wait_until(lambda: trainer.saved)
    assert trainer.failure.startswith("TypeError")
    committed = len(trainer.updates)
    end(trainer)
    assert checkpoint.latest(tmp_path).name == f"update-{committed:06d}"


def test_nothing_is_saved_before_the_first_update(tmp_path: Path) -> None:
    gate = Gate(1)
    trainer = Trainer(make_job(tmp_path / "data.jsonl"), gate, CpuPartitioner((0,)), tmp_path)
    trainer.start()
    end(trainer)
    assert not trainer.saved
    assert not (tmp_path / "adapter").exists()
    assert not (tmp_path / "checkpoints").exists()


def test_another_shape_takes_effect_within_a_unit_and_loses_no_committed_update(tmp_path: Path) -> None:
    trainer = start(tmp_path)
    wait_until(lambda: len(trainer.updates) >= 2)
    trainer.reshape(64)
    wait_until(lambda: trainer.state.microbatch_tokens == 64)
    seen = len(trainer.updates)
    wait_until(lambda: len(trainer.updates) >= seen + 2)
    end(trainer)
    assert trainer.failure == ""
    assert [update.update for update in trainer.updates] == list(range(len(trainer.updates)))
    rows = list(trainer.unit_rows)
    assert {row.microbatch_tokens for row in rows} == {32, 64}
    assert [row.time_s for row in rows] == sorted(row.time_s for row in rows)
    assert {row.kind for row in rows} == {"embed", "forward", "loss", "backward", "optimizer"}
    assert all(row.duration_ms > 0 and row.units == 1 and not row.beside_decode for row in rows)


def test_a_shape_that_leaves_no_target_is_refused_and_training_goes_on(tmp_path: Path) -> None:
    trainer = start(tmp_path)
    with pytest.raises(HarliError, match="raise --microbatch-tokens"):
        trainer.reshape(1)
    seen = len(trainer.updates)
    wait_until(lambda: len(trainer.updates) > seen)
    end(trainer)
    assert trainer.state.microbatch_tokens == 32


class WithRecorder(CpuPartitioner):
    """Records units by keeping them."""

    def __init__(self) -> None:
        super().__init__((0,))
        self.recorded_beside_decode: list[bool] = []
        self.trainer: Trainer

    def recorder(self) -> Recorder:
        def record(work: Callable[[], None]) -> Callable[[], None]:
            self.recorded_beside_decode.append(self.trainer.beside_decode)
            return work

        return record


def test_graphs_are_made_while_decode_is_idle_only(tmp_path: Path) -> None:
    partitioner, gate = WithRecorder(), Gate(1)
    job = make_job(tmp_path / "data.jsonl", lora=LoraSettings(rank=2))
    job.update.use_graphs(partitioner.recorder())
    trainer = partitioner.trainer = Trainer(job, gate, partitioner, None)
    trainer.beside_decode = True
    trainer.start()
    gate.allow(1)
    assert trainer.capturing
    wait_until(lambda: len(trainer.updates) >= 2)
    assert partitioner.recorded_beside_decode == []
    trainer.beside_decode = False
    wait_until(lambda: not trainer.capturing)
    updates = len(trainer.updates)
    wait_until(lambda: len(trainer.updates) > updates + 1)
    end(trainer)
    assert trainer.failure == ""
    assert partitioner.recorded_beside_decode == [False] * 4  # two layers, forward and backward
