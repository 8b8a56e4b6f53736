"""Whether a newly trained predictor takes the champion's place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from predictor.artifact import Artifact
from predictor.scoring import relative_error
from predictor.training import Trained

FRESH_GROUPS = 5
"""Groups with decode alone, and with splits, that a comparison needs; neither predictor has seen them."""
COVERAGE_MARGIN = 0.03
"""A bound that covers this much less than it promises is not fit for use."""


@dataclass(frozen=True)
class Champion:
    """The registered version that a new one is judged against."""

    version: int
    artifact: Artifact
    seen: frozenset[int]
    """Ids of the groups that it was fitted on."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of the new version, and why."""

    champion: bool
    reason: str


def contest(trained: Trained, champion: Champion | None) -> Verdict:
    """Judge ``trained`` against the champion, if there is one.

    The measure is the MAPE of decode alone plus that beside finetuning, on groups that neither was fitted on. A
    champion for something else (see ``predictor.dataset.differences``) is no rival: the new version takes its place.
    """
    if problem := _unfit(trained):
        return Verdict(False, problem)
    if champion is None:
        return Verdict(True, "the first champion")
    if reasons := champion.artifact.check(trained.artifact.identity):
        replaced = f"in place of version {champion.version}, without a contest, since that is for something else"
        return Verdict(True, f"{replaced}: {'; '.join(reasons)}")
    data = trained.winner.judged.data
    fresh = [group for group in np.unique(data.group).tolist() if group not in champion.seen]
    rows = np.isin(data.group, fresh)
    solo, corun = rows & data.solo, rows & ~data.solo
    if min(len(np.unique(data.group[side])) for side in (solo, corun)) < FRESH_GROUPS:
        return Verdict(False, f"only {len(fresh)} groups of steps are new to both, too few to compare: profile again")
    judged = data.take(rows)
    predictions = trained.winner.judged.predicted_ms[rows], champion.artifact.model.predict(judged)
    errors = [relative_error(predicted_ms, judged.gap_ms) for predicted_ms in predictions]
    new, old = (float(error[judged.solo].mean() + error[~judged.solo].mean()) for error in errors)
    compared = f"{100 * new:.2f}% against {100 * old:.2f}% (MAPE alone plus beside) on {len(fresh)} fresh groups"
    return Verdict(new < old, f"{'better' if new < old else 'no better'} than the champion: {compared}")


def _unfit(trained: Trained) -> str:
    """Why this predictor should not be used at all; empty when it may be."""
    scores, constant = trained.winner.scores, trained.rivals[-1].scores
    promised = trained.artifact.bounds.coverage
    if scores.all.mape >= constant.all.mape:
        return f"its error of {100 * scores.all.mape:.1f}% is that of a constant: the data say nothing about load"
    if scores.coverage < promised - COVERAGE_MARGIN:
        return f"its bound covers {100 * scores.coverage:.1f}% of new gaps, not {100 * promised:g}%: profile longer"
    return ""
