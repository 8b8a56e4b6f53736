"""What Harli's hooks cost a decode step when nothing is finetuned.

One engine, one batch; the hooks are switched off and on every 200 steps. Each on-block is compared
with the off-blocks before and after it, and the ratio's 95% interval is a bootstrap over blocks.

    python benchmarks/hook_cost.py --model tiny --blocks 60 --out benchmarks/results/hook_cost_tiny.json
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from common import hardware, interval
from rich.console import Console

from harli.config import EngineSettings
from harli.engine.launch import command, launched
from harli.rows import StepRecord

BLOCK_STEPS = 200
WARM_UP_STEPS = 5
"""Steps at the beginning of a block that are not counted."""


async def measure(model: str, batch: int, blocks: int) -> tuple[list[list[float]], list[StepRecord]]:
    """Client-side gaps of each block, off-blocks at even places, and the engine's rows of the on-blocks."""
    async with launched(EngineSettings(model=model, max_num_seqs=batch, max_model_len=4096)) as engine:
        await command(engine, "begin", "separate", {}, {"tpot_ms": 1e6}, 0)
        tokens = 0
        gaps: list[list[float]] = []
        async for gap in _gaps(engine, batch, (2 * blocks + 1) * BLOCK_STEPS + 2):
            if tokens % BLOCK_STEPS == 0:
                await command(engine, "set_hooks", len(gaps) % 2 == 1)
                gaps.append([])
            gaps[-1].append(gap)
            tokens += 1
        rows = await command(engine, "drain")
    return gaps[: 2 * blocks + 1], [StepRecord(*row) for row in rows["steps"]]


async def _gaps(engine: Any, batch: int, tokens: int) -> AsyncIterator[float]:
    """Milliseconds between the tokens of one request, ``batch - 1`` others running beside it.

    Requests are as long as the model allows, and replaced together when they end.
    """

    from vllm.sampling_params import RequestOutputKind, SamplingParams

    async def follow(index: int, length: int, queue: asyncio.Queue[float | None] | None) -> None:
        params = SamplingParams(
            max_tokens=length, ignore_eos=True, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        prompt = {"prompt_token_ids": [index % 200] * 256}
        last = 0.0
        async for _ in engine.generate(prompt, params, f"hook-{index}-{time.monotonic()}"):
            now = time.monotonic()
            if queue is not None and last:
                queue.put_nowait((now - last) * 1e3)
            last = now
        if queue is not None:
            queue.put_nowait(None)

    while tokens > 0:
        length = min(tokens, 3600)
        queue: asyncio.Queue[float | None] = asyncio.Queue()
        serving = [asyncio.create_task(follow(i, length, queue if i == 0 else None)) for i in range(batch)]
        while (gap := await queue.get()) is not None:
            yield gap
        await asyncio.gather(*serving)
        tokens -= length


def main(
    model: Annotated[str, typer.Option()] = "small",
    batch: Annotated[int, typer.Option()] = 4,
    blocks: Annotated[int, typer.Option(help="On-blocks; off-blocks stand before and after each.")] = 12,
    out: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Measure, print, and write the numbers."""
    gaps, rows = asyncio.run(measure(model, batch, blocks))
    medians = [median(block[WARM_UP_STEPS:]) for block in gaps]
    ratios = [2 * medians[i] / (medians[i - 1] + medians[i + 1]) for i in range(1, len(medians) - 1, 2)]
    own_us = [row.decide_wall_us + row.hook_us for row in rows]
    result = {
        "hardware": hardware(),
        "model": model,
        "batch": batch,
        "step_ms": median(medians[::2]),
        "ratio_on_over_off": median(ratios),
        "interval_95": interval(ratios),
        "hooks_us_median": median(own_us),
        "hooks_us_p99": float(np.percentile(own_us, 99)),
        "decision_cpu_us_p99": float(np.percentile([row.decide_cpu_us for row in rows], 99)),
        "blocks": len(ratios),
    }
    Console().print_json(data=result)
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
