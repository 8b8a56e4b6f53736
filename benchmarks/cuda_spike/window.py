"""Decode, units on the whole device, decode again, ordered by the streams alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from basics import MICROBATCH_TOKENS, make_partitioner, quantiles
from units import UnitLoop


def measure(result: dict[str, Any]) -> Iterator[None]:
    """Step, three units, step; the host submits all of it and waits for nothing."""
    import torch

    partitioner = make_partitioner()
    partitioner.adopt_finetune()
    loop = UnitLoop(partitioner, MICROBATCH_TOKENS)
    weights = torch.randn(1 << 30, dtype=torch.bfloat16, device="cuda")  # 2 GiB to read: a step bound by memory
    units = partitioner.units
    decoding = partitioner.decode_streams[units]
    loop.run_pass(units)
    loop.capture(units)
    rows = []
    for _ in range(20):
        torch.cuda.synchronize()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
        began = time.perf_counter()
        marks[0].record(decoding)
        with torch.cuda.stream(decoding):
            weights.sum()
        marks[1].record(decoding)
        partitioner.set_finetune(units)
        marks[2].record()
        for _ in range(3):
            loop.captured.forward(0, units)
        marks[3].record()
        partitioner.decode_after_finetune()
        marks[4].record(decoding)
        with torch.cuda.stream(decoding):
            weights.sum()
        marks[5].record(decoding)
        submitted_ms = (time.perf_counter() - began) * 1e3
        torch.cuda.synchronize()
        rows.append([submitted_ms, *(a.elapsed_time(b) for a, b in pairwise(marks))])
    names = ("submitting", "step", "to window", "window", "to step", "step after")
    result["ms"] = {name: quantiles(column) for name, column in zip(names, np.array(rows).T, strict=True)}
    result["in order"] = bool((np.array(rows)[:, 1:] >= 0.0).all())
    yield
