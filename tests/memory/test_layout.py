"""From KV tensors to bytes: block ``b`` of every region is block ``b`` of the cache, whatever its layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harli.memory.layout import UnknownLayout, block_regions

BLOCKS, LAYERS, SHAPE = 6, 3, (2, 4, 8)


def layer_by_layer() -> list[torch.Tensor]:
    buffer = torch.zeros(LAYERS, BLOCKS, *SHAPE, dtype=torch.bfloat16)
    return [layer.transpose(2, 3) for layer in buffer]


def block_by_block() -> list[torch.Tensor]:
    buffer = torch.zeros(BLOCKS, LAYERS, *SHAPE, dtype=torch.bfloat16)
    return [buffer[:, layer] for layer in range(LAYERS)]


def in_parts() -> list[torch.Tensor]:
    return [torch.zeros(2 * BLOCKS, *SHAPE) for _ in range(LAYERS)]


@pytest.mark.parametrize(
    ("caches", "regions"), [(layer_by_layer(), LAYERS), (block_by_block(), 1), (in_parts(), LAYERS)]
)
def test_a_block_is_the_same_block_in_bytes(caches: list[torch.Tensor], regions: int) -> None:
    found = block_regions(caches, BLOCKS)
    assert len(found) == regions
    assert sum(region.numel() for region in found) == sum(cache.nbytes for cache in caches)
    page = found[0].numel() // BLOCKS
    for region in found:
        region[4 * page : 5 * page] = 1
    for cache in caches:
        blocks = cache.contiguous().view(torch.uint8).reshape(BLOCKS, -1)
        assert [bool(block.all()) for block in blocks] == [block == 4 for block in range(BLOCKS)]
        assert [bool(block.any()) for block in blocks] == [block == 4 for block in range(BLOCKS)]


def test_layers_that_share_a_cache_count_once() -> None:
    caches = layer_by_layer()
    assert len(block_regions([*caches, caches[0]], BLOCKS)) == LAYERS


@pytest.mark.parametrize(
    ("caches", "reason"),
    [
        ([], "no KV cache"),
        ([torch.zeros(6, 4), torch.zeros(6, 8)], "differ in shape"),
        ([torch.zeros(2, BLOCKS, 8)], r"\[2, 6, 8\] is not in 6 blocks"),
        ([torch.zeros(4, BLOCKS, 8).transpose(0, 1)], "not one piece of memory"),
        ([torch.zeros(BLOCKS, 2, 8)[:, 0]], "blocks of 32 bytes lie 64 bytes apart"),
    ],
)
def test_another_layout_is_refused_with_the_reason(caches: list[torch.Tensor], reason: str) -> None:
    with pytest.raises(UnknownLayout, match=reason):
        block_regions(caches, BLOCKS)


def test_the_engines_cache_is_understood(host: Any) -> None:
    def agree(worker: Any) -> bool:
        from harli.memory.layout import block_regions

        blocks = worker.cache_config.num_gpu_blocks
        caches = worker.model_runner.kv_caches
        regions = block_regions(caches, blocks)
        page = regions[0].numel() // blocks
        last = regions[-1][-page:]
        before = last.clone()
        last.fill_(1)
        expected = float(last[:4].view(caches[-1].dtype)[0])
        same = all(
            bool((cache[-1] == expected).all()) == (index == len(caches) - 1) for index, cache in enumerate(caches)
        )
        last.copy_(before)
        return len(regions) == len(caches) and same

    assert host.call_worker(agree)
