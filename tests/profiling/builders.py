"""Synthetic profiles: rows that follow a law, so that what is measured from them is known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from harli.records.profile import PROFILE_STEPS, SEGMENTS, SegmentRecord
from harli.types import Menu
from profiling.plan import Limits, Plan
from tests.records.builders import STEP

MENU = Menu.parse(["2/0", "1/1", "0/2"])
LIMITS = Limits(max_batch=16, max_context=2048, kv_tokens=20_000)


def make_plan(**changes: Any) -> Plan:
    given: dict[str, Any] = {
        "seed": 0, "budget_s": 300.0, "menu": MENU, "limits": LIMITS, "microbatches": (128, 256, 512), "role": "decode",
    }  # fmt: skip
    return Plan(**{**given, **changes})


def tables(plan: Plan, *, noise: float = 0.05, slowdown: float = 1.5, speed: Sequence[float] = (1.0,)) -> Any:
    """Steps and segments of every group of ``plan`` and the reference after each: gap = 10 + batch, lognormal noise.

    ``speed``: factors on the machine's speed, one visit after the other, over and over.
    """
    rng = np.random.default_rng(0)
    steps: list[tuple[Any, ...]] = []
    segments: list[SegmentRecord] = []
    for visit, group in enumerate(one for mine in plan.groups for one in (mine, plan.reference)):
        for segment in plan.script(group, visit):
            beside = segment.share.finetune > 0
            point, number = group.point(segment.share, plan.menu), len(segments)
            segments.append(
                SegmentRecord(
                    segment=number, point=point, group=group.number, purpose=group.purpose, time_s=float(number),
                    decode_units=segment.share.decode, finetune_units=segment.share.finetune, exclusive_ms=0.0, steps=8,
                )
            )  # fmt: skip
            for _ in range(8):
                gap = (10.0 + group.batch) * (slowdown if beside else 1.0) * math.exp(noise * rng.standard_normal())
                gap /= speed[visit % len(speed)]
                row = STEP._replace(
                    time_s=float(number), batch=group.batch, context_sum=sum(group.contexts), gap_ms=gap,
                    decode_cpu_ms=0.95 * gap * segment.share.decode,
                    decode_units=segment.share.decode, finetune_units=segment.share.finetune,
                    finetune_tokens=0.1 * gap if beside else 0.0,
                )  # fmt: skip
                steps.append((number, point, *row))
    return steps_table(steps), SEGMENTS.table(segments)


def steps_table(rows: Iterable[tuple[Any, ...]]) -> pa.Table:
    return PROFILE_STEPS.table(list(rows))
