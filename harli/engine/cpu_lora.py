"""vLLM's LoRA on CPU, per adapter rather than per token.

vLLM's own gathers the weights of every token's adapter, and marks a token without one by index -1, which
is the last adapter's: in a step that mixes requests, those of the base model get its part added. Here a
step's rows are grouped by adapter once, and rows without one are left alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import linear
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Rows = list[tuple[int, Tensor]]
"""Slots of adapters, each with the rows that are its."""


class LoraByAdapter(PunicaWrapperCPU):  # type: ignore[misc]
    """Weights are as vLLM keeps them: A ``[slots, 1, rank, in]``, B ``[slots, 1, out, rank]``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tokens: Rows = []
        self._sampled: Rows = []

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(*args, **kwargs)
        self._tokens = _by_slot(self.token_lora_indices)
        self._sampled = _by_slot(self.sampler_indices)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **_: Any,
    ) -> None:
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        for slot, rows in self._tokens:
            begin = 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                _add(y, rows, begin, _shrink(x[rows], a[slot, 0]) * scale, b[slot, 0])
                begin += width

    def add_lora_embedding(self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, *_: Any, **__: Any) -> None:
        for slot, rows in self._tokens:
            _add(y, rows, 0, x[rows], lora_b_stacked[slot, 0])

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **_: Any
    ) -> None:
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        for slot, rows in self._sampled:
            _add(y, rows, 0, _shrink(x[rows], lora_a_stacked[slot, 0]) * scale, lora_b_stacked[slot, 0])


def _by_slot(indices: Tensor) -> Rows:
    return [(slot, (indices == slot).nonzero()[:, 0]) for slot in sorted(set(indices.tolist())) if slot >= 0]


def _shrink(x: Tensor, a: Tensor) -> Tensor:
    """``x A^T`` in float32, as vLLM's kernels have it."""
    return linear(x.float(), a.float())


def _add(y: Tensor, rows: Tensor, begin: int, shrunk: Tensor, b: Tensor) -> None:
    """``y[rows, begin:] += shrunk B^T``, for as many columns as both have: either side may be padded."""
    width = min(b.shape[0], y.shape[1] - begin)
    y[rows, begin : begin + width] += linear(shrunk.to(y.dtype), b[:width].to(y.dtype))
