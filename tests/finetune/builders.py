"""A training job of a very small model, made from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from harli.config import FinetuneSettings, LoraSettings
from harli.finetune.checkpoint import Job
from harli.finetune.dataset import Sample
from harli.finetune.model import build_model
from harli.finetune.packing import BatchStream
from harli.finetune.units import LayerwiseUpdate

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    tie_word_embeddings=True,
)


def make_job(data: Path, config: Any = CONFIG, dtype: torch.dtype = torch.float32, **changes: Any) -> Job:
    """``data`` stands for the samples, which are made here; it is written if it is not there."""
    if not data.exists():
        data.write_text('{"text": "stands for the samples"}\n')
    settings = FinetuneSettings(
        data=data, lora=LoraSettings(rank=2, dropout=0.2), microbatch_tokens=32, learning_rate=1e-2
    ).model_copy(update=changes)
    torch.manual_seed(0)
    weights = AutoModelForCausalLM.from_config(config, dtype=dtype).state_dict()
    del weights["lm_head.weight"]
    model = build_model(config, weights, settings.lora, name="base", seed=settings.seed)
    samples = [Sample([(7 * i + j) % 64 for j in range(5 + i)], [True] * (5 + i)) for i in range(12)]
    update = LayerwiseUpdate(model, learning_rate=settings.learning_rate, weight_decay=0.0, seed=settings.seed)
    return Job(model, update, BatchStream(samples, settings.microbatch_tokens, settings.seed), settings)
