"""Does the latency of a share depend on the share before it?

Decode runs with a fixed batch while the share changes every few steps, every ordered pair of shares
equally often, with finetuning beside it. For each share, latencies after each other share are compared
with its latencies over all. Every batch size is first run by the smallest team, which used to leave it
slow for good.

    python benchmarks/share_drift.py --batches 2,8,18 --rounds 6 --out benchmarks/results/share_drift.json
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from common import hardware, interval, requests
from rich.console import Console
from rich.table import Table

from harli.config import EngineSettings, FinetuneSettings
from harli.engine.launch import command, launched
from harli.finetune.builtin import write_builtin_dataset
from harli.rows import StepRecord

BLOCK_STEPS = 10
SETTLE_STEPS = 2
"""Steps at the beginning of a block that are not counted: a unit of the share before may still run."""


async def measure(model: str, batches: list[int], rounds: int, data: Path) -> dict[int, list[StepRecord]]:
    """Steps of every batch size, all under ``ShareBlocks``."""
    steps: dict[int, list[StepRecord]] = {}
    async with launched(EngineSettings(model=model, max_num_seqs=64)) as engine:
        await command(engine, "finetune", FinetuneSettings(data=data).model_dump_json(), None, None)
        for batch in batches:
            policy = f"{Path(__file__).with_name('share_blocks.py')}:ShareBlocks"
            params = {"block_steps": str(BLOCK_STEPS)}
            begun = await command(engine, "begin", policy, params, {}, batch)
            blocks = 1 + rounds * len(begun["menu"][:-1]) ** 2 * 4
            await requests(engine, batch, prompt_tokens=256, output_tokens=blocks * BLOCK_STEPS + 1)
            rows = await command(engine, "drain")
            steps[batch] = [StepRecord(*row) for row in rows["steps"]]
    return steps


def by_predecessor(steps: list[StepRecord], batch: int) -> dict[str, dict[str, list[float]]]:
    """Ratios of each state (share, with or without a window), by the state of the block before.

    A block's median latency is divided by the mean of the medians of the same state's blocks before and
    after it, whatever preceded those: the machine's own slow drift cancels.
    """
    full = [step for step in steps if step.batch == batch and not step.admitted]
    blocks = [full[i : i + BLOCK_STEPS] for i in range(0, len(full) - BLOCK_STEPS + 1, BLOCK_STEPS)]
    states = [_state(block[-1]) for block in blocks]
    medians = [median(step.latency_ms for step in block[SETTLE_STEPS:]) for block in blocks]
    ratios: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for state in set(states):
        places = [i for i, other in enumerate(states) if other == state]
        for before, here, after in zip(places, places[1:], places[2:], strict=False):
            ratios[state][states[here - 1]].append(2 * medians[here] / (medians[before] + medians[after]))
    return ratios


def latency_ms(steps: list[StepRecord], batch: int, state: str) -> float:
    """Median latency of a state."""
    return median(
        step.latency_ms for step in steps if step.batch == batch and not step.admitted and _state(step) == state
    )


def _state(step: StepRecord) -> str:
    units = step.decode_units + step.finetune_units
    window = " after a window" if step.exclusive_ms else ""
    return f"{step.decode_units}/{step.wanted_finetune}{window}" if units else "?"


def main(
    model: Annotated[str, typer.Option()] = "small",
    batches: Annotated[str, typer.Option(help="Comma-separated batch sizes.")] = "1,8,18,40",
    rounds: Annotated[int, typer.Option(help="How often each pair of states follows one another.")] = 3,
    out: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Measure, print a table, and write the numbers."""
    data = Path(out.parent if out else Path.cwd(), ".share_drift.jsonl")
    write_builtin_dataset(data)
    try:
        sizes = [int(size) for size in batches.split(",")]
        measured = asyncio.run(measure(model, sizes, rounds, data))
    finally:
        data.unlink()
    result: dict[str, Any] = {"hardware": hardware(), "model": model, "batches": {}}
    table = Table("batch", "state", "median ms", "after", "ratio", "95% interval", "blocks")
    worst = 0.0
    for batch, steps in measured.items():
        for state, groups in sorted(by_predecessor(steps, batch).items()):
            overall = latency_ms(steps, batch, state)
            rows = {}
            for before, ratios in sorted(groups.items()):
                ratio = median(ratios)
                low, high = interval(ratios)
                worst = max(worst, abs(ratio - 1.0))
                rows[before] = {"ratio": ratio, "interval_95": [low, high], "blocks": len(ratios)}
                table.add_row(
                    *(str(batch), state, f"{overall:.2f}", before),
                    *(f"{ratio:.3f}", f"{low:.3f} to {high:.3f}", str(len(ratios))),
                )
            result["batches"].setdefault(str(batch), {})[state] = {"median_ms": overall, "after": rows}
    result["worst_deviation"] = worst
    Console().print(table, f"largest deviation {worst:.1%}")
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
