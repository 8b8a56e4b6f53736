"""A small device, and engines on it, for simulations that take milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harli.config import FinetuneSettings
from harli.rows import RequestRecord, StepRecord, UpdateRecord
from harli.runtime.controller import Controller
from harli.simulate.analytic import AnalyticDevice, Roofline
from harli.simulate.device import Noise
from harli.simulate.engine import SimulatedEngine
from harli.simulate.finetune import UnitClock
from harli.simulate.scheduler import BatchScheduler
from harli.types import Menu, Share, Slo
from harli.workload.base import Request
from policies.base import Policy, PolicyContext
from policies.registry import make_policy

QUIET = Noise(sigma=0.0)
FINETUNE = FinetuneSettings(microbatch_tokens=64)
SMALL = Roofline(
    name="small",
    model="four-layers",
    menu=Menu((Share(4, 0), Share(3, 1), Share(2, 2), Share(0, 4))),
    bandwidth=1e9,
    saturating_units=3,
    flops_by_units=((4, 1e11),),
    interference=0.1,
    layers=4,
    layer_parameters=1e6,
    head_parameters=2e6,
    bytes_per_parameter=2,
    kv_bytes_per_token=4096,
    small_unit_ms=0.5,
)


def device(noise: Noise = QUIET, finetune: FinetuneSettings = FINETUNE, seed: int = 0) -> AnalyticDevice:
    return AnalyticDevice(SMALL, finetune, noise, seed)


def policy(name: str, **params: Any) -> Policy:
    small = device()
    return make_policy(name, params, PolicyContext(small.menu, Slo(), predictor=small.predictor, background=False))


@dataclass
class Outcome:
    steps: list[StepRecord]
    requests: list[RequestRecord]
    updates: list[UpdateRecord]
    engine: SimulatedEngine
    scheduler: BatchScheduler
    finetune: UnitClock
    controller: Controller


def simulated(
    requests: Sequence[Request],
    chosen: Policy,
    *,
    noise: Noise = QUIET,
    finetune: FinetuneSettings = FINETUNE,
    duration_s: float = 1.0,
    seed: int = 0,
    role: str = "decode",
    max_num_seqs: int = 8,
    kv_blocks: int = 1000,
    max_num_batched_tokens: int = 64,
    slo_tpot_ms: float | None = 50.0,
    trains: bool = True,
) -> Outcome:
    """What became of ``requests`` on the small device; ``trains``: there is something to finetune."""
    on = device(noise, finetune, seed)
    scheduler = BatchScheduler(
        max_num_seqs=max_num_seqs,
        kv_blocks=kv_blocks,
        max_num_batched_tokens=max_num_batched_tokens,
        prefilled=role == "decode",
        slo_tpot_ms=slo_tpot_ms,
    )
    clock = UnitClock(on, finetune, np.random.default_rng(seed))
    clock.state.ready = trains
    controller = Controller(chosen, "chosen")
    engine = SimulatedEngine(on, scheduler, clock, controller)
    for _ in engine.run(requests, duration_s):
        pass
    return Outcome(list(controller.rows), engine.finished, clock.updates, engine, scheduler, clock, controller)
