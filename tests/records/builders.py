"""Synthetic records: rows with harmless defaults, and a small run that looks like one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from harli.records.reader import Record, read_record
from harli.records.schema import FinetuneInfo, RunInfo
from harli.records.summary import summarise
from harli.records.writer import RecordWriter
from harli.rows import RequestRecord, StepRecord, UpdateRecord
from harli.types import Slo

STEP = StepRecord(
    step=0, time_s=0.0, batch=1, context_sum=100, context_max=100, prefill_tokens=0, admitted=0, waiting=0,
    kv_blocks_free=90, kv_blocks_total=100, kv_blocks_lent=0, slack_ms=math.inf, microbatch_tokens=256,
    kept_layers=0, wanted_finetune=0, decode_units=2,
    finetune_units=0, exclusive_ms=0.0, window_ms=0.0, reclaim_ms=math.nan, latency_ms=20.0, gap_ms=25.0,
    predicted_ms=24.0, bound_ms=30.0, finetune_tokens=0.0, decode_cpu_ms=40.0,
    finetune_cpu_ms=0.0, decide_cpu_us=10.0, decide_wall_us=12.0, hook_us=30.0,
)  # fmt: skip
REQUEST = RequestRecord(
    request_id="0", arrival_s=0.0, prompt_tokens=100, output_tokens=1, clipped=False, ttft_ms=50.0, tpot_ms=math.nan,
    queue_wait_ms=5.0, finished_s=0.05, itl_ms=(), error="",
)  # fmt: skip


def run_info(**changes: Any) -> RunInfo:
    given: dict[str, Any] = {
        "name": "synthetic",
        "policy": "fixed",
        "policy_params": {"share": "1/1", "limit": 8, "patience": math.inf, "eager": True},
        "settings": {"params": {"share": "1/1"}, "workload": {"trace": None, "rate_scale": 1.0}},
        "model": "some/model-24M",
        "role": "decode",
        "slo": Slo(itl_ms=30.0, tpot_ms=28.0),
        "menu": ["2/0", "1/1", "0/2"],
        "device": {"kind": "cpu", "units": 2},
        "versions": {"python": "3.11"},
        "started_at": "2026-01-31T12:00:00+00:00",
        "duration_s": 20.0,
        "status": "finished",
        "finetune": FinetuneInfo(state="finished"),
    }
    return RunInfo(**{**given, **changes})


def small_run(folder: Path, **changes: Any) -> Record:
    """20 s of decode with finetuning on one of two cores, idle from 8 s to 12 s; written and read back."""
    info = run_info(**changes)
    writer = RecordWriter(folder, info)
    writer.add_steps(_steps())
    writer.add_requests(_requests())
    writer.add_updates(UpdateRecord(n + 1, 2.0 * (n + 1), 5.0 - 0.1 * n, 200 + n, 1e-4) for n in range(10))
    metrics = summarise(writer.steps, writer.requests, writer.updates, slo=info.slo, duration_s=info.duration_s)
    writer.write(info.model_copy(update={"summary": metrics}))
    return read_record(folder)


def _steps() -> Iterator[StepRecord]:
    split = STEP._replace(decode_units=1, finetune_units=1)
    for number in range(640):
        yield split._replace(
            step=number,
            time_s=number * 0.025 + (4.0 if number >= 320 else 0.0),
            batch=int(4 + 3 * math.sin(number / 50)),
            kv_blocks_free=30,
            kv_blocks_lent=60 if number < 320 else 20,
            reclaim_ms=0.2 if number == 320 else math.nan,
            gap_ms=math.nan if number in (0, 320) else 25.0,
        )


def _requests() -> Iterator[RequestRecord]:
    rng = np.random.default_rng(0)
    for number in range(40):
        arrival_s = 0.3 * number + (6.0 if number >= 20 else 0.0)
        gaps_ms = tuple((25.0 + 8.0 * rng.random(40)).tolist())
        yield REQUEST._replace(
            request_id=str(number),
            arrival_s=arrival_s,
            output_tokens=41,
            tpot_ms=sum(gaps_ms) / 40,
            finished_s=arrival_s + (50.0 + sum(gaps_ms)) / 1000.0,
            itl_ms=gaps_ms,
        )
