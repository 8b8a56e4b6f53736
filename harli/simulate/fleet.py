"""One stream of requests behind a router, and many instances that decode and finetune, simulated side by side.

Every instance is a simulation of its own: its device with its noise, its policy object and its finetuning job, all
with a seed that follows from the fleet's and the instance's number. Of each only a row of metrics is kept.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, FiniteFloat, PositiveInt

from harli.config import Settings
from harli.engine.device import versions
from harli.records.schema import SCHEMA_VERSION, Info
from harli.records.summary import METRICS
from harli.records.writer import make_folder, replacing
from harli.simulate.devices import make_device
from harli.simulate.processes import spread
from harli.simulate.routing import Router, planned_step_s, route
from harli.simulate.run import Simulation, SimulationSettings
from harli.simulate.savings import gpu_hours_per_day
from harli.types import FinetuneState
from harli.workload.base import Request, Workload

FLEET_FILE = "fleet.json"
INSTANCES_FILE = "instances.parquet"

ROW = pa.schema(
    [
        pa.field("instance", pa.int64(), nullable=False),
        pa.field("requests", pa.int64(), nullable=False),
        pa.field("gaps", pa.int64(), nullable=False),
        pa.field("several", pa.int64(), nullable=False),
        pa.field("failure", pa.string(), nullable=False),
        *(pa.field(name, pa.float64()) for name in METRICS),
    ]
)
"""Of ``instances.parquet``: requests sent to the instance, output tokens after the first that they ask for, requests
for two or more, why finetuning stopped if it did, and the metrics of ``harli.records.summary``."""

Row = dict[str, Any]


class FleetSettings(Settings):
    """Everything that ``harli simulate --instances`` needs."""

    instances: PositiveInt
    router: Router = "round-robin"
    instance: SimulationSettings
    """Of every instance; its workload is the whole fleet's, and so is its seed."""


class FleetInfo(Info):
    """``fleet.json``: what was simulated, and what it yields in all."""

    @classmethod
    def described(cls) -> str:
        return "a simulated fleet"

    schema_version: int = SCHEMA_VERSION
    fleet_id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    kind: Literal["fleet"] = "fleet"
    simulated: Literal[True] = True
    settings: FleetSettings
    model: str
    workload: str
    planned_step_ms: float
    """What the router reckoned with."""
    versions: dict[str, str]
    started_at: str
    """ISO 8601, UTC."""
    summary: dict[str, FiniteFloat | None]
    failed: int
    """Instances whose finetuning stopped."""


class Fleet:
    """Making it checks the settings and routes the requests; nothing is written before ``execute``."""

    def __init__(self, settings: FleetSettings, predictor: Path | None, workload: Workload) -> None:
        """``predictor``: the folder that ``harli.simulate.devices.predictor_folder`` found for the device.

        ``workload``: the fleet's requests; those of a trace begin again until the duration is over.

        Raises HarliError for whatever the user can mend.
        """
        one = settings.instance
        duration_s, instances = one.workload.duration_s, settings.instances
        self.settings = settings
        self.workload = _repeated(workload, duration_s) if one.workload.trace else workload
        self._predictor = predictor
        device = make_device(one.device, predictor, one.finetune, one.noise, one.workload.seed)
        Simulation(one, device, self.workload)  # raises what an instance would
        self.model = device.model
        self.dedicated_tokens_per_s = device.dedicated_tokens_per_s(one.finetune.microbatch_tokens)
        finetune = FinetuneState(ready=True, microbatch_tokens=one.finetune.microbatch_tokens)
        requests = self.workload.requests
        per_s = len(requests) / duration_s / instances
        self._step_s = planned_step_s(device.predictor, finetune, requests, per_s, one.engine.max_num_seqs)
        self._parts = route(settings.router, requests, instances, self._step_s)

    def execute(self, folder: Path, jobs: int | None, on_progress: Callable[[int], None]) -> FleetInfo:
        """Simulate all instances in ``jobs`` processes, and write ``folder`` when all have ended.

        ``on_progress`` hears how many have. Stopped early, Ctrl-C included, it leaves nothing. Raises HarliError when
        the folder is not empty or a process dies.
        """
        started_at = datetime.now(UTC).isoformat()
        make_folder(folder)
        try:
            rows = self._simulate(jobs, on_progress)
        except BaseException:
            folder.rmdir()
            raise
        info = FleetInfo(
            settings=self.settings,
            model=self.model,
            workload=self.workload.name,
            planned_step_ms=1e3 * self._step_s,
            versions=versions(),
            started_at=started_at,
            summary=summarise_fleet(rows, self.dedicated_tokens_per_s),
            failed=sum(bool(row["failure"]) for row in rows),
        )
        with replacing(folder / INSTANCES_FILE) as path:
            pq.write_table(pa.Table.from_pylist(rows, schema=ROW), path, compression="zstd")
        with replacing(folder / FLEET_FILE) as path:
            path.write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return info

    def _simulate(self, jobs: int | None, on_progress: Callable[[int], None]) -> list[Row]:
        """A row per instance, in order."""
        one = self.settings.instance
        tasks = [(one, self._predictor, place, part) for place, part in enumerate(self._parts)]
        rows: dict[int, Row] = {}
        for place, row in spread(simulate_instance, tasks, jobs):
            rows[place] = row
            on_progress(len(rows))
        return [rows[place] for place in range(len(rows))]


def simulate_instance(
    settings: SimulationSettings, predictor: Path | None, place: int, requests: tuple[Request, ...]
) -> Row:
    """A row of ``ROW``: instance number ``place`` of the fleet that ``settings`` describes, with its own requests."""
    seed = int(np.random.SeedSequence((settings.workload.seed, place)).generate_state(1)[0])
    workload = settings.workload.model_copy(update={"seed": seed})
    settings = settings.model_copy(update={"workload": workload})
    device = make_device(settings.device, predictor, settings.finetune, settings.noise, seed)
    info, _ = Simulation(settings, device, Workload(f"instance {place}", requests)).measure()
    return {
        "instance": place,
        "requests": len(requests),
        "gaps": sum(request.output_tokens - 1 for request in requests),
        "several": sum(request.output_tokens > 1 for request in requests),
        "failure": info.finetune.reason,
        **info.summary,
    }


def summarise_fleet(rows: Sequence[Row], dedicated_tokens_per_s: float) -> dict[str, float | None]:
    """The metrics of a fleet, from those of its instances; None where there is no data.

    Rates are sums. Attainments are over all output tokens, or requests, of the fleet; the worst instance's stand
    beside them. ``finetune/gpu_hours_per_day`` is what ``harli.simulate.savings`` makes of the sum.
    """

    def known(name: str) -> list[float]:
        return [row[name] for row in rows if row[name] is not None]

    tokens_per_s = sum(known("finetune/tokens_per_s"))
    return {
        "fleet/instances": float(len(rows)),
        "decode/requests_completed": sum(known("decode/requests_completed")),
        "decode/requests_failed": sum(known("decode/requests_failed")),
        "decode/requests_per_s": sum(known("decode/requests_per_s")),
        "decode/output_tokens_per_s": sum(known("decode/output_tokens_per_s")),
        "decode/batch_mean": float(np.mean(known("decode/batch_mean"))) if known("decode/batch_mean") else None,
        "decode/queue_wait_p99_worst_ms": max(known("decode/queue_wait_p99_ms"), default=None),
        "slo/itl_attainment": _weighted(rows, "slo/itl_attainment", "gaps"),
        "slo/itl_attainment_worst": min(known("slo/itl_attainment"), default=None),
        "slo/tpot_attainment": _weighted(rows, "slo/tpot_attainment", "several"),
        "slo/tpot_attainment_worst": min(known("slo/tpot_attainment"), default=None),
        "finetune/tokens_per_s": tokens_per_s,
        "finetune/tokens_per_s_dedicated": dedicated_tokens_per_s,
        "finetune/gpu_hours_per_day": gpu_hours_per_day(tokens_per_s, dedicated_tokens_per_s),
    }


def _weighted(rows: Sequence[Mapping[str, Any]], name: str, weight: str) -> float | None:
    """The mean of a metric over the instances that have it, each counted ``weight`` times."""
    known = [(row[name], row[weight]) for row in rows if row[name] is not None]
    return sum(value * times for value, times in known) / sum(times for _, times in known) if known else None


def _repeated(trace: Workload, duration_s: float) -> Workload:
    """A trace's requests, again and again until ``duration_s``: at a fleet's rate a public one is over in seconds.

    The pause between two passes is the mean gap between arrivals.
    """
    requests = trace.requests
    period_s = requests[-1].arrival_s * len(requests) / max(len(requests) - 1, 1)
    if not period_s:
        return trace
    begins_s = (number * period_s for number in range(math.ceil(duration_s / period_s)))
    moved = (request._replace(arrival_s=request.arrival_s + begin_s) for begin_s in begins_s for request in requests)
    return replace(trace, requests=tuple(takewhile(lambda request: request.arrival_s < duration_s, moved)))
