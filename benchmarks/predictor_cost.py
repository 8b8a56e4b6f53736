"""What a forecast costs a decode step, and that the table behind it is the model.

Fits the two-stage model to made-up steps of a menu with 3 and one with 9 shares, with as many cells as
its bins allow, and forecasts random states inside and outside the fitted range. Times are the calling
thread's CPU time, the clock's own (printed beside) included; no engine runs.

    python benchmarks/predictor_cost.py --out benchmarks/results/predictor_cost.json
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import hardware
from rich.console import Console

from harli.rows import StepRecord
from harli.types import DecodeState, FinetuneState, Menu, Share
from predictor.artifact import Artifact
from predictor.base import Floats, Predictor
from predictor.bounds import Bounds
from predictor.correction import CorrectedPredictor
from predictor.dataset import Dataset, states
from predictor.table import TablePredictor
from predictor.trees import Cells
from predictor.two_stage import TwoStage

MENUS = {
    "3_shares": Menu((Share(4, 0), Share(2, 2), Share(0, 4))),
    "9_shares": Menu(tuple(Share(16 - 2 * place, 2 * place) for place in range(9))),
}
PARAMS = {f"{stage}_{name}": value for stage in ("solo", "corun") for name, value in
          (("rounds", 200), ("leaves", 12), ("leaf_points", 1.0), ("l2", 0.1))}  # fmt: skip
FINETUNE = FinetuneState(True, 256, 0, 5.0)
MAX_BATCH, MAX_CONTEXT = 48, 4000
COMPARED = 500
"""States whose forecast is compared with the model itself, and forecasts with cold caches."""
WEIGHTS_BYTES = 128 << 20


def steps(menu: Menu, points: int, seed: int) -> Dataset:
    """Operating points of 30 steps each, with lognormal noise."""
    rng = np.random.default_rng(seed)
    point = np.repeat(np.arange(points), 30)
    batch = rng.integers(1, MAX_BATCH + 1, points)[point]
    context = batch * rng.integers(16, MAX_CONTEXT, points)[point]
    tokens = rng.choice([256, 512], points)[point]
    longest = np.minimum(context, 2 * context // batch)
    data = states(
        menu, (np.arange(points) % (len(menu.shares) - 1))[point], batch, context, context_max=longest,
        admitted=rng.integers(0, 4, len(point)), microbatch_tokens=tokens,
    )  # fmt: skip
    part = data.finetune_units / menu.finetune_alone.finetune
    gap_ms = (10.0 + 6.0 * np.sqrt(batch) + 1e-3 * context + 3.0 * data.admitted) * (1.0 + part * tokens / 256)
    gap_ms *= np.exp(rng.normal(0.0, 0.03, len(point)))
    return replace(data, point=point, group=point, gap_ms=gap_ms, finetune_tokens=gap_ms * data.finetune_units * 0.2)


def artifact(menu: Menu) -> Artifact:
    """Fitted and calibrated on different points."""
    data, other = steps(menu, 400, 0), steps(menu, 200, 1)
    model = TwoStage.fit(data, PARAMS, 0)
    bounds = Bounds.calibrate(
        model.predict(other), other.gap_ms, model.predict_solo(other), other.group, 0.99, 0, split=~other.solo
    )
    return Artifact.of(model, bounds, data, {})


def decode_states(reach: float, number: int) -> Iterator[DecodeState]:
    """Random states up to ``reach`` times what was fitted."""
    rng = np.random.default_rng(2)
    for step in count(1):
        if step > number:
            return
        batch = int(rng.integers(1, int(MAX_BATCH * reach) + 1))
        context = batch * int(rng.integers(16, int(MAX_CONTEXT * reach)))
        yield DecodeState(
            time_s=float(step), step=step, batch=batch, context_sum=context,
            context_max=min(context, 2 * context // batch), admitted=int(rng.integers(0, 4)),
        )  # fmt: skip


def microseconds(predictor: Predictor, decodes: list[DecodeState], *, cold: bool = False) -> dict[str, float]:
    """P50 and P99 of ``forecast``, and of two readings of the clock with nothing between them.

    ``cold``: with the caches emptied before each, as a decode step over a large model leaves them.
    """
    clock = time.thread_time_ns
    took, empty = np.empty(len(decodes)), np.empty(len(decodes))
    weights = np.zeros(WEIGHTS_BYTES // 8 if cold else 1)
    for place, decode in enumerate(decodes):
        weights += 1.0
        began = clock()
        predictor.forecast(decode, FINETUNE)
        took[place] = clock() - began
        began = clock()
        empty[place] = clock() - began
    return {
        "p50_us": float(np.percentile(took, 50) / 1e3),
        "p99_us": float(np.percentile(took, 99) / 1e3),
        "clock_p50_us": float(np.median(empty) / 1e3),
    }


def observing(corrected: CorrectedPredictor, decodes: list[DecodeState]) -> dict[str, float]:
    """P50 and P99 of ``observe``, in microseconds."""
    row = StepRecord(**dict.fromkeys(StepRecord._fields, 0))
    noise: Floats = np.exp(np.random.default_rng(3).normal(0.0, 0.03, len(decodes)))
    took = np.empty(len(decodes))
    for place, decode in enumerate(decodes):
        gap_ms = corrected.forecast(decode, FINETUNE).gap_ms[0] * float(noise[place])
        seen = row._replace(step=decode.step, gap_ms=gap_ms, decode_units=corrected.menu.decode_alone.decode)
        began = time.thread_time_ns()
        corrected.observe(seen)
        took[place] = time.thread_time_ns() - began
    return {"p50_us": float(np.percentile(took, 50) / 1e3), "p99_us": float(np.percentile(took, 99) / 1e3)}


def difference(saved: Artifact, table: TablePredictor, decodes: list[DecodeState]) -> float:
    """Largest relative difference between the table's gaps and the model's own."""
    largest = 0.0
    for decode in decodes:
        rows = states(
            saved.menu, np.arange(len(saved.menu.shares) - 1), decode.batch, decode.context_sum,
            context_max=decode.context_max, admitted=decode.admitted, microbatch_tokens=FINETUNE.microbatch_tokens,
        )  # fmt: skip
        ratio = np.array(table.forecast(decode, FINETUNE).gap_ms) / saved.model.predict(rows)
        largest = max(largest, float(np.max(np.abs(ratio - 1.0))))
    return largest


def measure(menu: Menu, number: int) -> dict[str, Any]:
    """All numbers of one menu."""
    saved = artifact(menu)
    began = time.perf_counter()
    table = TablePredictor(saved)
    load_s = time.perf_counter() - began
    inside, outside = list(decode_states(1.0, number)), list(decode_states(2.0, number))
    cells = [len(part.values) for part in saved.model.compiled().trees if isinstance(part, Cells)]
    result: dict[str, Any] = {"cells": cells, "load_s": load_s}
    result["largest_relative_difference"] = difference(saved, table, outside[:COMPARED])
    result["forecast"] = microseconds(table, inside)
    result["forecast_outside_the_data"] = microseconds(table, outside)
    result["forecast_corrected"] = microseconds(CorrectedPredictor(table, 0.99), inside)
    result["forecast_corrected_cold"] = microseconds(CorrectedPredictor(table, 0.99), inside[:COMPARED], cold=True)
    result["observe"] = observing(CorrectedPredictor(table, 0.99), inside)
    return result


def main(
    number: Annotated[int, typer.Option("--states", help="Forecasts per number.")] = 20_000,
    out: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Measure, print, and write the numbers."""
    result = {"hardware": hardware(), **{name: measure(menu, number) for name, menu in MENUS.items()}}
    Console().print_json(data=result)
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
