"""Freed memory goes back to the system."""

from __future__ import annotations

from pathlib import Path

import torch

from harli.engine.heap import return_freed_memory


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def test_what_a_heap_with_holes_has_kept_is_returned() -> None:
    return_freed_memory()
    tensors = [torch.ones(10_000) for _ in range(2_500)]  # small enough for the heap, 95 MiB in all
    pins = tensors[::100]
    full = resident_mib()
    del tensors
    return_freed_memory()
    assert resident_mib() < full - 60.0
    assert len(pins) == 25
