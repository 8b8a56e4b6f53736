"""SMs granted to each part, matrix speed on each of them, cost of a switch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import numpy as np
from basics import make_partitioner, quantiles, timed_ms


def measure(result: dict[str, Any]) -> Iterator[None]:
    import torch

    partitioner = make_partitioner()
    result["device"] = {"name": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    result["shares"] = [str(share) for share in partitioner.menu.shares]
    result["reason"] = partitioner.reason
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    torch.cuda.synchronize()
    speeds = result["matrix_tflops"] = {}
    for side, streams in (("decode", partitioner.decode_streams), ("finetune", partitioner.finetune_streams)):
        for units, stream in streams.items():
            times = timed_ms(stream, lambda: left @ right)
            speeds[f"{side} {units}"] = 2 * 8192**3 / float(np.median(times)) / 1e9
            yield
    partitioner.adopt_decode()
    costs = []
    for units in islice(cycle(partitioner.decode_streams), 4000):
        began = time.perf_counter()
        partitioner.set_decode(units)
        costs.append((time.perf_counter() - began) * 1e6)
    torch.cuda.synchronize()
    result["set_decode_us"] = quantiles(costs[100:])
