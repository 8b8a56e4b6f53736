"""From a job's request and files to the settings it trains with: what is held out, how many updates."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from harli.config import FinetuneSettings, LoraSettings
from harli.finetune.dataset import read_samples
from harli.finetune.packing import pack_rows, trainable
from harli.serve.files import errors_name
from harli.serve.jobs import JobRequest
from harli.types import HarliError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINING, HELD_OUT = "training.jsonl", "held_out.jsonl"
MIN_SAMPLES = 10
HELD_OUT_FRACTION = 0.1
MAX_HELD_OUT = 64
"""Samples held out at most: the loss on them costs time that training could have."""
EPOCHS = 3
"""What ``auto`` means."""


class Planner:
    """Works in a thread beside the server; one job at a time."""

    def __init__(self, defaults: FinetuneSettings, tokenizer: str) -> None:
        """``defaults``: what jobs get that do not say otherwise. ``tokenizer``: name or folder."""
        self._defaults = defaults
        self._tokenizer_name = tokenizer

    def plan(self, request: JobRequest, training: Path, validation: Path | None, folder: Path) -> FinetuneSettings:
        """Copy the data that the job needs into ``folder`` and settle how it is trained.

        Without a file for validation a tenth of the samples is held out. Raises HarliError for bad data.
        """
        folder.mkdir(parents=True, exist_ok=True)
        train_path, held_out_path = folder / TRAINING, folder / HELD_OUT
        with errors_name(train_path, request.training_file):
            self._split(training, train_path, None if validation else held_out_path, request.seed)
            settings = self._settings(request, train_path, held_out_path)
        if validation:
            shutil.copyfile(validation, held_out_path)
        with errors_name(held_out_path, request.validation_file or request.training_file):
            read_samples(held_out_path, self._tokenizer, max_tokens=settings.microbatch_tokens)
        return settings

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self._tokenizer_name)
        return tokenizer

    def _split(self, source: Path, training: Path, held_out: Path | None, seed: int) -> None:
        """Copy ``source``, a sample of its lines to ``held_out``; blank lines in their place keep the numbers right."""
        with source.open("rb") as file:
            filled = [number for number, line in enumerate(file) if line.strip()]
        if len(filled) < MIN_SAMPLES:
            raise HarliError(f"{training} has {len(filled)} samples; a job needs {MIN_SAMPLES} or more")
        count = min(MAX_HELD_OUT, math.ceil(HELD_OUT_FRACTION * len(filled))) if held_out else 0
        chosen = set(random.Random(seed).sample(filled, count))
        _copy_lines(source, training, lambda number: number not in chosen)
        if held_out:
            _copy_lines(source, held_out, chosen.__contains__)

    def _settings(self, request: JobRequest, data: Path, held_out: Path) -> FinetuneSettings:
        """An epoch is as many micro-batches as the samples pack into; a batch is rounded to whole ones."""
        defaults, chosen, ours = self._defaults, request.chosen, request.harli
        samples = read_samples(data, self._tokenizer, max_tokens=defaults.microbatch_tokens).items
        length = defaults.microbatch_tokens
        rows = sum(1 for _ in pack_rows(samples, trainable(samples, length), length, request.seed, epoch=0))
        accumulation = defaults.accumulation
        if chosen.batch_size != "auto":
            accumulation = min(rows, max(1, round(chosen.batch_size * rows / len(samples))))
        epochs = EPOCHS if chosen.n_epochs == "auto" else chosen.n_epochs
        factor = 1.0 if chosen.learning_rate_multiplier == "auto" else chosen.learning_rate_multiplier
        lora = LoraSettings(
            rank=ours.lora_rank or defaults.lora.rank,
            alpha=ours.lora_alpha or defaults.lora.alpha,
            dropout=defaults.lora.dropout,
            targets=defaults.lora.targets,
        )
        return defaults.model_copy(
            update={
                "data": data,
                "held_out": held_out,
                "lora": lora,
                "learning_rate": defaults.learning_rate * factor,
                "accumulation": accumulation,
                "updates": max(1, math.ceil(epochs * rows / accumulation)),
                "seed": request.seed,
            }
        )


def _copy_lines(source: Path, target: Path, wanted: Callable[[int], bool]) -> None:
    with source.open("rb") as lines, target.open("wb") as copy:
        copy.writelines(line if wanted(number) else b"\n" for number, line in enumerate(lines))
