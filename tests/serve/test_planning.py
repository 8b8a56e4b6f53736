"""From a request and its files to the settings of a job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harli.config import FinetuneSettings
from harli.finetune.dataset import read_samples
from harli.models import byte_tokenizer, resolve_model
from harli.serve.jobs import Extension, Hyperparameters, JobRequest
from harli.serve.planning import HELD_OUT, TRAINING, Planner
from harli.types import HarliError

DEFAULTS = FinetuneSettings(microbatch_tokens=64, learning_rate=1e-3)


def lines(count: int) -> list[str]:
    return [
        json.dumps({"prompt": f"{number} plus {number}?", "completion": str(2 * number)}) for number in range(count)
    ]


def write(path: Path, content: list[str]) -> Path:
    path.write_text("\n".join(content) + "\n")
    return path


def plan(tmp_path: Path, data: Path, validation: Path | None = None, **request: Any) -> FinetuneSettings:
    asked = JobRequest(
        model="tiny", training_file="file-t", validation_file="file-v" if validation else None, **request
    )
    return Planner(DEFAULTS, str(resolve_model("tiny"))).plan(asked, data, validation, tmp_path / "job")


def test_a_tenth_is_held_out_and_nothing_is_in_both(tmp_path: Path) -> None:
    content = lines(50)
    settings = plan(tmp_path, write(tmp_path / "data.jsonl", content))
    training = [line for line in (tmp_path / "job" / TRAINING).read_text().split("\n") if line]
    held_out = [line for line in (tmp_path / "job" / HELD_OUT).read_text().split("\n") if line]
    assert len(held_out) == 5
    assert sorted(training + held_out) == sorted(content)
    assert (settings.data, settings.held_out) == (tmp_path / "job" / TRAINING, tmp_path / "job" / HELD_OUT)


def test_a_validation_file_is_held_out_instead(tmp_path: Path) -> None:
    data, validation = write(tmp_path / "data.jsonl", lines(20)), write(tmp_path / "v.jsonl", lines(3))
    plan(tmp_path, data, validation)
    assert (tmp_path / "job" / TRAINING).read_text() == data.read_text()
    assert (tmp_path / "job" / HELD_OUT).read_text() == validation.read_text()


def test_epochs_and_batches_become_updates(tmp_path: Path) -> None:
    """On samples of equal length, three to a micro-batch: 90 of 100 samples make 30 micro-batches an epoch."""
    content = [json.dumps({"text": "x" * 20}) for _ in range(100)]
    data = write(tmp_path / "data.jsonl", content)
    assert len(read_samples(data, byte_tokenizer(), max_tokens=64).items[0].tokens) == 21

    def settings(**chosen: Any) -> FinetuneSettings:
        return plan(tmp_path, data, hyperparameters=Hyperparameters(**chosen))

    assert settings(n_epochs=2).updates == 60
    batched = settings(n_epochs=2, batch_size=15)
    assert (batched.accumulation, batched.updates) == (5, 12)
    assert settings(learning_rate_multiplier=0.5).learning_rate == pytest.approx(5e-4)


def test_lora_is_the_requests_or_the_servers(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", lines(20))
    assert plan(tmp_path, data).lora == DEFAULTS.lora
    lora = plan(tmp_path, data, harli=Extension(lora_rank=2, lora_alpha=4.0)).lora
    assert (lora.rank, lora.alpha) == (2, 4.0)


def test_too_few_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HarliError, match=r"^file-t has 9 samples; a job needs 10"):
        plan(tmp_path, write(tmp_path / "data.jsonl", lines(9)))


def test_an_error_names_the_clients_file_and_line(tmp_path: Path) -> None:
    content = lines(40)
    content[28] = json.dumps({"messages": [{"role": "assistant", "content": "hello"}]})
    with pytest.raises(HarliError, match=r"^file-t:29: messages: the first message must not be the assistant's"):
        plan(tmp_path, write(tmp_path / "data.jsonl", content), write(tmp_path / "v.jsonl", lines(3)))
