"""Searching the two-stage model's settings with Optuna, on folds of whole groups.

The search can be left and taken up again: its study is kept in a SQLite file under a name that follows
from data, seed and search space, and each trial's randomness from the seed and the number of trials
before it. So a search of N trials finds the same, in one sitting or in several.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from harli.types import HarliError
from predictor.dataset import Dataset
from predictor.scoring import relative_error
from predictor.two_stage import DEFAULTS, TwoStage

if TYPE_CHECKING:
    import optuna

STARTUP_TRIALS = 8
"""Trials before the sampler learns from them and the pruner compares with them."""

GIVEN = (DEFAULTS, {**DEFAULTS, "solo_rounds": 0, "corun_rounds": 0})
"""The first two trials: the defaults, and no trees at all, which is the linear base."""

Params = dict[str, float | int]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Fold:
    """Row numbers of a dataset: to fit on, and to predict."""

    fit: Rows
    test: Rows


@dataclass(frozen=True)
class Trial:
    """One set of parameters that was tried."""

    number: int
    params: Params
    mape: float
    """Mean over the folds that were computed."""
    folds: int
    pruned: bool
    began_ms: int
    ended_ms: int
    """Unix time."""


@dataclass(frozen=True)
class Budget:
    """When to stop: whichever limit comes first, but not before one trial. Trials of earlier sittings count."""

    trials: int | None = 40
    minutes: float | None = None


def tune(
    data: Dataset,
    folds: Sequence[Fold],
    budget: Budget,
    *,
    seed: int,
    storage: Path | None = None,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> tuple[Trial, ...]:
    """The trials in order; ``best`` chooses. ``on_trial`` hears of each, those of earlier sittings too.

    ``storage`` is the SQLite file that keeps them; without it they are kept in memory. Raises HarliError
    when that file cannot be used. An exception in the middle, Ctrl-C too, loses no finished trial.
    """
    deadline_s = time.monotonic() + 60.0 * budget.minutes if budget.minutes is not None else np.inf
    with reporting_failures(storage):
        study = _study(data, seed, storage)
        done = _finished(study)[: budget.trials]
        for trial in done:
            on_trial(trial)
        while not done or (len(done) != budget.trials and time.monotonic() < deadline_s):
            study.sampler = sampler(seed, len(done))
            if len(done) < len(GIVEN):
                study.enqueue_trial(GIVEN[len(done)])
            done.append(_run(study, data, folds, seed))
            on_trial(done[-1])
    return tuple(done)


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the lowest error over all folds, the earlier one of equals."""
    return min((trial for trial in trials if not trial.pruned), key=lambda trial: trial.mape)


def _run(study: optuna.Study, data: Dataset, folds: Sequence[Fold], seed: int) -> Trial:
    from optuna.trial import TrialState

    trial = study.ask()
    params = TwoStage.space(trial)
    errors: list[float] = []
    try:
        for number, fold in enumerate(folds):
            test = data.take(fold.test)
            model = TwoStage.fit(data.take(fold.fit), params, seed)
            errors.append(float(np.mean(relative_error(model.predict(test), test.gap_ms))))
            trial.report(float(np.mean(errors)), number)
            if number + 1 < len(folds) and trial.should_prune():
                return _trial(study.tell(trial, state=TrialState.PRUNED))
        return _trial(study.tell(trial, float(np.mean(errors))))
    except BaseException:
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        raise


def _study(data: Dataset, seed: int, storage: Path | None) -> optuna.Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    probe = optuna.trial.FixedTrial(dict(DEFAULTS))
    TwoStage.space(probe)
    space = hashlib.sha256(repr(sorted(probe.distributions.items())).encode()).hexdigest()
    if storage is not None:
        storage.parent.mkdir(parents=True, exist_ok=True)
    return optuna.create_study(
        storage=None if storage is None else f"sqlite:///{storage}",
        study_name=f"{TwoStage.name} {data.sha256[:16]} seed {seed} space {space[:8]}",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS),
        load_if_exists=True,
    )


@contextmanager
def reporting_failures(storage: Path | None) -> Iterator[None]:
    """What goes wrong with the file of a search becomes a HarliError."""
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, OptunaError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise HarliError(f"{storage} cannot keep the search ({reason}); move it away and try again") from error


def sampler(seed: int, number: int) -> optuna.samplers.BaseSampler:
    """A sampler whose draws for trial ``number`` do not depend on how many sittings there were."""
    import optuna

    drawn = np.random.SeedSequence((seed, number)).generate_state(1)[0]
    return optuna.samplers.TPESampler(seed=int(drawn), n_startup_trials=STARTUP_TRIALS)


def _finished(study: optuna.Study) -> list[Trial]:
    """Complete and pruned trials in order; what was interrupted does not count."""
    from optuna.trial import TrialState

    return [_trial(trial) for trial in study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))]


def _trial(trial: optuna.trial.FrozenTrial) -> Trial:
    from optuna.trial import TrialState

    assert trial.datetime_start is not None
    assert trial.datetime_complete is not None
    return Trial(
        number=trial.number,
        params=dict(trial.params),
        mape=trial.intermediate_values[max(trial.intermediate_values)],
        folds=len(trial.intermediate_values),
        pruned=trial.state == TrialState.PRUNED,
        began_ms=int(trial.datetime_start.timestamp() * 1000),
        ended_ms=int(trial.datetime_complete.timestamp() * 1000),
    )
