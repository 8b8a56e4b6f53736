"""LoRA on CPU: every row gets its own adapter's part, and none gets another's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

RANK, INPUT, SLOTS = 4, 24, 3
WIDTHS = (16, 8)


def wrapper(adapters: list[int], prefill: bool = True) -> Any:
    """The wrapper told which adapter each row has (0: none); adapter 7 is in the last slot."""
    from vllm.lora.layers import LoRAMapping

    from harli.engine.cpu_lora import LoraByAdapter

    made = LoraByAdapter(64, 16, "cpu")
    mapping = LoRAMapping(tuple(adapters), tuple(adapters), is_prefill=prefill)
    made.update_metadata(mapping, [5, None, 7], SLOTS, 100)
    return made


def weights(width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    return (
        torch.randn(SLOTS, 1, RANK, INPUT, generator=generator),
        torch.randn(SLOTS, 1, width, RANK, generator=generator),
    )


@pytest.mark.parametrize("prefill", [True, False])
@pytest.mark.parametrize("adapters", [[0, 0, 0], [5, 5, 7], [7, 0, 5, 0, 7, 7], [0, 7]])
def test_rows_get_their_own_adapters_part(adapters: list[int], prefill: bool) -> None:
    a, b = zip(*map(weights, WIDTHS), strict=True)
    x, before = torch.randn(len(adapters), INPUT), torch.randn(len(adapters), sum(WIDTHS))
    y = before.clone()
    wrapper(adapters, prefill).add_lora_linear(y, x, a, b, 0.5, WIDTHS)
    slot = {5: 0, 7: 2}
    for row, adapter in enumerate(adapters):
        expected = before[row].clone()
        if adapter:
            index = slot[adapter]
            expected += torch.cat([0.5 * B[index, 0] @ A[index, 0] @ x[row] for A, B in zip(a, b, strict=True)])
        torch.testing.assert_close(y[row], expected, rtol=1e-5, atol=1e-5)


def test_logits_of_rows_without_an_adapter_stay() -> None:
    a, b = weights(16)
    x, before = torch.randn(3, INPUT), torch.randn(3, 20)  # the vocabulary is padded
    y = before.clone()
    wrapper([0, 7, 0]).add_lora_logits(y, x, a, b, 1.0)
    expected = before.clone()
    expected[1, :16] += b[2, 0] @ a[2, 0] @ x[1]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
