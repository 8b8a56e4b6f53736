"""Whether a newly trained predictor takes the champion's place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from predictor.artifact import Artifact
from predictor.scoring import relative_error
from predictor.training import Trained, group_keys

FRESH_POINTS = 5
"""Operating points of decode alone, and of splits, that a comparison needs; neither predictor has seen them."""
COVERAGE_MARGIN = 0.03
"""A bound that covers this much less than it promises is not fit for use."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of the new version, and why."""

    champion: bool
    reason: str


def contest(trained: Trained, champion: Artifact | None, seen: frozenset[str]) -> Verdict:
    """Judge ``trained`` against the champion, if there is one, which was fitted on the groups ``seen``.

    The measure is the MAPE of decode alone plus that beside finetuning, on operating points that neither
    was fitted on. A champion of another model, device or menu is no rival.
    """
    if problem := _unfit(trained):
        return Verdict(False, problem)
    if champion is None:
        return Verdict(True, "the first champion")
    if reasons := champion.check(trained.artifact.identity):
        return Verdict(True, f"the champion before it is for something else: {reasons[0]}")
    data = trained.winner.judged.data
    fresh = [group for group, key in group_keys(data).items() if key not in seen]
    rows = np.isin(data.group, fresh)
    solo, corun = rows & data.solo, rows & ~data.solo
    if min(len(np.unique(data.point[side])) for side in (solo, corun)) < FRESH_POINTS:
        return Verdict(False, f"only {len(fresh)} groups of steps are new to both, too few to compare: profile again")
    judged = data.take(rows)
    predictions = trained.winner.judged.predicted_ms[rows], champion.model.predict(judged)
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
