"""Micro-batches of a fixed length: whole samples packed side by side, each attending to itself only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from harli.finetune.dataset import Sample
from harli.types import HarliError

IGNORED = -100
"""Label of a position without a target: the default of ``torch.nn.functional.cross_entropy``."""


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """One row of T positions."""

    input_ids: Tensor
    """[1, T] int64, 0 where padded."""
    position_ids: Tensor
    """[1, T] int64, from 0 in each sample."""
    labels: Tensor
    """[1, T] int64: the token that position t has to predict, which is the sample's next, or -100."""
    segment_ids: Tensor
    """[1, T] int32: 1, 2, ... for the samples, 0 where padded."""
    tokens: int
    """Positions that are not padded."""
    targets: int
    """Labels that are not -100."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device; itself where it is there already."""
        if self.input_ids.device == device:
            return self
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            labels=self.labels.to(device),
            segment_ids=self.segment_ids.to(device),
        )


def pack(samples: Sequence[Sample], *, microbatch_tokens: int, seed: int, epoch: int) -> list[MicroBatch]:
    """One epoch: every sample that has a target, shuffled by seed and epoch, packed first-fit.

    Raises:
        ValueError: a sample is longer than ``microbatch_tokens``.
    """
    rows = _rows(samples, microbatch_tokens, seed, epoch)
    return [_micro_batch([samples[index] for index in row], microbatch_tokens) for row in rows]


def attention_mask(micro_batch: MicroBatch) -> Tensor:
    """[1, 1, T, T] bool for ``scaled_dot_product_attention``: True where query (row) attends to key (column).

    Causal within each sample. Padding attends to padding, so that no row is empty, which would give NaN.
    """
    segments = micro_batch.segment_ids
    same_segment = segments[:, None, :, None] == segments[:, None, None, :]
    return same_segment.tril()


class BatchStream(Iterator[MicroBatch]):
    """Micro-batches without end, epoch after epoch; its state is a position that it can be set back to.

    Raises:
        ValueError: no sample has a target, or one is longer than ``microbatch_tokens``.
    """

    def __init__(self, samples: Sequence[Sample], microbatch_tokens: int, seed: int) -> None:
        self.samples = samples
        self.microbatch_tokens = microbatch_tokens
        self.seed = seed
        self._begin_epoch(0)
        if not self._epoch_rows:
            raise ValueError("no sample has a target")

    def __next__(self) -> MicroBatch:
        if self._index == len(self._epoch_rows):
            self._begin_epoch(self._epoch + 1)
        row = self._epoch_rows[self._index]
        self._index += 1
        return _micro_batch([self.samples[index] for index in row], self.microbatch_tokens)

    def state(self) -> dict[str, int]:
        """The position of the next micro-batch, for a checkpoint."""
        return {"epoch": self._epoch, "index": self._index}

    def restore(self, state: dict[str, int]) -> None:
        """Continues where ``state`` was taken from a stream of the same samples, length and seed."""
        epoch, index = state["epoch"], state["index"]
        rows = _rows(self.samples, self.microbatch_tokens, self.seed, epoch)
        if not 0 <= index <= len(rows):
            raise HarliError(
                f"the checkpoint is at micro-batch {index} of an epoch, but the finetuning data give {len(rows)}; "
                "resume with the data that it was made with"
            )
        self._epoch, self._epoch_rows, self._index = epoch, rows, index

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch_rows = _rows(self.samples, self.microbatch_tokens, self.seed, epoch)
        self._epoch, self._index = epoch, 0


def _rows(samples: Sequence[Sample], microbatch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """First-fit packing: indices of the samples of each row."""
    rows: list[list[int]] = []
    free = np.full(len(samples), microbatch_tokens)
    for index in np.random.default_rng((seed, epoch)).permutation(len(samples)).tolist():
        sample = samples[index]
        if not sample.has_target:
            continue
        length = len(sample.tokens)
        if length > microbatch_tokens:
            raise ValueError(f"a sample of {length} tokens does not fit a micro-batch of {microbatch_tokens}")
        row = int(np.argmax(free[: len(rows) + 1] >= length))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        free[row] -= length
    return rows


def _micro_batch(samples: Sequence[Sample], microbatch_tokens: int) -> MicroBatch:
    input_ids = torch.zeros(1, microbatch_tokens, dtype=torch.int64)
    position_ids = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    segment_ids = torch.zeros_like(input_ids, dtype=torch.int32)
    begin = 0
    for segment, sample in enumerate(samples, start=1):
        end = begin + len(sample.tokens)
        tokens, loss_mask = torch.tensor(sample.tokens), torch.tensor(sample.loss_mask)
        input_ids[0, begin:end] = tokens
        position_ids[0, begin:end] = torch.arange(end - begin)
        labels[0, begin : end - 1] = torch.where(loss_mask[1:], tokens[1:], IGNORED)
        segment_ids[0, begin:end] = segment
        begin = end
    return MicroBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        labels=labels,
        segment_ids=segment_ids,
        tokens=begin,
        targets=int((labels != IGNORED).sum()),
    )
