"""Does a policy find its way back when another process takes a core in the middle of a run?

A fixed batch decodes with finetuning beside it while, every other span of steps, a process of no use keeps one core
busy. Decode alone goes through the same. A policy is back when of ``BACK`` steps in a row at most ``LATE`` are late.

    python benchmarks/disturbed.py --predictor models:/harli-decode-latency@champion --slo-itl-ms 200
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from common import hardware, requests
from rich.console import Console

from harli.config import CHAMPION, EngineSettings, FinetuneSettings
from harli.engine.launch import command, launched, prepare_environment
from harli.finetune.builtin import write_builtin_dataset
from harli.rows import StepRecord
from harli.tracking.registry import load_predictor_folder

BACK = 50
"""Steps that the SLO has to be kept for."""
LATE = 1
SPAN_S = 12.0
SPIN = "while True: pass"


@contextmanager
def busy_core(core: int) -> Iterator[None]:
    """A process that never sleeps, on one core."""
    process = subprocess.Popen([sys.executable, "-c", SPIN], preexec_fn=lambda: os.sched_setaffinity(0, {core}))
    try:
        yield
    finally:
        process.kill()
        process.wait()


async def one_policy(
    engine: Any, policy: str, slo: dict[str, float | None], predictor: str | None, batch: int, spans: int
) -> list[list[StepRecord]]:
    """The steps of every span, quiet and disturbed in turn."""
    await command(engine, "begin", policy, {}, slo, 0, None, predictor)
    serving = asyncio.create_task(requests(engine, batch, prompt_tokens=256, output_tokens=1700))
    await asyncio.sleep(2.0)
    await command(engine, "drain")
    found = []
    core = max(os.sched_getaffinity(0))
    for number in range(spans):
        if number % 2:
            with busy_core(core):
                await asyncio.sleep(SPAN_S)
        else:
            await asyncio.sleep(SPAN_S)
        rows = await command(engine, "drain")
        found.append([StepRecord(*row) for row in rows["steps"]])
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    await asyncio.sleep(1.0)
    return found


def within(steps: list[StepRecord], itl_ms: float) -> float:
    """Fraction of the steps whose gap is within the SLO."""
    gaps = [step.gap_ms for step in steps if step.gap_ms > 0.0]
    return sum(gap <= itl_ms for gap in gaps) / max(len(gaps), 1)


def steps_until_back(steps: list[StepRecord], itl_ms: float) -> int | None:
    """Steps after the disturbance began until the SLO is kept again; None if it never is."""
    for first in range(len(steps) - BACK + 1):
        if sum(step.gap_ms > itl_ms for step in steps[first : first + BACK]) <= LATE:
            return first
    return None


def main(
    slo_itl_ms: Annotated[float, typer.Option()],
    model: Annotated[str, typer.Option()] = "small",
    predictor: Annotated[str, typer.Option()] = CHAMPION,
    policies: Annotated[str, typer.Option()] = "qos,stepwise,reactive",
    batch: Annotated[int, typer.Option()] = 6,
    spans: Annotated[int, typer.Option(help="Quiet and disturbed ones in turn.")] = 4,
    microbatch_tokens: Annotated[int, typer.Option()] = 128,
    out: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Run every policy through the same spans on one engine."""
    prepare_environment()
    slo = {"itl_ms": slo_itl_ms, "tpot_ms": None}
    folder = str(load_predictor_folder(predictor))
    names = ["separate", *policies.split(",")]

    async def measure(data: Path) -> dict[str, list[list[StepRecord]]]:
        async with launched(EngineSettings(model=model, max_num_seqs=48)) as engine:
            finetune = FinetuneSettings(data=data, microbatch_tokens=microbatch_tokens)
            await command(engine, "finetune", finetune.model_dump_json(), None, None)
            return {name: await one_policy(engine, name, slo, folder, batch, spans) for name in names}

    data = (out or Path("disturbed.json")).with_suffix(".data.jsonl")
    write_builtin_dataset(data)
    try:
        found = asyncio.run(measure(data))
    finally:
        data.unlink()
    rows = {}
    for name, steps in found.items():
        rows[name] = {
            "attained_by_span": [within(span, slo_itl_ms) for span in steps],
            "itl_p50_ms_by_span": [median(step.gap_ms for step in span if step.gap_ms > 0.0) for span in steps],
            "steps_until_back": [steps_until_back(span, slo_itl_ms) for span in steps[1::2]],
            "finetune_tokens_per_s": sum(step.finetune_tokens for span in steps for step in span) / (spans * SPAN_S),
        }
    result = {"hardware": hardware(), "model": model, "batch": batch, "slo_itl_ms": slo_itl_ms, "policies": rows}
    Console().print_json(json.dumps(result["policies"]))
    if out:
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
