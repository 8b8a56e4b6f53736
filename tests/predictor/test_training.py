"""Training as a whole: what is held out, what is kept, and who becomes champion."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from harli.types import HarliError
from predictor import training
from predictor.bounds import Bounds
from predictor.contest import Champion, contest
from predictor.dataset import ROW_FIELDS
from predictor.scoring import Difference, score
from predictor.training import FOLDS, Trained, best_of, train
from predictor.tuning import Budget
from tests.predictor.builders import IDENTITY, synthetic

DATA = synthetic(150, 10)
FEW = synthetic(45, 10)


def trained(data=DATA, trials=2, seed=0) -> Trained:
    return train(data, Budget(trials), coverage=0.9, seed=seed)


@pytest.fixture(scope="module")
def many() -> Trained:
    return trained()


@pytest.fixture(scope="module")
def few() -> Trained:
    return trained(FEW)


def groups(data) -> set[int]:
    return set(data.group.tolist())


def champion(of: Trained, **changes) -> Champion:
    """The version 7 that ``of`` would have been."""
    return replace(Champion(7, of.artifact, of.seen), **changes)


def same(one: Trained, other: Trained) -> bool:
    models = (one.artifact.model, other.artifact.model)
    return all(
        (
            np.array_equal(models[0].predict(DATA), models[1].predict(DATA)),
            one.artifact.bounds == other.artifact.bounds,
            [rival.scores for rival in one.rivals] == [rival.scores for rival in other.rivals],
        )
    )


def test_held_out_points_are_neither_fitted_nor_tuned_on(many):
    judged = groups(many.winner.judged.data)
    assert many.held_out
    assert judged | many.seen == groups(DATA)
    assert judged.isdisjoint(many.seen)
    assert 0.1 < len(judged) / 150 < 0.3


def test_what_is_held_out_stays_so_with_more_data_and_any_seed(many):
    shifted = synthetic(80, 10, seed=9)
    shifted = replace(shifted, point=shifted.point + 1000)
    both = {name: np.concatenate([getattr(shifted, name), getattr(DATA, name)]) for name in ROW_FIELDS}
    more = trained(replace(DATA, **both, sha256="both"), trials=1, seed=5)
    assert groups(many.winner.judged.data) < groups(more.winner.judged.data)
    assert many.seen < more.seen


def test_with_few_points_each_is_judged_by_a_model_that_had_not_seen_it(few):
    assert not few.held_out
    assert few.seen == groups(FEW)
    assert len(few.winner.judged.data) == len(FEW)
    fitted = few.artifact.model.predict(FEW)
    assert not np.allclose(fitted, few.rivals[0].judged.predicted_ms)


@pytest.mark.parametrize("data", [DATA, FEW], ids=["many", "few"])
def test_folds_are_whole_points_with_every_share_in_each(data):
    folds = training._folds(data, seed=3)
    assert len(folds) == FOLDS
    assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == list(range(len(data)))
    for fold in folds:
        assert set(data.point[fold.fit]).isdisjoint(data.point[fold.test])
        assert set(data.share[fold.test]) == set(data.share)


def test_a_group_is_held_out_as_a_whole():
    """Three points, one at every share, and the steps that led to them."""
    grouped = replace(DATA, group=DATA.point // 3)
    for fold in training._folds(grouped, seed=0):
        assert set(grouped.group[fold.fit]).isdisjoint(grouped.group[fold.test])
    fit, held = training._hold_out(DATA)
    assert len(held)
    assert set(DATA.group[fit]).isdisjoint(DATA.group[held])


def test_bounds_are_calibrated_on_groups(monkeypatch):
    """Points of a group share its seconds and its state, so they are no evidence of their own."""
    grouped, used = replace(FEW, group=FEW.point // 3), set()
    calibrate = Bounds.calibrate

    def spy(predicted, actual, load, group, *others, **named):
        used.update(group.tolist())
        return calibrate(predicted, actual, load, group, *others, **named)

    monkeypatch.setattr(Bounds, "calibrate", spy)
    trained(grouped, trials=1)
    assert used == groups(grouped)


def test_five_groups_are_enough():
    assert trained(replace(FEW, group=FEW.point % 15 // 3), trials=1).rivals


def test_the_same_data_and_seed_give_the_same(many, few):
    assert same(many, trained())
    assert same(few, trained(FEW))


def test_the_table_has_the_two_stage_model_first_and_against_itself_no_difference(many):
    names = [rival.name for rival in many.rivals]
    assert names[0] == "two-stage"
    assert {"linear", "one-stage", "constant"} < set(names)
    assert many.rivals[0].difference == Difference(0.0, 0.0, 0.0)
    for rival in many.rivals:
        assert rival.scores == score(rival.judged, 0)
        assert rival.corun_difference.mean == pytest.approx(
            rival.scores.corun.mape - many.rivals[0].scores.corun.mape, abs=1e-12
        )


def test_two_stages_find_the_law(many):
    scores = many.winner.scores
    assert many.winner.name == "two-stage"
    assert scores.all.mape < 0.04  # noise of 3% alone makes 2.4%
    assert scores.coverage >= 0.87
    assert "two-stage is registered" in many.verdict


def test_a_rival_wins_only_if_it_is_better_by_more_than_chance(many):
    candidate, rival = many.rivals[0], many.rivals[1]
    scores = replace(rival.scores, all=replace(rival.scores.all, mape=candidate.scores.all.mape / 2))
    sure = replace(rival, scores=scores, difference=Difference(-0.02, -0.03, -0.01))
    unsure = replace(sure, difference=Difference(-0.02, -0.05, 0.01))
    assert best_of((candidate, unsure)) is candidate
    assert best_of((candidate, sure)) is sure
    won = replace(many, rivals=(candidate, sure), winner=sure)
    assert won.verdict.startswith("linear is registered instead of two-stage: its error is lower by 2.00 points")
    assert "(95% interval 1.00 to 3.00)" in won.verdict


def test_too_few_points_says_how_many_are_needed():
    alone = np.unique(DATA.point[DATA.solo])
    lacking = DATA.take(~np.isin(DATA.point, alone[3:]))
    with pytest.raises(HarliError, match=r"3 groups of operating points of decode alone .* 5 are needed"):
        trained(lacking)
    with pytest.raises(HarliError, match="10 are needed"):
        trained(synthetic(8, 10))
    with pytest.raises(HarliError, match="every step ran at the share"):
        trained(DATA.take(DATA.solo))


def test_scores_of_the_artifact_are_finite_or_none(many):
    scores = many.artifact.scores
    assert scores["corun_mape"] == many.winner.scores.corun.mape
    assert all(value is None or np.isfinite(value) for value in scores.values())
    blocks = replace(DATA, repeats=np.zeros(len(DATA), dtype=bool))
    assert trained(blocks, trials=1).artifact.scores["noise_solo"] is None


def test_the_first_sound_version_is_champion(many):
    assert contest(many, None).champion


def test_a_version_that_learnt_nothing_is_not_champion(many):
    constant = replace(many, winner=many.rivals[-1])
    verdict = contest(constant, None)
    assert not verdict.champion
    assert "nothing about load" in verdict.reason


def test_a_bound_that_does_not_hold_is_not_champion(many):
    scores = replace(many.winner.scores, coverage=0.8)
    verdict = contest(replace(many, winner=replace(many.winner, scores=scores)), None)
    assert not verdict.champion
    assert "covers 80.0% of new gaps, not 90%" in verdict.reason


def test_the_champion_stays_unless_the_new_version_is_better_on_fresh_points(many):
    again = contest(many, champion(many))
    assert not again.champion
    assert "no better than the champion" in again.reason
    assert f"on {len(groups(many.winner.judged.data))} fresh groups" in again.reason
    worse = replace(many.artifact.model, solo_base=many.artifact.model.solo_base * 1.2)
    better = contest(many, champion(many, artifact=many.artifact.model_copy(update={"model": worse})))
    assert better.champion
    assert "better than the champion" in better.reason


def test_points_that_the_champion_has_seen_do_not_judge(few):
    verdict = contest(few, champion(few))
    assert not verdict.champion
    assert "only 0 groups of steps are new to both" in verdict.reason
    fresh = frozenset(sorted(few.seen)[:20])
    assert "fresh groups" in contest(few, champion(few, seen=fresh)).reason


def test_points_of_a_few_fresh_groups_are_too_few_however_many_they_are(few):
    """The last three groups have five points of decode alone and ten of splits."""
    judged = replace(few.winner.judged, data=replace(FEW, group=FEW.point // 6))
    verdict = contest(replace(few, winner=replace(few.winner, judged=judged)), champion(few, seen=frozenset(range(5))))
    assert "only 3 groups of steps are new to both" in verdict.reason


def test_a_champion_of_something_else_is_no_rival(many):
    other = many.artifact.model_copy(update={"identity": {**IDENTITY, "model": "another/model-7B", "role": "mixed"}})
    verdict = contest(many, champion(many, artifact=other))
    assert verdict.champion
    assert verdict.reason == (
        "in place of version 7, without a contest, since that is for something else: "
        "model another/model-7B is not some/model-24M; role mixed is not decode"
    )
