"""Checkpoints: training goes on exactly where it was, and only complete ones are ever seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from harli.config import LoraSettings
from harli.finetune import checkpoint
from harli.finetune.checkpoint import Job
from harli.types import HarliError
from tests.finetune.builders import CONFIG, make_job


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


def train(job: Job, updates: int) -> list[float]:
    losses = []
    for _ in range(updates):
        for unit in job.update.units([next(job.stream)], 1e-2):
            unit.run()
        losses.append(job.update.loss)
    return losses


def test_training_goes_on_exactly_as_if_it_had_not_stopped(data: Path, tmp_path: Path) -> None:
    straight = train(make_job(data), 9)
    first = make_job(data)
    losses = train(first, 5)
    folder = checkpoint.save(first, tmp_path / "checkpoints", 5)
    second = make_job(data)
    assert checkpoint.restore(second, folder) == 5
    assert losses + train(second, 4) == straight


def test_a_checkpoint_is_a_peft_adapter(data: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    job = make_job(data)
    train(job, 3)
    folder = checkpoint.save(job, tmp_path, 3)
    base = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)
    loaded = dict(PeftModel.from_pretrained(base, folder).named_parameters())
    for name, parameter in job.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(loaded[name], parameter, check_device=False)


def test_only_the_last_checkpoints_are_kept(data: Path, tmp_path: Path) -> None:
    job = make_job(data)
    train(job, 1)
    for updates in (1, 2, 999_999, 1_000_000):
        checkpoint.save(job, tmp_path / "checkpoints", updates)
    assert [path.name for path in checkpoint.complete(tmp_path / "checkpoints")] == ["update-999999", "update-1000000"]
    assert checkpoint.latest(tmp_path).name == "update-1000000"


def test_a_failed_save_leaves_the_checkpoint_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(data)
    train(job, 1)
    kept = checkpoint.save(job, tmp_path, 1)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(job, tmp_path, 2)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [kept]


def test_weights_that_are_not_finite_are_not_saved(data: Path, tmp_path: Path) -> None:
    job = make_job(data)
    train(job, 1)
    next(p for p in job.model.parameters() if p.requires_grad).data.fill_(float("inf"))
    with pytest.raises(ArithmeticError, match="not finite"):
        checkpoint.save(job, tmp_path, 1)
    assert checkpoint.complete(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"seed": 1}, "seed was 0 and is 1"), ({"lora": LoraSettings(rank=4)}, "lora"), ({"accumulation": 2}, "accum")],
)
def test_another_job_is_refused(data: Path, tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    job = make_job(data)
    train(job, 1)
    folder = checkpoint.save(job, tmp_path, 1)
    with pytest.raises(HarliError, match=what):
        checkpoint.restore(make_job(data, **changes), folder)


def test_other_data_is_refused_and_more_updates_are_not(data: Path, tmp_path: Path) -> None:
    job = make_job(data)
    train(job, 1)
    folder = checkpoint.save(job, tmp_path / "saved", 1)
    checkpoint.restore(make_job(data, updates=50), folder)
    data.write_text('{"text": "something else"}\n')
    with pytest.raises(HarliError, match="data_sha256"):
        checkpoint.restore(make_job(data), folder)


@pytest.mark.parametrize("damage", ["state", "optimizer", "missing"])
def test_a_damaged_checkpoint_is_refused_in_one_line(data: Path, tmp_path: Path, damage: str) -> None:
    job = make_job(data)
    train(job, 1)
    folder = checkpoint.save(job, tmp_path, 1)
    if damage == "state":
        state = json.loads((folder / checkpoint.STATE).read_text())
        del state["stream"]
        (folder / checkpoint.STATE).write_text(json.dumps(state))
    elif damage == "optimizer":
        (folder / checkpoint.OPTIMIZER).write_bytes(b"nonsense")
    else:
        (folder / checkpoint.WEIGHTS).unlink()
    with pytest.raises(HarliError, match=f"cannot resume from {folder}") as refused:
        checkpoint.restore(make_job(data), folder)
    assert "\n" not in str(refused.value)


def test_a_folder_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(HarliError, match="no checkpoint in"):
        checkpoint.latest(tmp_path)
