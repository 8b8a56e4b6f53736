from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from harli.finetune.dataset import Sample
from harli.finetune.packing import IGNORED, BatchStream, MicroBatch, attention_mask, pack, pack_rows, trainable
from harli.types import HarliError

LENGTH = 16


@st.composite
def sample_lists(draw: st.DrawFn) -> list[Sample]:
    """Samples whose tokens occur nowhere else, so that each is found again after packing."""
    samples = []
    for number, length in enumerate(draw(st.lists(st.integers(1, LENGTH), max_size=12))):
        tokens = [1 + number * LENGTH + position for position in range(length)]
        samples.append(Sample(tokens, draw(st.lists(st.booleans(), min_size=length, max_size=length))))
    return samples


def plain(length: int, first: int = 1) -> Sample:
    return Sample(list(range(first, first + length)), [True] * length)


def segments(batch: MicroBatch) -> list[slice]:
    """Where each sample lies, checked to be contiguous and in order, padding last."""
    ids = batch.segment_ids[0].tolist()
    count = max(ids)
    found = [slice(ids.index(s), ids.index(s) + ids.count(s)) for s in range(1, count + 1)]
    assert [s for s in range(1, count + 1) for _ in range(ids.count(s))] + [0] * ids.count(0) == ids
    return found


@settings(max_examples=60, deadline=None)
@given(sample_lists(), st.integers(0, 5))
def test_every_sample_with_a_target_is_packed_once_and_whole(samples: list[Sample], epoch: int) -> None:
    batches = pack(samples, microbatch_tokens=LENGTH, seed=0, epoch=epoch)
    packed = [batch.input_ids[0, where].tolist() for batch in batches for where in segments(batch)]
    assert sorted(packed) == [sample.tokens for sample in samples if any(sample.loss_mask[1:])]
    assert all(batch.targets > 0 for batch in batches)


@settings(max_examples=60, deadline=None)
@given(sample_lists())
def test_labels_are_the_next_targets_of_the_same_sample(samples: list[Sample]) -> None:
    by_first_token = {sample.tokens[0]: sample for sample in samples}
    for batch in pack(samples, microbatch_tokens=LENGTH, seed=0, epoch=0):
        expected = [IGNORED] * LENGTH
        for where in segments(batch):
            sample = by_first_token[int(batch.input_ids[0, where.start])]
            for position in range(len(sample.tokens) - 1):
                if sample.loss_mask[position + 1]:
                    expected[where.start + position] = sample.tokens[position + 1]
            assert batch.position_ids[0, where].tolist() == list(range(len(sample.tokens)))
        assert batch.labels[0].tolist() == expected
        assert batch.targets == LENGTH - expected.count(IGNORED)
        assert batch.tokens == sum(where.stop - where.start for where in segments(batch))
        assert not batch.input_ids[0, batch.tokens :].any()


@settings(max_examples=60, deadline=None)
@given(sample_lists())
def test_the_mask_is_causal_within_each_sample(samples: list[Sample]) -> None:
    for batch in pack(samples, microbatch_tokens=LENGTH, seed=0, epoch=0):
        mask = attention_mask(batch)
        assert mask.shape == (1, 1, LENGTH, LENGTH)
        assert mask.dtype == torch.bool
        allowed = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
        for where in segments(batch):
            size = where.stop - where.start
            allowed[where, where] = torch.ones(size, size, dtype=torch.bool).tril()
        assert torch.equal(mask[0, 0, : batch.tokens], allowed[: batch.tokens])
        assert mask[0, 0].diagonal().all()
        assert not mask[0, 0, batch.tokens :, : batch.tokens].any()


def test_shapes_and_types() -> None:
    (batch,) = pack([plain(5)], microbatch_tokens=8, seed=0, epoch=0)
    for tensor in (batch.input_ids, batch.position_ids, batch.labels):
        assert (tensor.shape, tensor.dtype) == ((1, 8), torch.int64)
    assert (batch.segment_ids.shape, batch.segment_ids.dtype) == ((1, 8), torch.int32)


def test_attention_in_a_pack_equals_attention_alone() -> None:
    (batch,) = pack([plain(3), plain(4, 10)], microbatch_tokens=10, seed=0, epoch=0)
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 10, 8).unbind()
    packed = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask(batch))
    assert torch.isfinite(packed).all()
    for where in segments(batch):
        q, k, v = (tensor[:, :, where] for tensor in (query, key, value))
        alone = scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(packed[:, :, where], alone)


@settings(max_examples=60, deadline=None)
@given(sample_lists())
def test_packing_is_first_fit(samples: list[Sample]) -> None:
    batches = pack(samples, microbatch_tokens=LENGTH, seed=0, epoch=0)
    for number, batch in enumerate(batches):
        shortest = min(where.stop - where.start for where in segments(batch))
        assert all(LENGTH - earlier.tokens < shortest for earlier in batches[:number])


def test_seed_and_epoch_decide_the_order() -> None:
    samples = [plain(LENGTH, 100 * n) for n in range(1, 20)]

    def order(seed: int, epoch: int) -> list[int]:
        batches = pack(samples, microbatch_tokens=LENGTH, seed=seed, epoch=epoch)
        return [int(batch.input_ids[0, 0]) for batch in batches]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_a_sample_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="17 tokens does not fit"):
        pack([plain(17)], microbatch_tokens=LENGTH, seed=0, epoch=0)


def test_a_stream_goes_through_epoch_after_epoch() -> None:
    samples = [plain(10, 100 * n) for n in range(1, 6)]
    packed = [batch for epoch in range(2) for batch in pack(samples, microbatch_tokens=LENGTH, seed=3, epoch=epoch)]
    streamed = islice(BatchStream(samples, LENGTH, 3), 10)
    for expected, batch in zip(packed, streamed, strict=True):
        assert torch.equal(batch.input_ids, expected.input_ids)


@pytest.mark.parametrize("done", [0, 3, 5, 7])
def test_a_stream_continues_where_it_was(done: int) -> None:
    samples = [plain(10, 100 * n) for n in range(1, 6)]
    stream = BatchStream(samples, LENGTH, 3)
    for _ in range(done):
        next(stream)
    resumed = BatchStream(samples, LENGTH, 3)
    resumed.restore(stream.state())
    for _ in range(6):
        assert torch.equal(next(resumed).input_ids, next(stream).input_ids)
    assert resumed.state() == stream.state()


def test_many_samples_are_packed_well_and_once() -> None:
    lengths = np.random.default_rng(0).integers(2, LENGTH + 1, 3000)
    samples = [plain(int(length), 100 * number) for number, length in enumerate(lengths)]
    indices = trainable(samples, LENGTH)
    rows = list(pack_rows(samples, indices, LENGTH, seed=0, epoch=0))
    assert sorted(index for row in rows for index in row) == list(range(len(samples)))
    used = [sum(lengths[index] for index in row) for row in rows]
    assert max(used) <= LENGTH
    assert sum(used) > 0.93 * LENGTH * len(rows)


def test_a_stream_packs_no_further_than_it_is_asked() -> None:
    samples = [plain(LENGTH, 100 * number) for number in range(1000)]
    stream = BatchStream(samples, LENGTH, 0)
    seen = [next(stream) for _ in range(3)]
    assert len(stream._packing.rows) == 3
    resumed = BatchStream(samples, LENGTH, 0)
    resumed.restore({"epoch": 0, "index": 2})
    assert torch.equal(next(resumed).input_ids, seen[2].input_ids)


def test_a_stream_refuses_a_position_of_other_data() -> None:
    stream = BatchStream([plain(10)], LENGTH, 0)
    with pytest.raises(HarliError, match="resume with the data"):
        stream.restore({"epoch": 2, "index": 9})
    assert stream.state() == {"epoch": 0, "index": 0}


def test_a_stream_needs_a_target() -> None:
    with pytest.raises(ValueError, match="no sample has a target"):
        BatchStream([Sample([1, 2], [True, False])], LENGTH, 0)
