"""Under steady load, does a server keep its objective while fine-tuning jobs come and go, and its memory its size?

``harli serve`` gets open-loop Poisson requests. In every other block of time jobs are created, paused, resumed,
cancelled and finished; in the blocks between, the operator's switch (``PUT /harli/finetuning``) holds finetuning back,
so that both kinds of block are the same server with the same jobs in memory. Pairs of blocks go without, with, with,
without, and so on, so that a steady drift cancels. The circuit breaker is on, as by default;
each block with jobs begins with it closed.

    harli profile --model small --role mixed && harli train-predictor
    python benchmarks/server_load.py --out benchmarks/results/server_load.json

Flags that are not listed here are those of ``harli serve``, such as ``--predictor`` and ``--param``.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import numpy as np
import openai
import typer
from common import hardware, interval
from rich.console import Console
from server_jobs import Jobs
from server_process import ServerProcess, serving
from server_requests import Requests

from harli.commands.work_bar import WorkBar
from harli.records.schema import REQUESTS, STEPS, UPDATES
from harli.records.summary import summarise
from harli.rows import RequestRecord
from harli.types import Slo

KV_CACHE_GIB = 0.4
"""A block becomes resident with its first use; at the default load all of ``small``'s are used in three minutes."""
TURN_S = 20.0
"""Short turns, so that jobs also take over from one another within a block."""
MEMORY_EVERY_S = 10.0
SETTLED_MINUTES = 3.0
"""Memory may grow until then."""
TIMEOUT_S = 60.0
FINISH_S = 300.0
"""Jobs that are left when the load ends have as long to finish."""
FIGURES = {
    "completed": "decode/requests_completed",
    "failed": "decode/requests_failed",
    "tpot_attainment": "slo/tpot_attainment",
    "tpot_p50_ms": "decode/tpot_p50_ms",
    "tpot_p90_ms": "decode/tpot_p90_ms",
    "tpot_p99_ms": "decode/tpot_p99_ms",
    "ttft_p50_ms": "decode/ttft_p50_ms",
    "ttft_p99_ms": "decode/ttft_p99_ms",
}
"""What is shown of the metrics of ``harli.records.summary``."""


@dataclass(frozen=True)
class Plan:
    """Blocks of time, without and with jobs, at a steady load."""

    blocks: int
    block_s: float
    requests_per_s: float
    slo_tpot_ms: float
    seed: int

    @property
    def duration_s(self) -> float:
        return self.blocks * self.block_s

    @staticmethod
    def has_jobs(block: int) -> bool:
        return block % 4 in (1, 2)


async def measure(server: ServerProcess, model: str, plan: Plan) -> dict[str, Any]:
    """What is seen of the server while it runs, also when it dies or stops answering (``stopped_by``)."""
    url, headers = server.address(), {"Authorization": f"Bearer {server.key}"}
    result: dict[str, Any] = {"stopped_by": None}
    memory: list[tuple[float, float]] = []
    async with (
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=server.key, timeout=TIMEOUT_S) as client,
        httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT_S) as operator,
    ):
        load = {"requests_per_s": plan.requests_per_s, "duration_s": plan.duration_s, "seed": plan.seed}
        requests, jobs = Requests(client, model, **load), Jobs(client, model, server.state / "jobs")
        await requests.warm_up()
        await jobs.upload()
        began_s = time.monotonic()
        sending = asyncio.create_task(requests.run(began_s))
        watching = asyncio.create_task(watch_memory(server, began_s, memory))
        try:
            await go_through(plan, began_s, operator, jobs)
            result["finetune_tokens_per_s"] = await finetune_tokens(operator) / (plan.duration_s / 2)
            await sending
            (await operator.put("/harli/finetuning", json={"enabled": True})).raise_for_status()
            await jobs.finish(FINISH_S)
            result["jobs"] = await jobs.report()
            result["state"] = (await operator.get("/harli/state")).json()
        except (httpx.HTTPError, openai.OpenAIError) as error:
            result["stopped_by"] = f"{type(error).__name__}: {error}"
        finally:
            sending.cancel()
            watching.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)
    return {
        **result,
        "engine_deaths": int(not server.alive),
        **compare(requests.records, plan),
        "memory": {
            "growth_mib_per_minute": growth(memory, SETTLED_MINUTES),
            "growth_mib_per_minute_second_half": growth(memory, memory[-1][0] / 2.0),
            "mib_low_median_high": waves(memory, 4.0 * plan.block_s / 60.0),
            "mib_by_minute": {f"{minute:.2f}": round(mib, 1) for minute, mib in memory},
        },
    }


async def go_through(plan: Plan, began_s: float, operator: httpx.AsyncClient, jobs: Jobs) -> None:
    """Switch finetuning on and off, and see to the jobs, until the last block has ended."""
    with WorkBar(Console(stderr=True), "load", plan.duration_s) as bar:
        for block in range(plan.blocks):
            answer = await operator.put("/harli/finetuning", json={"enabled": plan.has_jobs(block)})
            answer.raise_for_status()
            while (left_s := began_s + (block + 1) * plan.block_s - time.monotonic()) > 0.0:
                if plan.has_jobs(block):
                    await jobs.attend()
                bar.update(time.monotonic() - began_s)
                await asyncio.sleep(min(1.0, left_s))


async def finetune_tokens(operator: httpx.AsyncClient) -> float:
    """Tokens of all updates that the server has committed."""
    lines = (await operator.get("/metrics")).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("harli_finetune_tokens_total "))


async def watch_memory(server: ServerProcess, began_s: float, samples: list[tuple[float, float]]) -> None:
    """Add minutes since the beginning and resident MiB, now and then, until the server ends."""
    while server.alive:
        samples.append(((time.monotonic() - began_s) / 60.0, server.resident_mib()))
        await asyncio.sleep(MEMORY_EVERY_S)


def waves(samples: Sequence[tuple[float, float]], minutes: float) -> list[tuple[float, float, float]]:
    """Lowest, median and highest MiB in each whole span of ``minutes`` once memory has settled.

    Over four blocks jobs take memory and return it, so that a slope through all samples would depend on where they end.
    """
    spans: list[list[float]] = [[] for _ in range(int((samples[-1][0] - SETTLED_MINUTES) // minutes))]
    for minute, mib in samples:
        number = int((minute - SETTLED_MINUTES) // minutes)
        if 0 <= number < len(spans):
            spans[number].append(mib)
    return [(min(span), median(span), max(span)) for span in spans if span]


def growth(samples: Sequence[tuple[float, float]], since_minutes: float) -> float:
    """MiB per minute by least squares, with a level of its own while a job is in memory: 300 to 400 MiB higher."""
    minutes, mib = np.array([sample for sample in samples if sample[0] >= since_minutes]).T
    with_job = mib > (mib.min() + mib.max()) / 2.0
    levels = np.column_stack([minutes, with_job, ~with_job])
    return float(np.linalg.lstsq(levels, mib)[0][0])


def compare(records: Sequence[RequestRecord], plan: Plan) -> dict[str, Any]:
    """Blocks with jobs beside blocks without; a request belongs to the block in which it was due."""
    by_block: list[list[RequestRecord]] = [[] for _ in range(plan.blocks)]
    for record in records:
        by_block[int(record.arrival_s // plan.block_s)].append(record)
    with_jobs = [block for block in range(plan.blocks) if plan.has_jobs(block)]
    without = [block for block in range(plan.blocks) if not plan.has_jobs(block)]
    attained = [figures(found, plan.block_s, plan)["tpot_attainment"] for found in by_block]
    pairs = [(attained[one], attained[other]) for one, other in zip(with_jobs, without, strict=True)]
    losses = [other - one for one, other in pairs if one is not None and other is not None]
    return {
        "with_jobs": figures([one for block in with_jobs for one in by_block[block]], plan.duration_s / 2, plan),
        "without_jobs": figures([one for block in without for one in by_block[block]], plan.duration_s / 2, plan),
        "attainment_with_and_without_by_pair": pairs,
        "attainment_lost": median(losses) if losses else None,
        "attainment_lost_interval_95": interval(losses) if losses else None,
        "errors": dict(Counter(record.error for record in records if record.error)),
    }


def figures(records: Sequence[RequestRecord], duration_s: float, plan: Plan) -> dict[str, float | None]:
    """What requests saw that were due within ``duration_s`` in all; ``busy``: part of it with one or more of them."""
    slo = Slo(tpot_ms=plan.slo_tpot_ms)
    found = summarise(STEPS.table([]), REQUESTS.table(records), UPDATES.table([]), slo=slo, duration_s=duration_s)
    busy_s = until_s = 0.0
    for record in sorted(records, key=lambda record: record.arrival_s):
        busy_s += max(0.0, record.finished_s - max(record.arrival_s, until_s))
        until_s = max(until_s, record.finished_s)
    return {"sent": len(records), **{name: found[key] for name, key in FIGURES.items()}, "busy": busy_s / duration_s}


def main(
    context: typer.Context,
    model: Annotated[str, typer.Option()] = "small",
    policy: Annotated[str, typer.Option()] = "qos",
    slo_tpot_ms: Annotated[float, typer.Option()] = 80.0,
    requests_per_s: Annotated[float, typer.Option(min=0.01)] = 1.2,
    minutes: Annotated[float, typer.Option(help="In whole pairs of blocks.")] = 16.0,
    block_s: Annotated[float, typer.Option(min=1.0)] = 60.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Measure, print, and write the numbers."""
    plan = Plan(2 * int(minutes * 60.0 // (2.0 * block_s)), block_s, requests_per_s, slo_tpot_ms, seed)
    if not plan.blocks:
        raise typer.BadParameter(f"--minutes {minutes:g} is less than two blocks of {block_s:g} s")
    flags = ["--model", model, "--policy", policy, "--slo-tpot-ms", str(slo_tpot_ms)]
    flags += ["--kv-cache-gib", str(KV_CACHE_GIB), "--turn-s", str(TURN_S), *context.args]
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), flags) as server:
        found = asyncio.run(measure(server, model, plan))
        found["exit_code"] = server.end()
    result = {"hardware": hardware(), "flags": flags, **asdict(plan), **found}
    Console().print_json(data=result)
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(main)
    app()
