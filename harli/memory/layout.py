"""Where the blocks of vLLM's KV cache lie in memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class UnknownLayout(ValueError):
    """The KV cache is laid out in a way that blocks cannot be lent from; the message says how."""


def block_regions(caches: Iterable[Tensor], blocks: int) -> list[Tensor]:
    """The memory of a KV cache as regions of bytes in the order of blocks.

    Args:
        caches: the layers' tensors, with blocks (or equal parts of blocks) in dimension 0.
        blocks: number of the engine's blocks.

    Returns:
        uint8 views [blocks * page] of the same memory: block ``b`` is bytes ``[b * page, (b + 1) * page)`` of every
        region. One region per layer, or a single one where the layers' parts of a block lie side by side.

    Raises:
        UnknownLayout: a block is not one piece of memory per layer.
    """
    layers = sorted({cache.data_ptr(): cache for cache in caches}.values(), key=Tensor.data_ptr)
    if not layers:
        raise UnknownLayout("there is no KV cache")
    shapes = {(tuple(layer.shape), layer.stride(), layer.dtype) for layer in layers}
    if len(shapes) > 1:
        raise UnknownLayout("the layers' KV caches differ in shape")
    first = layers[0]
    parts, rest = divmod(first.shape[0], blocks)
    if rest or not parts:
        raise UnknownLayout(f"a KV cache of shape {list(first.shape)} is not in {blocks} blocks")
    page, step = first.nbytes // blocks, first.stride(0) * parts * first.itemsize
    if not _dense(first[0]) or (parts > 1 and step != page):
        raise UnknownLayout(f"a block of strides {list(first.stride())} is not one piece of memory")
    if step == page:
        return [_bytes(layer, blocks * page) for layer in layers]
    starts = [layer.data_ptr() - first.data_ptr() for layer in layers]
    if step == page * len(layers) and starts == list(range(0, step, page)):
        return [_bytes(first, blocks * step)]
    raise UnknownLayout(f"blocks of {page} bytes lie {step} bytes apart")


def _dense(block: Tensor) -> bool:
    """Its elements fill one piece of memory, in whatever order of dimensions."""
    span = sum((size - 1) * stride for size, stride in zip(block.shape, block.stride(), strict=True))
    return span + 1 == block.numel()


def _bytes(start: Tensor, count: int) -> Tensor:
    storage = start.untyped_storage()
    offset = start.data_ptr() - storage.data_ptr()
    return torch.empty(0, dtype=torch.uint8, device=start.device).set_(storage, offset, (count,), (1,))
