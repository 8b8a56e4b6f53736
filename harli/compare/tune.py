"""Searching a policy's parameters in the simulator with Optuna, before a comparison confirms what was found.

Searched are the parameters that declare a ``policies.base.Range``. A trial simulates requests like the comparison's,
with a seed that none of its rounds has, at its SLO, on its device if it is simulated itself and else on that of its
predictor. It is judged as a comparison judges: most finetune tokens/s of those that leave decode unharmed. The
simulator leaves things out, so the best is only a candidate: it takes part in the comparison beside the defaults.

The search can be left and taken up again as that of ``predictor.tuning``: N trials find the same in one sitting or in
several.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from harli.compare.cell import SEPARATE, Value
from harli.compare.results import compared
from harli.compare.settings import ComparisonSettings
from harli.compare.simulated import seeded_workload
from harli.compare.verdict import TOKENS, Run, judge
from harli.config import SloSettings
from harli.simulate.devices import make_device, predictor_folder
from harli.simulate.run import Simulation, SimulationSettings
from harli.types import HarliError, Slo
from policies.registry import Parameter, load_policy, parameters
from predictor.tuning import reporting_failures, sampler

if TYPE_CHECKING:
    import optuna

Params = dict[str, Value]

APART = 1_000_000
"""Added to the comparison's seed: more than it has rounds, however often it is resumed."""


@dataclass(frozen=True)
class Tried:
    """One set of parameters in the simulator."""

    params: Params
    """Those that differ from the defaults; empty for the defaults themselves."""
    tokens_per_s: float
    attainment: float
    reason: str
    """Why decode is harmed, or why the policy does not take these parameters; empty if all is well."""

    @property
    def value(self) -> float:
        """What is maximised: finetune tokens/s; where decode is harmed the attainment, less what puts it below 0."""
        return self.attainment - 2.0 if self.reason else self.tokens_per_s


class Search:
    """Making it checks the settings and simulates decode alone; ``run`` searches."""

    def __init__(self, settings: ComparisonSettings, policy: str) -> None:
        """``settings``: of the comparison that follows.

        Raises HarliError when the policy has nothing to search, when there are several SLOs, and for whatever else the
        user can mend.
        """
        self._ranges = [parameter for parameter in parameters(load_policy(policy)) if parameter.range]
        if not self._ranges:
            raise HarliError(
                f"policy {policy!r} has no parameter to search; one is declared as "
                "Annotated[float, Range(low, high)], see policies.base"
            )
        if len(settings.slo_scales) > 1:
            raise HarliError("--tune is for one SLO: give --slo-scale once")
        simulated = settings.simulation.model_dump() if settings.simulation else {"device": settings.run.predictor}
        seed = settings.run.workload.seed + APART
        own = {"params": {}, "workload": settings.run.workload.model_copy(update={"seed": seed}).model_dump()}
        self._settings = SimulationSettings.model_validate(settings.run.model_dump() | simulated | own)
        self._predictor = predictor_folder(self._settings.device)
        self._policy, self._workload = policy, seeded_workload(settings.run, seed)
        alone = self._simulated(SEPARATE.policy, {}, Slo())
        (objective,) = settings.objectives(dict(alone.metrics))
        self._slo = objective.slo
        self._separate = self._simulated(SEPARATE.policy, {}, self._slo)

    def run(
        self, trials: int, *, storage: Path | None = None, on_trial: Callable[[Tried], None] = lambda tried: None
    ) -> list[Tried]:
        """The defaults and then ``trials`` others, in order; ``best`` chooses. ``on_trial`` hears of each.

        ``storage`` is the SQLite file that keeps them; without it they are kept in memory. Raises HarliError when that
        file cannot be used. An exception in the middle, Ctrl-C too, loses no finished trial.
        """
        tried = [self._try({})]
        on_trial(tried[0])
        with reporting_failures(storage):
            study = self._study(storage)
            for trial in _finished(study)[:trials]:
                tried.append(trial)
                on_trial(trial)
            while len(tried) <= trials:
                study.sampler = sampler(self._seed, len(tried) - 1)
                tried.append(self._ask(study))
                on_trial(tried[-1])
        return tried

    def _ask(self, study: optuna.Study) -> Tried:
        from optuna.trial import TrialState

        trial = study.ask()
        try:
            tried = self._try({parameter.name: _suggest(trial, parameter) for parameter in self._ranges})
        except BaseException:
            study.tell(trial, state=TrialState.FAIL)
            raise
        for name, value in asdict(tried).items():
            trial.set_user_attr(name, value)
        study.tell(trial, tried.value)
        return tried

    def _try(self, params: Params) -> Tried:
        try:
            run = self._simulated(self._policy, params, self._slo)
        except HarliError as error:
            return Tried(params, 0.0, 0.0, str(error))
        verdict = judge({1: run}, {1: self._separate}, self._slo)
        return Tried(params, run.get(TOKENS), run.attainment(self._slo), verdict.reason)

    def _simulated(self, policy: str, params: Params, slo: Slo) -> Run:
        changes = {"policy": policy, "params": params, "slo": SloSettings(itl_ms=slo.itl_ms, tpot_ms=slo.tpot_ms)}
        settings = self._settings.model_copy(update=changes)
        device = make_device(settings.device, self._predictor, settings.finetune, settings.noise, self._seed)
        info, tables = Simulation(settings, device, self._workload).measure()
        window_s = settings.workload.duration_s
        return Run(compared(info.summary, tables.requests, tables.updates, window_s), info.finetune.reason)

    @property
    def _seed(self) -> int:
        return self._settings.workload.seed

    def _study(self, storage: Path | None) -> optuna.Study:
        """A study under a name that follows from what its trials depend on; decode alone stands for the device."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        if storage is not None:
            storage.parent.mkdir(parents=True, exist_ok=True)
        source = inspect.getsource(sys.modules[load_policy(self._policy).__module__])
        known = (self._settings, self._slo, self._separate, self._workload.requests, self._ranges, source)
        digest = hashlib.sha256(repr(known).encode()).hexdigest()
        return optuna.create_study(
            storage=None if storage is None else f"sqlite:///{storage}",
            study_name=f"{self._policy} {digest[:16]} seed {self._seed}",
            direction="maximize",
            load_if_exists=True,
        )


def best(tried: Sequence[Tried]) -> Tried:
    """The one with the highest value; of equals the one tried first, which may be the defaults."""
    return max(tried, key=lambda one: one.value)


def _suggest(trial: optuna.Trial, parameter: Parameter) -> Value:
    """The trial's value for a parameter, in as many digits as a name of a folder should have."""
    wanted = parameter.range
    assert wanted is not None
    if get_args(parameter.annotation)[0] is int:
        return int(trial.suggest_int(parameter.name, int(wanted.low), int(wanted.high), log=wanted.log))
    return float(f"{trial.suggest_float(parameter.name, wanted.low, wanted.high, log=wanted.log):.3g}")


def _finished(study: optuna.Study) -> list[Tried]:
    """Those of earlier sittings; what was interrupted does not count."""
    from optuna.trial import TrialState

    return [Tried(**trial.user_attrs) for trial in study.get_trials(states=(TrialState.COMPLETE,))]
