"""The search: its budget, taking it up again, and its file."""

from __future__ import annotations

import numpy as np
import pytest

from harli.types import HarliError
from predictor.tuning import GIVEN, Budget, Fold, Trial, best, tune
from predictor.two_stage import TwoStage
from tests.predictor.builders import synthetic

DATA = synthetic(30, 8)
FOLD = DATA.point // 3 % 3  # shares take turns from point to point
FOLDS = [Fold(np.flatnonzero(number != FOLD), np.flatnonzero(number == FOLD)) for number in range(3)]


def results(trials: tuple[Trial, ...]) -> list[tuple[object, ...]]:
    """What of a trial does not depend on the clock."""
    return [(trial.params, trial.mape, trial.folds, trial.pruned) for trial in trials]


@pytest.fixture(scope="module")
def reference() -> tuple[Trial, ...]:
    return tune(DATA, FOLDS, Budget(24), seed=1)


def test_the_defaults_and_the_linear_base_are_tried_first(reference):
    assert [trial.params for trial in reference[:2]] == [dict(given) for given in GIVEN]
    assert best(reference).mape <= min(trial.mape for trial in reference[:2])


def test_hopeless_trials_are_pruned_and_never_the_best(reference):
    pruned = [trial for trial in reference if trial.pruned]
    assert pruned
    assert all(trial.folds < len(FOLDS) for trial in pruned)
    assert not best(reference).pruned
    assert best(reference).mape == min(trial.mape for trial in reference if trial.folds == len(FOLDS))


def test_the_same_seed_finds_the_same_and_another_does_not(reference):
    assert results(tune(DATA, FOLDS, Budget(4), seed=1)) == results(reference[:4])
    assert results(tune(DATA, FOLDS, Budget(4), seed=2))[2:] != results(reference[2:4])


def test_an_interrupted_search_goes_on_where_it_was(tmp_path, monkeypatch, reference):
    storage, fit, calls = tmp_path / "mlruns" / "optuna.db", TwoStage.fit.__func__, []

    def interrupted(cls, *arguments):
        calls.append(None)
        if len(calls) == 8:  # in the middle of the third trial
            raise KeyboardInterrupt
        return fit(cls, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TwoStage, "fit", classmethod(interrupted))
        with pytest.raises(KeyboardInterrupt):
            tune(DATA, FOLDS, Budget(8), seed=1, storage=storage)
    heard: list[Trial] = []
    resumed = tune(DATA, FOLDS, Budget(8), seed=1, storage=storage, on_trial=heard.append)
    assert results(resumed) == results(reference[:8])
    assert len(heard) == 8
    again = tune(DATA, FOLDS, Budget(5), seed=1, storage=storage)
    assert results(again) == results(reference[:5])


def test_no_time_at_all_is_one_trial():
    assert len(tune(DATA, FOLDS, Budget(trials=None, minutes=0.0), seed=0)) == 1


def test_other_data_and_seeds_have_a_search_of_their_own(tmp_path):
    storage, other = tmp_path / "optuna.db", synthetic(30, 8, seed=1)
    tune(DATA, FOLDS, Budget(1), seed=0, storage=storage)
    mine = tune(other, FOLDS, Budget(1), seed=0, storage=storage)
    assert results(mine) == results(tune(other, FOLDS, Budget(1), seed=0))


def test_a_file_that_cannot_keep_the_search_is_one_line(tmp_path):
    file = tmp_path / "optuna.db"
    file.write_text("not a database " * 100)
    for storage in (file, file / "optuna.db"):
        with pytest.raises(HarliError, match="cannot keep the search") as raised:
            tune(DATA, FOLDS, Budget(1), seed=0, storage=storage)
        assert "\n" not in str(raised.value)
    assert file.read_text().startswith("not a database")
