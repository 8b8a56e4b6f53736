"""A comparison in the simulator: the same plan and the same folder, its runs spread over processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from harli.compare.base import Comparison, OnProgress, Progress
from harli.compare.cell import SEPARATE, Entrant
from harli.compare.plan import PRUNING, PlannedRun, expected_s, planned_batches, planned_s
from harli.compare.results import ComparisonFolder
from harli.compare.settings import ComparisonSettings
from harli.config import RunSettings, SloSettings
from harli.simulate.devices import make_device, predictor_folder
from harli.simulate.processes import spread
from harli.simulate.run import Simulation, SimulationSettings
from harli.workload.base import Workload
from harli.workload.make import make_workload


class SimulatedComparison(Comparison):
    """Policies on a simulated device. Every round has noise and request lengths of its own, the same for everyone."""

    def __init__(self, settings: ComparisonSettings, resume: Path | None = None) -> None:
        """``settings`` say what to simulate. Raises HarliError for whatever the user can mend."""
        assert settings.simulation is not None
        self._simulation = settings.simulation
        self.predictor = predictor_folder(self._simulation.device)
        run = settings.run
        device = make_device(
            self._simulation.device, self.predictor, run.finetune, self._simulation.noise, run.workload.seed
        )
        super().__init__(settings, device.menu, resume)
        self._data_sha256 = device.data_sha256
        self.check_predictors()
        self._workloads: dict[int, Workload] = {}
        self.workload = self.round_workload(1)
        if any(len(group) > 1 for group in self.variants):
            self.requests(PlannedRun(PRUNING, SEPARATE))
        trial = self.trial_slo()
        for entrant in self.entrants():
            tried = self.run_settings(PlannedRun(1, entrant))
            slo = SloSettings(itl_ms=trial.itl_ms, tpot_ms=trial.tpot_ms)
            Simulation(tried.model_copy(update={"slo": slo}), device, self.workload)  # raises what a run would

    def device(self) -> dict[str, Any]:
        return {"kind": "simulated", "name": self._simulation.device}

    def data_sha256(self, entrant: Entrant) -> str:
        return self._data_sha256

    def run_settings(self, planned: PlannedRun) -> SimulationSettings:
        run = super().run_settings(planned)
        workload = run.workload.model_copy(update={"seed": self._seed(planned.round)})
        own = {**self._simulation.model_dump(), "workload": workload.model_dump()}
        return SimulationSettings.model_validate({**run.model_dump(), **own, "predictor": self._simulation.device})

    def round_workload(self, number: int) -> Workload:
        seed = self._seed(number)
        if seed not in self._workloads:
            self._workloads[seed] = seeded_workload(self.settings.run, seed)
        return self._workloads[seed]

    def execute(self, folder: Path, jobs: int | None, on_progress: OnProgress) -> None:
        """Simulate in ``jobs`` processes what is not complete in ``folder``, created unless it is resumed.

        Stopping it keeps all that is complete. Raises HarliError when a process dies.
        """
        self.prepare(folder)
        results = ComparisonFolder(folder)
        done_s, total_s = 0.0, expected_s(self.settings, self.variants)
        for batch in planned_batches(self.settings, self.variants, self.menu, results):
            missing = [planned for planned in batch if not results.complete(planned)]
            done_s += sum(planned_s(self.settings, planned) for planned in batch if planned not in missing)
            tasks = [
                (self.run_settings(one), self.predictor, self.requests(one), str(one), folder / one.folder)
                for one in missing
            ]
            for place, _ in spread(simulate_run, tasks, jobs):
                done_s += planned_s(self.settings, missing[place])
                on_progress(Progress(missing[place], done_s, max(total_s, done_s), None))

    def _seed(self, number: int) -> int:
        return self.settings.run.workload.seed + max(number, 1) - 1


def seeded_workload(run: RunSettings, seed: int) -> Workload:
    """Generated requests of this seed, or a trace's, whose lengths change places unless it is the settings' own."""
    wanted = run.workload
    made = make_workload(wanted.model_copy(update={"seed": seed}), run.engine.max_model_len)
    if wanted.trace is None or seed == wanted.seed:
        return made
    order = np.random.default_rng(seed).permutation(len(made.requests))
    places = zip(order.tolist(), made.requests, strict=True)
    return Workload(made.name, tuple(made.requests[place]._replace(arrival_s=one.arrival_s) for place, one in places))


def simulate_run(
    settings: SimulationSettings, predictor: Path | None, workload: Workload, name: str, folder: Path
) -> None:
    """One run into its own folder, in place of what an interrupted one left there."""
    if folder.exists():
        shutil.rmtree(folder)
    device = make_device(settings.device, predictor, settings.finetune, settings.noise, settings.workload.seed)
    simulation = Simulation(settings, device, workload)
    simulation.info = simulation.info.model_copy(update={"name": name})
    simulation.execute(folder)
