"""What lending costs a decode step: the lender's bookkeeping, and getting 1,000 blocks back in an emergency.

On vLLM's real scheduler and block pool with prefix caching, without a model. Times are CPU time of the
engine's thread, so that other load on the machine does not count; the emergency's wall time is given too.

    python benchmarks/lending_cost.py --out benchmarks/results/lending_cost.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from common import hardware
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tests' scheduler without a model

from harli.memory.lender import Lender
from harli.memory.need import Need
from tests.memory.builders import BLOCK, request, scheduler, step

PROMPT_TOKENS = 448


def cpu_us(lender: Lender) -> float:
    """Microseconds of this thread that the hook before a step takes."""
    began = time.thread_time_ns()
    lender.before_step(True)
    return (time.thread_time_ns() - began) / 1e3


def bookkeeping(blocks: int, steps: int) -> list[float]:
    """Microseconds of lending in each step: requests come and go, their cached blocks are taken and given back."""
    engine = scheduler(blocks, max_requests=64, max_tokens=2048)
    lender = Lender(engine)
    lender.open(0.9)
    random = np.random.default_rng(0)
    costs_us, sent = [], 0
    for index in range(steps):
        busy = index // 200 % 2 == 0
        if random.random() < (0.5 if busy else 0.02):
            prompt = random.integers(10, 200, PROMPT_TOKENS).tolist()
            engine.add_request(request(f"request-{sent}", prompt, int(random.integers(20, 60))))
            lender.arrived(PROMPT_TOKENS)
            sent += 1
        if not busy and index % 50 == 0:
            lender._need = Need(BLOCK)  # as after a long time without arrivals
        costs_us.append(cpu_us(lender))
        step(engine)
    return costs_us


def emergency(blocks: int, wanted: int) -> tuple[float, float]:
    """Microseconds of CPU and of wall time until ``wanted`` blocks that the borrower does not use are free again."""
    engine = scheduler(blocks, max_requests=64, max_tokens=2048)
    lender = Lender(engine)
    lender.open(1.0)
    lender.idle(wanted=True)
    free = engine.kv_cache_manager.block_pool.get_num_free_blocks()
    count = (free + wanted) * BLOCK // PROMPT_TOKENS + 1
    for index in range(count):
        engine.add_request(request(f"request-{index}", [index] * PROMPT_TOKENS, 4))
    before = lender.owned
    cost_us = cpu_us(lender)
    if before - lender.owned < wanted:
        raise RuntimeError(f"{before - lender.owned} blocks came back, {wanted} were wanted")
    return cost_us, lender.reclaim_ms * 1e3


def main(
    blocks: Annotated[int, typer.Option(help="KV blocks of the engine.")] = 20_000,
    steps: Annotated[int, typer.Option()] = 20_000,
    repeats: Annotated[int, typer.Option(help="Emergencies.")] = 200,
    out: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Measure, print, and write the numbers."""
    costs_us = bookkeeping(blocks, steps)
    reclaims_us, wall_us = zip(*(emergency(blocks, 1000) for _ in range(repeats)), strict=True)
    result: dict[str, Any] = {
        "hardware": hardware(),
        "blocks": blocks,
        "steps": steps,
        "bookkeeping_us_median": median(costs_us),
        "bookkeeping_us_p99": float(np.percentile(costs_us, 99)),
        "bookkeeping_us_max": max(costs_us),
        "reclaim_1000_us_median": median(reclaims_us),
        "reclaim_1000_us_p99": float(np.percentile(reclaims_us, 99)),
        "reclaim_1000_wall_us_median": median(wall_us),
    }
    Console().print_json(data=result)
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
