"""Micro-batches of a fixed length: whole samples packed side by side, each attending to itself only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from harli.finetune.dataset import Sample
from harli.types import HarliError

IGNORED = -100
"""Label of a position without a target: the default of ``torch.nn.functional.cross_entropy``."""
OPEN_ROWS = 256
"""Rows that samples go into at a time, so that a sample's work does not grow with their number.

A checkpoint is a place in the order of rows that this makes.
"""


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
    rows = pack_rows(samples, trainable(samples, microbatch_tokens), microbatch_tokens, seed, epoch)
    return [_micro_batch([samples[index] for index in row], microbatch_tokens) for row in rows]


def trainable(samples: Sequence[Sample], microbatch_tokens: int) -> list[int]:
    """Indices of the samples that have a target. Raises ValueError if one is longer than ``microbatch_tokens``."""
    found = [index for index, sample in enumerate(samples) if sample.has_target]
    longest = max((len(samples[index].tokens) for index in found), default=0)
    if longest > microbatch_tokens:
        raise ValueError(f"a sample of {longest} tokens does not fit a micro-batch of {microbatch_tokens}")
    return found


def pack_rows(
    samples: Sequence[Sample], indices: Sequence[int], microbatch_tokens: int, seed: int, epoch: int
) -> Iterator[list[int]]:
    """The samples' indices, row by row as rows close: first-fit over ``OPEN_ROWS``, of which the fullest gives way."""
    rows: list[list[int]] = []
    free = np.zeros(OPEN_ROWS, dtype=np.int64)
    for index in np.random.default_rng((seed, epoch)).permutation(indices).tolist():
        length = len(samples[index].tokens)
        place = int(np.argmax(free >= length))
        if free[place] < length:
            if len(rows) < OPEN_ROWS:
                place = len(rows)
                rows.append([])
            else:
                place = int(np.argmin(free))
                yield rows[place]
                rows[place] = []
            free[place] = microbatch_tokens
        rows[place].append(index)
        free[place] -= length
    yield from rows


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
        self._trainable = trainable(samples, microbatch_tokens)
        if not self._trainable:
            raise ValueError("no sample has a target")
        self._epoch, self._index = 0, 0
        self._packing = _Epoch(self._rows(0))

    def __next__(self) -> MicroBatch:
        if not self._packing.pack(self._index + 1):
            self._epoch, self._index = self._epoch + 1, 0
            self._packing = _Epoch(self._rows(self._epoch))
            self._packing.pack(1)
        row = self._packing.rows[self._index]
        self._index += 1
        return _micro_batch([self.samples[index] for index in row], self.microbatch_tokens)

    def state(self) -> dict[str, int]:
        """The position of the next micro-batch, for a checkpoint."""
        return {"epoch": self._epoch, "index": self._index}

    def restore(self, state: dict[str, int]) -> None:
        """Continues where ``state`` was taken from a stream of the same samples, length and seed."""
        epoch, index = state["epoch"], state["index"]
        packing = self._packing if epoch == self._epoch else _Epoch(self._rows(epoch))
        if index < 0 or not packing.pack(index):
            raise HarliError(
                f"the checkpoint is at micro-batch {index} of an epoch, but the finetuning data give "
                f"{len(packing.rows)}; resume with the data that it was made with"
            )
        self._epoch, self._packing, self._index = epoch, packing, index

    def _rows(self, epoch: int) -> Iterator[list[int]]:
        return pack_rows(self.samples, self._trainable, self.microbatch_tokens, self.seed, epoch)


class _Epoch:
    """An epoch's rows, packed as they are asked for: packing a million samples at once would take seconds."""

    def __init__(self, packing: Iterator[list[int]]) -> None:
        self.rows: list[list[int]] = []
        self._packing = packing

    def pack(self, count: int) -> bool:
        """Pack the first ``count`` rows; False if there are fewer."""
        self.rows.extend(islice(self._packing, max(0, count - len(self.rows))))
        return len(self.rows) >= count


def _micro_batch(samples: Sequence[Sample], microbatch_tokens: int) -> MicroBatch:
    input_ids = torch.zeros(1, microbatch_tokens, dtype=torch.int64)
    position_ids = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    segment_ids = torch.zeros_like(input_ids, dtype=torch.int32)
    begin = 0
    for segment, sample in enumerate(samples, start=1):
        end = begin + len(sample.tokens)
        tokens = torch.tensor(list(sample.tokens))
        loss_mask = torch.tensor(list(sample.loss_mask), dtype=torch.bool)
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
