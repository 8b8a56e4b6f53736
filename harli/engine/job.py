"""Makes a training job ready in the engine process: its data, a model over the engine's weights, what it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from harli.compute.base import Partitioner
from harli.config import FinetuneSettings
from harli.engine.weights import weight_views
from harli.finetune import checkpoint
from harli.finetune.checkpoint import Job
from harli.finetune.dataset import Samples, read_samples
from harli.finetune.model import build_model
from harli.finetune.packing import BatchStream, pack
from harli.finetune.units import LayerwiseUpdate


class Ready(NamedTuple):
    """A job that can start."""

    job: Job
    samples: Samples
    done: int
    """Its updates before this start."""


class JobMaker:
    """For one engine; decode goes on beside it."""

    def __init__(self, engine_model: Any, model_config: Any, partitioner: Partitioner) -> None:
        """``model_config``: vLLM's."""
        self._engine_model = engine_model
        self._model_config = model_config
        self._partitioner = partitioner

    def make(self, settings_json: str, resume: str | None) -> Ready:
        """``settings_json``: ``FinetuneSettings`` with a data file. ``resume``: a checkpoint. Raises HarliError."""
        from transformers import AutoTokenizer

        settings = FinetuneSettings.model_validate_json(settings_json)
        assert settings.data is not None
        tokenizer = AutoTokenizer.from_pretrained(self._model_config.tokenizer)
        samples = read_samples(settings.data, tokenizer, max_tokens=settings.microbatch_tokens)
        job = self._job(samples, settings)
        if settings.held_out is not None:
            held_out = read_samples(settings.held_out, tokenizer, max_tokens=settings.microbatch_tokens).items
            batches = pack(held_out, microbatch_tokens=settings.microbatch_tokens, seed=settings.seed, epoch=0)
            job = job._replace(held_out=batches)
        done = checkpoint.restore(job, Path(resume)) if resume else 0
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            # Units run on streams that do not wait for this thread's.
            torch.cuda.current_stream().synchronize()
        return Ready(job, samples, done)

    def _job(self, samples: Samples, settings: FinetuneSettings) -> Job:
        config = self._model_config.hf_text_config
        views = weight_views(self._engine_model, config)
        model = build_model(config, views, settings.lora, name=self._model_config.model, seed=settings.seed)
        update = LayerwiseUpdate(
            model, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay, seed=settings.seed
        )
        if (record := self._partitioner.recorder()) is not None:
            update.use_graphs(record)
        return Job(model, update, BatchStream(samples.items, settings.microbatch_tokens, settings.seed), settings)
