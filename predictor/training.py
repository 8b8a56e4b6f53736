"""Training a predictor: what is fitted on which operating points, and what decides what is kept.

What is held out is whole groups: the operating points of one batch and context at all shares, with the
steps that led to them. With enough groups about a fifth is held out: never fitted, tuned or calibrated
on, only judged on. Whether a group is held out follows from its id, so it stays so when a later training
has more data, and neither of two versions has seen what they are compared on. The others make
``FOLDS`` folds: tuning scores on them, and the bounds are calibrated on the predictions of models that
had not seen the fold (Vovk, "Cross-conformal predictors", 2015). The model that is kept is fitted on all
of the folds' groups.

With few groups none is held out, and every model is judged on its predictions across folds, each fold
with bounds calibrated on the others. Tuning has seen these folds too, which flatters the two-stage model
a little; the folds that judge are therefore not those that tune.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harli.types import HarliError
from predictor.artifact import Artifact
from predictor.base import Floats
from predictor.bounds import Bounds
from predictor.dataset import Dataset, check_trainable
from predictor.latency_model import LatencyModel
from predictor.models import MODELS
from predictor.ranges import Ranges
from predictor.scoring import Difference, Errors, Judged, Scores, difference, noise_floor, score
from predictor.sources import GROUP_IDS
from predictor.tuning import Budget, Fold, Trial, best, tune
from predictor.two_stage import TwoStage

FOLDS = 5
HOLD_OUT = 0.2
"""Of all ids: groups below this part of them are held out."""
HOLD_OUT_FROM = 100
"""With fewer groups than this all are needed to fit."""
LEAST_GROUPS = FOLDS
"""Groups with decode alone, and with a split, without which a fold would be without any."""

Params = dict[str, float | int]


@dataclass(frozen=True)
class Rival:
    """One row of the table: a model, how it did, and what it lost to the two-stage model."""

    name: str
    scores: Scores
    corun_difference: Difference
    """Its MAPE beside finetuning minus the two-stage model's."""
    difference: Difference
    """The same over all rows."""
    judged: Judged


@dataclass(frozen=True)
class Trained:
    """What training made. ``artifact.scores`` has the winner's numbers and where they come from."""

    artifact: Artifact
    rivals: tuple[Rival, ...]
    """The two-stage model first."""
    winner: Rival
    noise: tuple[Errors, Errors]
    """What a model that knew every point's median would score: decode alone, and beside finetuning."""
    trials: tuple[Trial, ...]
    params: Params
    held_out: bool
    """Judged on held-out groups; otherwise across folds."""
    seen: frozenset[int]
    """Ids of the groups that the model was fitted on."""

    @property
    def verdict(self) -> str:
        """Which model is kept and why, in a line."""
        candidate, winner = self.rivals[0], self.winner
        nearest = min(self.rivals[1:], key=lambda rival: rival.scores.all.mape)
        between = _points((winner if winner is not candidate else nearest).difference)
        if winner is not candidate:
            return f"{winner.name} is registered instead of {candidate.name}: its error is lower by {between}"
        if not nearest.difference.significant:
            return f"{candidate.name} is registered: {nearest.name} differs by {between}, which may be chance"
        return f"{candidate.name} is registered: {nearest.name}, the next, is worse by {between}"


def train(
    data: Dataset,
    budget: Budget,
    *,
    coverage: float,
    seed: int,
    storage: Path | None = None,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Trained:
    """Tune, fit, calibrate and judge. The same data, seed and number of trials give the same.

    Raises HarliError when there is too little to learn from, or ``storage``, the search's file, is unusable.
    """
    check_trainable(data)
    fit_rows, judge_rows = _hold_out(data)
    fitted_on = data.take(fit_rows)
    trials = tune(fitted_on, _folds(fitted_on, seed), budget, seed=seed, storage=storage, on_trial=on_trial)
    tuned = {TwoStage.name: best(trials).params}
    judging = _Judging(fitted_on, data.take(judge_rows) if judge_rows.size else None, coverage, seed, tuned)
    judged = [judging.judge(model) for model in MODELS]
    rivals = tuple(_rival(model.name, rows, judged[0], seed) for model, rows in zip(MODELS, judged, strict=True))
    winner = best_of(rivals)
    model = next(model for model in MODELS if model.name == winner.name)
    fitted, bounds = judging.final(model)
    repeated = winner.judged.data.take(winner.judged.data.repeats)
    noise = noise_floor(repeated.take(repeated.solo)), noise_floor(repeated.take(~repeated.solo))
    return Trained(
        artifact=Artifact.of(fitted, bounds, fitted_on, _scores(winner.scores, noise)),
        rivals=rivals,
        winner=winner,
        noise=noise,
        trials=trials,
        params=dict(tuned.get(model.name, {})),
        held_out=bool(judge_rows.size),
        seen=frozenset(np.unique(fitted_on.group).tolist()),
    )


class _Judging:
    """Fits models on ``data`` and has each predict what it has not seen: ``held_out``, or else fold by fold."""

    def __init__(
        self, data: Dataset, held_out: Dataset | None, coverage: float, seed: int, params: Mapping[str, Params]
    ) -> None:
        self._data, self._held_out = data, held_out
        self._coverage, self._seed, self._params = coverage, seed, params
        self._folds = _folds(data, seed + 1)
        if held_out is not None:
            self._growth = Ranges.fit(data).growth(held_out)
        else:
            self._growth = np.empty(len(data))
            for fold in self._folds:
                self._growth[fold.test] = Ranges.fit(data.take(fold.fit)).growth(data.take(fold.test))

    def judge(self, model: type[LatencyModel]) -> Judged:
        if self._held_out is not None:
            rows, (fitted, bounds) = self._held_out, self.final(model)
            predicted_ms = fitted.predict(rows)
            factor = bounds.factor(fitted.predict_solo(rows), ~rows.solo)
        else:
            rows, (predicted_ms, solo_ms) = self._data, self._across_folds(model)
            factor = np.empty(len(rows))
            for fold in self._folds:
                bounds = self._bounds(predicted_ms, solo_ms, fold.fit)
                factor[fold.test] = bounds.factor(solo_ms[fold.test], ~rows.solo[fold.test])
        return Judged(rows, predicted_ms, predicted_ms * factor * self._growth)

    def final(self, model: type[LatencyModel]) -> tuple[LatencyModel, Bounds]:
        """The model fitted on all rows of ``data``, and bounds calibrated across its folds."""
        predicted_ms, solo_ms = self._across_folds(model)
        return self._fit(model, self._data), self._bounds(predicted_ms, solo_ms, np.arange(len(self._data)))

    def _across_folds(self, model: type[LatencyModel]) -> tuple[Floats, Floats]:
        """Gaps, and solo gaps, of every row as predicted by a model that has not seen its group."""
        predicted_ms, solo_ms = np.empty(len(self._data)), np.empty(len(self._data))
        for fold in self._folds:
            fitted, test = self._fit(model, self._data.take(fold.fit)), self._data.take(fold.test)
            predicted_ms[fold.test], solo_ms[fold.test] = fitted.predict(test), fitted.predict_solo(test)
        return predicted_ms, solo_ms

    def _fit(self, model: type[LatencyModel], data: Dataset) -> LatencyModel:
        return model.fit(data, self._params.get(model.name, {}), self._seed)

    def _bounds(self, predicted_ms: Floats, solo_ms: Floats, rows: NDArray[np.int64]) -> Bounds:
        data = self._data.take(rows)
        return Bounds.calibrate(
            predicted_ms[rows], data.gap_ms, solo_ms[rows], data.group, self._coverage, self._seed, split=~data.solo
        )


def _hold_out(data: Dataset) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers to fit on, and to hold out."""
    everything = np.arange(len(data))
    _check_groups(data)
    if len(np.unique(data.group)) < HOLD_OUT_FROM:
        return everything, everything[:0]
    held = data.group < int(HOLD_OUT * GROUP_IDS)
    _check_groups(data.take(~held))
    if data.solo[held].all() or not data.solo[held].any():  # there is nothing of one side to judge on
        return everything, everything[:0]
    return everything[~held], everything[held]


def _check_groups(data: Dataset) -> None:
    for rows, name in ((data.solo, "of decode alone"), (~data.solo, "beside finetuning")):
        if (count := len(np.unique(data.group[rows]))) < LEAST_GROUPS:
            raise HarliError(
                f"{count} groups of operating points {name} are too few to calibrate: {LEAST_GROUPS} are needed; "
                "profile for longer"
            )


def _folds(data: Dataset, seed: int) -> list[Fold]:
    """``FOLDS`` folds of whole groups; groups of one share only are spread evenly over them."""
    groups, first = np.unique(data.group, return_index=True)
    order = np.random.default_rng(seed).permutation(len(groups))
    order = order[np.argsort(data.share[first][order], kind="stable")]
    fold = np.empty(len(groups), dtype=np.int64)
    fold[order] = np.arange(len(groups)) % FOLDS
    of_row = fold[np.searchsorted(groups, data.group)]
    return [Fold(np.flatnonzero(of_row != number), np.flatnonzero(of_row == number)) for number in range(FOLDS)]


def _rival(name: str, judged: Judged, candidate: Judged, seed: int) -> Rival:
    corun = ~candidate.data.solo
    return Rival(
        name=name,
        scores=score(judged, seed),
        corun_difference=difference(judged, candidate, corun, seed),
        difference=difference(judged, candidate, np.ones_like(corun), seed),
        judged=judged,
    )


def best_of(rivals: Sequence[Rival]) -> Rival:
    """The lowest error; the two-stage model, which is the first, unless it is worse by more than chance."""
    lowest = min(rivals, key=lambda rival: rival.scores.all.mape)
    return lowest if lowest.difference.significant else rivals[0]


def _scores(scores: Scores, noise: tuple[Errors, Errors]) -> dict[str, float | None]:
    """Flat, and without NaN, for files and tables."""
    found = {
        "solo_mape": scores.solo.mape,
        "corun_mape": scores.corun.mape,
        "corun_p90_error": scores.corun.p90,
        "corun_p99_error": scores.corun.p99,
        "under_rate": scores.under_rate,
        "bound_coverage": scores.coverage,
        "bound_width": scores.width,
        "noise_solo": noise[0].mape,
        "noise_corun": noise[1].mape,
    }
    return {name: value if np.isfinite(value) else None for name, value in found.items()}


def _points(change: Difference) -> str:
    """In percentage points; of a significant one the size."""
    sign = -1.0 if change.high < 0.0 else 1.0
    low, high = sorted((sign * change.low, sign * change.high))
    return f"{100 * sign * change.mean:.2f} points of MAPE (95% interval {100 * low:.2f} to {100 * high:.2f})"
