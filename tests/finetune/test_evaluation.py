"""Held-out loss in units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from harli.finetune.checkpoint import Job
from harli.finetune.evaluation import Evaluation
from harli.finetune.packing import MicroBatch, attention_mask, pack
from tests.finetune.builders import make_job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Its adapter says something, and it has dropout."""
    job = make_job(tmp_path / "data.jsonl")
    for name, parameter in job.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=3.0)
    return job


def plain_loss(model: Any, batches: list[MicroBatch]) -> float:
    total = 0.0
    for batch in batches:
        logits = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=attention_mask(batch)
        ).logits
        total += functional.cross_entropy(logits[0], batch.labels[0], ignore_index=-100, reduction="sum").item()
    return total / sum(batch.targets for batch in batches)


def test_both_losses_equal_plain_passes(job: Job) -> None:
    batches = pack(job.stream.samples, microbatch_tokens=32, seed=1, epoch=0)
    evaluation = Evaluation(job.model, batches)
    for unit in evaluation.units():
        unit.run()
        assert unit.tokens == 0
    assert evaluation.loss is not None
    with torch.no_grad():
        assert evaluation.loss.adapter == pytest.approx(plain_loss(job.model, batches), rel=1e-5)
        with job.model.disable_adapter():
            assert evaluation.loss.base == pytest.approx(plain_loss(job.model, batches), rel=1e-5)
    assert evaluation.loss.adapter != pytest.approx(evaluation.loss.base, rel=1e-3)


def test_there_is_no_loss_before_all_units_have_run(job: Job) -> None:
    evaluation = Evaluation(job.model, pack(job.stream.samples, microbatch_tokens=32, seed=1, epoch=0))
    units = list(zip(evaluation.units(), range(5), strict=False))
    assert len(units) == 5
    assert evaluation.loss is None
