"""Synthetic data that obeys a known law, so that tests can compare with the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from harli.types import Menu, Share, UnitTime
from predictor.base import Floats
from predictor.dataset import Dataset, states
from predictor.sources import GROUP_IDS

MENU = Menu((Share(4, 0), Share(3, 1), Share(2, 2), Share(0, 4)))
IDENTITY = {
    "model": "some/model-24M", "role": "decode", "menu": [str(share) for share in MENU.shares],
    "device": {"kind": "cpu", "cores": 4}, "versions": {"vllm": "0.32.0", "torch": "2.13.0"},
}  # fmt: skip
UNIT_TIMES = (UnitTime("forward", 4, 256, 0, 8.0, 10.0), UnitTime("backward", 4, 256, 0, 8.0, 25.0))


def truth_ms(data: Dataset) -> Floats:
    """The law: a linear solo gap, times a slowdown that falls with the batch and grows with the micro-batch."""
    solo = 12.0 + 1.5 * data.batch + 1e-3 * data.context_sum + 3.0 * data.admitted + 0.05 * data.prefill_tokens
    slowdown = 1.0 + data.finetune_units / 4.0 * (0.6 + 1.2 / (1.0 + data.batch / 8.0)) * np.where(
        data.microbatch_tokens > 256, 1.25, 1.0
    )
    return np.where(data.solo, solo, solo * slowdown)


def synthetic(
    points: int = 120,
    steps: int = 30,
    *,
    seed: int = 0,
    noise: float = 0.03,
    menu: Menu = MENU,
    shapes: Sequence[tuple[int, int]] = ((256, 0), (512, 2)),
    max_batch: int = 32,
) -> Dataset:
    """``points`` operating points of ``steps`` rows, shares in turn, gaps ``truth_ms`` times lognormal noise.

    Each point is a group of its own.
    """
    rng = np.random.default_rng(seed)
    share = np.arange(points) % (len(menu.shares) - 1)
    batch = rng.integers(1, max_batch + 1, points)
    context = batch * rng.integers(50, 2000, points)
    shape = np.array(shapes)[rng.integers(0, len(shapes), points)]
    admitting = rng.random(points) < 0.3
    each = np.repeat(np.arange(points), steps)
    rows = len(each)
    data = states(
        menu,
        share[each],
        batch[each],
        context[each] + batch[each] * (np.arange(rows) % steps),
        admitted=admitting[each] * rng.integers(0, 3, rows),
        microbatch_tokens=shape[each, 0],
        kept_layers=shape[each, 1],
    )
    gap_ms = truth_ms(data) * np.exp(rng.normal(0.0, noise, rows))
    tokens = rng.poisson(0.3, rows) * 200.0 * data.finetune_units * gap_ms / 1e3 / 0.3
    return replace(
        data,
        point=each.astype(np.int64),
        group=np.random.default_rng((seed, points)).integers(0, GROUP_IDS, points)[each],
        repeats=np.ones(rows, dtype=bool),
        gap_ms=gap_ms,
        finetune_tokens=tokens,
        identity={**IDENTITY, "menu": [str(share) for share in menu.shares]},
        sha256=f"synthetic-{points}-{steps}-{seed}-{noise}",
        unit_times=UNIT_TIMES,
        finetune_alone_tokens_per_s=900.0,
    )


def write_plain(path: Path, data: Dataset) -> Path:
    """``data`` as a plain table, as ``read_datasets`` takes it."""
    names = ("batch", "context_sum", "context_max", "admitted", "decode_units", "finetune_units", "microbatch_tokens",
             "kept_layers", "gap_ms", "finetune_tokens")  # fmt: skip
    pq.write_table(pa.table({"point": data.point, **{name: getattr(data, name) for name in names}}), path)
    return path
