"""Finetuning learns: on ``tiny`` and real text, held-out loss falls by far more than seeds make it vary."""

from __future__ import annotations

from pathlib import Path
from statistics import stdev

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoConfig, AutoTokenizer

from harli.config import FinetuneSettings, LoraSettings
from harli.finetune.builtin import write_builtin_dataset
from harli.finetune.dataset import Sample, read_samples
from harli.finetune.model import build_model
from harli.finetune.packing import BatchStream, MicroBatch, attention_mask, pack
from harli.finetune.schedule import learning_rate
from harli.finetune.units import LayerwiseUpdate
from harli.models import resolve_model

pytestmark = pytest.mark.slow

UPDATES = 50
TOKENS = 128


def held_out_loss(model: torch.nn.Module, batches: list[MicroBatch]) -> float:
    total = targets = 0.0
    with torch.no_grad():
        for batch in batches:
            logits = model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=attention_mask(batch)
            ).logits
            total += functional.cross_entropy(logits[0].float(), batch.labels[0], reduction="sum").item()
            targets += batch.targets
    return total / targets


def train(samples: list[Sample], held_out: list[MicroBatch], seed: int) -> tuple[float, float]:
    """Held-out loss before and after."""
    folder = resolve_model("tiny")
    settings = FinetuneSettings(lora=LoraSettings(rank=8), learning_rate=3e-3, seed=seed)
    weights = load_file(Path(folder) / "model.safetensors")
    model = build_model(AutoConfig.from_pretrained(folder), weights, settings.lora, name="tiny", seed=seed)
    update = LayerwiseUpdate(model, learning_rate=settings.learning_rate, weight_decay=0.0, seed=seed)
    stream = BatchStream(samples, TOKENS, seed)
    before = held_out_loss(model, held_out)
    for number in range(UPDATES):
        for unit in update.units([next(stream)], learning_rate(settings, number)):
            unit.run()
    return before, held_out_loss(model, held_out)


def test_held_out_loss_falls_by_more_than_three_times_its_spread_over_seeds(tmp_path: Path) -> None:
    data = tmp_path / "docstrings.jsonl"
    write_builtin_dataset(data)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("tiny"))
    samples = read_samples(data, tokenizer, max_tokens=TOKENS).items
    held_out = pack(samples[::10], microbatch_tokens=TOKENS, seed=0, epoch=0)[:16]
    training = [sample for index, sample in enumerate(samples) if index % 10]
    results = [train(training, held_out, seed) for seed in range(3)]
    fall = min(before - after for before, after in results)
    spread = stdev(after for _, after in results)
    print(f"held-out loss {results}; falls by {fall:.3f} at least, spread {spread:.4f}")  # noqa: T201
    assert fall > 3 * spread
    assert fall > 0.5
