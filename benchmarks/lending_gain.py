"""What borrowed KV-cache memory gains a finetuning job.

One engine; jobs with and without lending take turns, with decode idle and beside a light load at the same
share. Finetune tokens/s are those of committed updates; memory is the engine process's peak within a turn,
after every page of the KV cache has been written once, as in an instance that has been in use.

    python benchmarks/lending_gain.py --model small --rounds 3 --out benchmarks/results/lending_gain_small.json
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from common import hardware, interval, requests
from rich.console import Console

from harli.config import EngineSettings, FinetuneSettings
from harli.engine.launch import command, launched
from harli.finetune.builtin import write_builtin_dataset
from harli.rows import UpdateRecord

WARM_UP_UPDATES = 2
"""Updates of a turn that are not counted: memory is lent step by step."""
LOAD = {"prompt_tokens": 256, "output_tokens": 200}


async def measure(model: str, batch: int, rounds: int, turn_s: float) -> list[dict[str, Any]]:
    """One row per turn."""
    settings = EngineSettings(model=model, max_num_seqs=max(batch, 1))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data.jsonl")
        write_builtin_dataset(data)
        async with launched(settings) as engine:
            await engine.collective_rpc(touch_kv_cache)
            for number in range(rounds):
                for busy in (False, True):
                    for lending in (True, False) if number % 2 else (False, True):
                        row = await _turn(engine, data, lending, batch if busy else 0, turn_s)
                        rows.append(row)
                        Console(stderr=True).print(row)
    return rows


async def _turn(engine: Any, data: Path, lending: bool, batch: int, turn_s: float) -> dict[str, Any]:
    job = FinetuneSettings(data=data, lending=lending)
    await command(engine, "drain")
    await command(engine, "finetune", job.model_dump_json(), None, None)
    await engine.collective_rpc(reset_peak)
    at_first = (await engine.collective_rpc(peak_bytes))[0]
    await command(engine, "begin", "static", {"work_conserving": "true"}, {}, 0)
    load = asyncio.create_task(_load(engine, batch))
    end = time.monotonic() + turn_s
    updates: list[UpdateRecord] = []
    while time.monotonic() < end or len(updates) < WARM_UP_UPDATES + 2:
        await asyncio.sleep(0.5)
        updates += [UpdateRecord(*row) for row in (await command(engine, "drain"))["updates"]]
    status = await command(engine, "status")
    peak = (await engine.collective_rpc(peak_bytes))[0]
    await command(engine, "finish")
    load.cancel()
    with suppress(asyncio.CancelledError):
        await load
    while not (await command(engine, "status"))["ended"]:
        await asyncio.sleep(0.1)
    first, *counted = updates[WARM_UP_UPDATES - 1 :]
    return {
        "busy": batch > 0,
        "lending": lending,
        "tokens_per_s": sum(update.tokens for update in counted) / (counted[-1].time_s - first.time_s),
        "peak_bytes": peak,
        "bytes_at_first": at_first,
        "failure": status["finetune_failure"],
        "memory": status["memory"],
    }


async def _load(engine: Any, batch: int) -> None:
    while batch:
        await requests(engine, batch, **LOAD)


def touch_kv_cache(worker: Any) -> None:
    """Make every page of the cache resident (runs in the engine process)."""
    for cache in worker.model_runner.kv_caches:
        cache.zero_()


def reset_peak(worker: Any) -> None:
    """Start a new peak of resident memory (Linux, ``man 5 proc``, ``clear_refs``)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(worker: Any) -> int:
    """Most resident memory since ``reset_peak``."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Gains of neighbouring turns, and what lending adds to the process's memory."""
    found: dict[str, Any] = {}
    for busy in (False, True):
        with_, without = ([row for row in rows if (row["busy"], row["lending"]) == (busy, on)] for on in (True, False))
        gains = [one["tokens_per_s"] / other["tokens_per_s"] for one, other in zip(with_, without, strict=True)]
        extra = [one["peak_bytes"] - other["peak_bytes"] for one, other in zip(with_, without, strict=True)]
        found["beside requests" if busy else "decode idle"] = {
            "tokens_per_s_with": median(row["tokens_per_s"] for row in with_),
            "tokens_per_s_without": median(row["tokens_per_s"] for row in without),
            "gain": median(gains),
            "gain_interval_95": interval(gains),
            "extra_peak_memory_mib": median(extra) / 2**20,
            "borrowed_mib": median(row["memory"]["peak_bytes"] for row in with_) / 2**20,
            "kept_layers": median(row["memory"]["kept_layers"] for row in with_),
        }
    return found


def main(
    model: Annotated[str, typer.Option()] = "small",
    batch: Annotated[int, typer.Option(help="Requests at a time in the light load.")] = 2,
    rounds: Annotated[int, typer.Option()] = 3,
    turn_s: Annotated[float, typer.Option(help="Seconds of a turn.")] = 20.0,
    out: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Measure, print, and write the numbers."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # our own functions, to our own engine process
    rows = asyncio.run(measure(model, batch, rounds, turn_s))
    result = {"hardware": hardware(), "model": model, "batch": batch, **summary(rows), "turns": rows}
    Console().print_json(data=result)
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
