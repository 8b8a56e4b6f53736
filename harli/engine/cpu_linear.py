"""vLLM's linear layers on CPU: keep the plain weights, and make their speed independent of earlier shares.

vLLM packs each weight for oneDNN and drops the plain one, which finetuning reads. And oneDNN keeps,
for each layer shape and number of rows, the primitive of the team that first ran it: one first run by
a team of one stays as slow as on one core, whatever the team later (measured: 1.7 to 1.9 times). So
every primitive is made by the whole team, and none is ever dropped. Run by a smaller team it costs
about 6% more than one made for that team.

A row count takes 1.5 to 4 MiB of primitives in all layers of a 200M model. Batches of decode are run as they are;
prompts have any length, so theirs are padded to one of few row counts, or memory would grow with every new length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harli.compute import openmp

GRAIN = 16
Linear = Any
"""One of vLLM's linear layers: a module with ``weight``, ``cpu_linear`` and perhaps ``bias``."""


@contextmanager
def patched_linears(max_batch: int, max_rows: int) -> Iterator[list[Linear]]:
    """While a model loads inside, its linear layers keep their weights; yields the list of those layers.

    ``max_batch``: most requests in a step, ``max_rows``: most tokens. A step of more than ``max_batch`` tokens is
    padded (``padded_rows``); primitives for all row counts that this leaves are kept.
    """
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers import utils

    dispatch, create = utils.dispatch_cpu_unquantized_gemm, ops.create_onednn_mm
    layers: list[Linear] = []

    def keep_weight(layer: Linear, remove_weight: bool) -> None:
        dispatch(layer, remove_weight=False)
        if hasattr(layer, "cpu_linear") and layer.weight.ndim == 2:
            layers.append(layer)

    counts = len({padded_rows(rows, max_batch) for rows in range(1, max_rows + 1)})
    utils.dispatch_cpu_unquantized_gemm = keep_weight
    ops.create_onednn_mm = lambda weight, primitive_cache_size: create(weight, max(primitive_cache_size, counts))
    try:
        yield layers
    finally:
        utils.dispatch_cpu_unquantized_gemm, ops.create_onednn_mm = dispatch, create
        _wrap(layers, max_batch)


def padded_rows(rows: int, max_batch: int) -> int:
    """With how many rows a layer is run for ``rows``: at most 16, or a sixteenth, more than asked for."""
    if rows <= max_batch:
        return rows
    grain = max(GRAIN, (1 << rows.bit_length()) >> 5)
    return -(-rows // grain) * grain


def warm_up(layers: list[Linear], rows: int) -> None:
    """Run one layer of each shape with 1 to ``rows`` rows, so that no decode step pays for making primitives."""
    shapes = {(layer.weight.shape, layer.weight.dtype, _bias(layer) is None): layer for layer in layers}
    with torch.no_grad():
        for layer in shapes.values():
            for count in range(1, rows + 1):
                x = torch.zeros(count, layer.weight.shape[1], dtype=layer.weight.dtype)
                layer.cpu_linear(x, layer.weight, _bias(layer))


def _bias(layer: Linear) -> Tensor | None:
    bias: Tensor | None = getattr(layer, "bias", None)
    return bias


def _wrap(layers: list[Linear], max_batch: int) -> None:
    """A row count that a layer shape has not seen yet (a prompt's, say) is first run by the whole team."""
    team = torch.get_num_threads()
    seen_by_shape: dict[Any, set[int]] = {}
    for layer in layers:
        seen = seen_by_shape.setdefault((layer.weight.shape, layer.weight.dtype, _bias(layer) is None), set())
        layer.cpu_linear = partial(_linear, layer.cpu_linear, seen, team, max_batch)


def _linear(
    linear: Callable[..., Tensor],
    seen: set[int],
    team: int,
    max_batch: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    count = x.shape[0]
    rows = padded_rows(count, max_batch)
    if rows > count:  # the padded count is its own padding
        x = torch.nn.functional.pad(x, (0, 0, 0, rows - count))
        return _linear(linear, seen, team, max_batch, x, weight, bias)[:count]
    if rows in seen:
        return linear(x, weight, bias)
    seen.add(rows)
    present = torch.get_num_threads()
    openmp.set_team_size(team)
    try:
        return linear(x, weight, bias)
    finally:
        openmp.set_team_size(present)
