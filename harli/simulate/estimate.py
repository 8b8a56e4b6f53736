"""What a production instance would yield: its log, simulated with decode alone and with finetuning beside it.

A log is either a trace of requests (``harli.workload.trace``), played back as it is, or vLLM's metrics over time
(``harli.simulate.metrics_log``), of which a stream of requests that fits them is made. Both assume that the instance
is the device simulated and that requests come whatever their latency: nobody gives up and nobody asks again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from harli.records.schema import RunInfo
from harli.simulate.devices import make_device
from harli.simulate.metrics_log import is_metrics_log, read_metrics_log, reconstruct
from harli.simulate.run import Simulation, SimulationSettings
from harli.simulate.savings import gpu_hours_per_day
from harli.types import HarliError
from harli.workload.base import Workload, fit
from harli.workload.trace import read_trace

DECODE_ALONE = "separate"


@dataclass(frozen=True)
class Log:
    """What a log says about its requests."""

    requests: Workload
    """Cut to the model's length and to the time that is simulated."""
    duration_s: float
    """Of that time."""
    total_s: float
    """Of the whole log."""
    running: float | None
    """Mean number of requests running while there was one, as logged; None where the log does not say."""


@dataclass(frozen=True)
class Estimate:
    """Both simulations of a log."""

    alone: RunInfo
    alone_running: float
    """Mean number of requests running with decode alone while there was one, to hold the logged one against."""
    beside: RunInfo
    gpu_hours_per_day: float
    """That a dedicated GPU of the same kind would need for the finetuning of a day."""


def read_log(path: Path, settings: SimulationSettings) -> Log:
    """The first ``settings.workload.duration_s`` seconds of a log. Raises HarliError for one that is of no use."""
    running: float | None = None
    if is_metrics_log(path):
        metrics = read_metrics_log(path)
        requests = reconstruct(metrics, path.stem, settings.cache_blocks, settings.workload.seed)
        total_s, running = float(metrics.time_s[-1]), float(metrics.running[metrics.running > 0.0].mean())
    else:
        requests = read_trace(path)
        total_s = requests.requests[-1].arrival_s
    if not total_s:
        raise HarliError(f"the log {path} covers no time; it needs requests that arrive one after the other")
    duration_s = min(total_s, settings.workload.duration_s)
    return Log(fit(requests, settings.engine.max_model_len, duration_s=duration_s), duration_s, total_s, running)


def estimate(
    settings: SimulationSettings, predictor: Path | None, log: Log, on_progress: Callable[[float], None]
) -> Estimate:
    """Simulate ``log`` with decode alone and under the policy of ``settings``.

    ``predictor``: the folder that ``harli.simulate.devices.predictor_folder`` found for the device. ``on_progress``
    hears how many seconds have passed in both simulations together. Raises HarliError for whatever the user can mend,
    before anything is simulated.
    """
    if settings.slo.itl_ms is None and settings.slo.tpot_ms is None:
        raise HarliError("an estimate needs an SLO: give --slo-itl-ms or --slo-tpot-ms")
    workload = settings.workload.model_copy(update={"duration_s": log.duration_s})
    beside = settings.model_copy(update={"workload": workload})
    alone = beside.model_copy(update={"policy": DECODE_ALONE, "params": {}})
    simulations = [_simulation(one, predictor, log.requests) for one in (alone, beside)]
    alone_info, alone_running = _measured(simulations[0], on_progress)
    beside_info, _ = _measured(simulations[1], lambda now_s: on_progress(log.duration_s + now_s))
    tokens_per_s = beside_info.summary["finetune/tokens_per_s"] or 0.0
    dedicated_tokens_per_s = simulations[1].device.dedicated_tokens_per_s(settings.finetune.microbatch_tokens)
    return Estimate(alone_info, alone_running, beside_info, gpu_hours_per_day(tokens_per_s, dedicated_tokens_per_s))


def running_mean(steps: pa.Table) -> float:
    """Mean batch over the time in which requests run, as gauges show it; `decode/batch_mean` is one over steps."""
    gap_ms, latency_ms, batch = (steps[name].to_numpy() for name in ("gap_ms", "latency_ms", "batch"))
    return float(np.average(batch, weights=np.where(np.isnan(gap_ms), latency_ms, gap_ms)))


def _measured(simulation: Simulation, on_progress: Callable[[float], None]) -> tuple[RunInfo, float]:
    """Its record's description and ``running_mean``; the tables, which may be large, are gone."""
    info, tables = simulation.measure(on_progress)
    return info, running_mean(tables.steps)


def _simulation(settings: SimulationSettings, predictor: Path | None, requests: Workload) -> Simulation:
    device = make_device(settings.device, predictor, settings.finetune, settings.noise, settings.workload.seed)
    return Simulation(settings, device, requests)
