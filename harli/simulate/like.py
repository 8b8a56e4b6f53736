"""Simulating what a record has measured: the same requests and settings, and both side by side."""

from __future__ import annotations

import math
from typing import NamedTuple

from harli.records.reader import Record
from harli.records.schema import RunInfo
from harli.simulate.device import Device
from harli.types import HarliError
from harli.workload.base import Request, Workload

COMPARED = (
    "decode/tpot_p50_ms",
    "decode/tpot_p90_ms",
    "decode/tpot_p99_ms",
    "decode/itl_p50_ms",
    "decode/itl_p90_ms",
    "decode/itl_p99_ms",
    "finetune/tokens_per_s",
)
"""The metrics that a simulation is judged by."""


class Compared(NamedTuple):
    """One metric of a record and of its simulation; None where there was no data."""

    metric: str
    recorded: float | None
    simulated: float | None
    ratio: float | None
    """Simulated by recorded."""


def recorded_workload(record: Record) -> Workload:
    """The requests of a record. Raises HarliError when it has none."""
    columns = [record.requests[name].to_pylist() for name in Request._fields]
    requests = sorted(Request(*row) for row in zip(*columns, strict=True))
    if not requests:
        raise HarliError(f"the record {record.folder} has no requests to simulate")
    return Workload(record.folder.name, tuple(requests))


def check_predictor(record: Record, device: Device) -> None:
    """Raises HarliError when the run had another predictor than ``device``: its alias, or folder, has another now."""
    used = record.info.predictor
    if used is not None and used.data_sha256 != device.data_sha256:
        raise HarliError(
            f"{device.name} is no longer the predictor that {record.folder} was recorded with; give that one with "
            f"--device: in MLflow its version has the tag data_sha256 {used.data_sha256[:12]}..."
        )


def kv_blocks(record: Record) -> int | None:
    """KV blocks of the engine that was recorded; None if it never took a step."""
    total = record.steps["kv_blocks_total"]
    return int(total[0].as_py()) if len(total) else None


def compare(recorded: RunInfo, simulated: RunInfo) -> list[Compared]:
    """``COMPARED`` of both."""
    return [
        Compared(name, one, other, _ratio(one, other))
        for name in COMPARED
        for one, other in ((recorded.summary.get(name), simulated.summary.get(name)),)
    ]


def _ratio(recorded: float | None, simulated: float | None) -> float | None:
    if not recorded or simulated is None or not math.isfinite(simulated / recorded):
        return None
    return simulated / recorded
