"""One simulated run, from settings to a record that looks like a real run's and says that it is simulated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import PositiveInt

from harli.config import BATCHED_TOKENS, RunSettings
from harli.engine.device import versions
from harli.records.schema import FinetuneInfo, PredictorInfo, RunInfo
from harli.records.summary import summarise
from harli.records.writer import RecordWriter, Tables
from harli.runtime.controller import Controller
from harli.simulate.device import Device, Noise
from harli.simulate.engine import SimulatedEngine
from harli.simulate.finetune import UnitClock
from harli.simulate.oracle import Foresight, Oracle
from harli.simulate.scheduler import BatchScheduler
from harli.simulate.served import blocks
from harli.types import HarliError
from harli.workload.base import Workload
from policies.base import PolicyContext
from policies.registry import load_policy, make_policy
from predictor.base import Predictor
from predictor.correction import CorrectedPredictor


class SimulationSettings(RunSettings):
    """Everything that ``harli simulate`` needs; finetuning's data and the model's weights do not matter."""

    device: str
    kv_blocks: PositiveInt | None = None
    """Without it, enough for ``max_num_seqs`` requests of ``max_model_len``."""
    noise: Noise = Noise()

    @property
    def cache_blocks(self) -> int:
        """KV blocks of the instance."""
        return self.kv_blocks or 1 + self.engine.max_num_seqs * blocks(self.engine.max_model_len)


class Simulation:
    """Runs once. Making it checks the settings; nothing is written before ``execute``."""

    def __init__(self, settings: SimulationSettings, device: Device, workload: Workload) -> None:
        """Raises HarliError for whatever the user can mend."""
        engine, seed = settings.engine, settings.workload.seed
        slo = settings.slo.objective
        self.workload = workload
        self._duration_s = settings.workload.duration_s
        self.info = _info(settings, device)
        kv_blocks = settings.cache_blocks
        sizes = (blocks(request.prompt_tokens + request.output_tokens) for request in workload.requests)
        longest = max(sizes, default=0)
        if longest >= kv_blocks:
            raise HarliError(
                f"a request needs {longest} KV blocks, {kv_blocks} give {kv_blocks - 1}; raise --kv-blocks"
            )
        scheduler = BatchScheduler(
            max_num_seqs=engine.max_num_seqs,
            kv_blocks=kv_blocks,
            max_num_batched_tokens=max(engine.max_num_seqs, BATCHED_TOKENS),
            prefilled=engine.role == "decode",
            slo_tpot_ms=slo.tpot_ms,
        )
        self.device = device
        self._finetune = UnitClock(device, settings.finetune, np.random.default_rng(seed))
        knows = load_policy(settings.policy) is Oracle
        self._predictor: Predictor = (
            Foresight(device, self._finetune, workload.requests)
            if knows
            else CorrectedPredictor(device.predictor, device.coverage)
        )
        context = PolicyContext(device.menu, slo, seed, self._predictor, engine.max_num_seqs, background=False)
        policy = make_policy(settings.policy, settings.params, context)
        self._controller = Controller(policy, settings.policy, self._predictor)
        self._engine = SimulatedEngine(device, scheduler, self._finetune, self._controller)

    def execute(self, folder: Path, on_progress: Callable[[float], None] = lambda elapsed_s: None) -> RunInfo:
        """Simulate, and write the record in ``folder``; ``on_progress`` hears how many seconds have passed in it.

        What is raised meanwhile, Ctrl-C included, is raised again when the record is written.
        """
        writer = RecordWriter(folder, self.info)
        status: Literal["finished", "interrupted", "failed"] = "failed"
        try:
            self._run(writer, on_progress)
            status = "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            self._drain(writer)
            writer.write(self._ended(status, writer))
        return self.info

    def measure(self, on_progress: Callable[[float], None] = lambda elapsed_s: None) -> tuple[RunInfo, Tables]:
        """Simulate without leaving a record; what that would hold."""
        tables = Tables()
        self._run(tables, on_progress)
        return self._ended("finished", tables), tables

    def _run(self, tables: Tables, on_progress: Callable[[float], None]) -> None:
        for _ in self._engine.run(self.workload.requests, self._duration_s):
            self._drain(tables)
            on_progress(self._engine.now_s)
        self._drain(tables)

    def _drain(self, tables: Tables) -> None:
        tables.add_steps(self._controller.rows)
        tables.add_updates(self._finetune.updates)
        tables.add_requests(self._engine.finished)
        for rows in (self._controller.rows, self._finetune.updates, self._engine.finished):
            rows.clear()
        _ = tables.steps, tables.requests  # as arrow they take a tenth of the memory

    def _ended(self, status: Literal["finished", "interrupted", "failed"], tables: Tables) -> RunInfo:
        """Note what has become of the run."""
        failure, duration_s = self._controller.failure, self._engine.now_s
        predictor = PredictorInfo(
            source=self.device.name, data_sha256=self.device.data_sha256, correction=self._predictor.state()
        )
        finetune = FinetuneInfo(state="failed" if failure else "finished", reason=failure)
        summary = summarise(tables.steps, tables.requests, tables.updates, slo=self.info.slo, duration_s=duration_s)
        known: dict[str, Any] = {"status": status, "finetune": finetune, "predictor": predictor}
        self.info = self.info.model_copy(update=known | {"duration_s": duration_s, "summary": summary})
        return self.info


def _info(settings: SimulationSettings, device: Device) -> RunInfo:
    return RunInfo.begun(
        settings,
        simulated=True,
        menu=[str(share) for share in device.menu.shares],
        device={"kind": "simulated", "name": device.name},
        versions=versions(),
        finetune=FinetuneInfo(state="running"),
    )
