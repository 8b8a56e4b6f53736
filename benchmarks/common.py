"""What the benchmarks share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from harli.engine import device

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


def hardware() -> dict[str, Any]:
    """Device and versions, for the results."""
    return {**device.describe(), "versions": device.versions()}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    resampled = np.random.default_rng(0).choice(np.asarray(values), (10_000, len(values)))
    low, high = np.percentile(np.median(resampled, axis=1), [2.5, 97.5])
    return float(low), float(high)


async def requests(engine: AsyncLLM, count: int, *, prompt_tokens: int, output_tokens: int) -> None:
    """Serve ``count`` equal requests side by side."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    async def serve(index: int) -> None:
        params = SamplingParams(
            max_tokens=output_tokens,
            ignore_eos=True,
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = {"prompt_token_ids": [index % 200] * prompt_tokens}
        async for _ in engine.generate(prompt, params, f"benchmark-{index}"):
            pass

    await asyncio.gather(*(serve(index) for index in range(count)))
