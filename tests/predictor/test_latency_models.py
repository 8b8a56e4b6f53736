from __future__ import annotations

from dataclasses import replace

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harli.types import HarliError
from predictor.base import Floats
from predictor.base_fit import corun_base
from predictor.constant import Constant
from predictor.dataset import Dataset, states
from predictor.latency_model import LatencyModel
from predictor.linear import LinearPerShare
from predictor.models import MODELS
from predictor.one_stage import OneStage
from predictor.two_stage import DEFAULTS, TwoStage
from tests.predictor.builders import MENU, synthetic, truth_ms
from tests.predictor.fitted import ROUGH

NO_TREES = {"solo_rounds": 0, "corun_rounds": 0}

TRAIN, TEST = synthetic(132, 12, seed=1), synthetic(100, 4, seed=2)
ROUGHLY = TwoStage.fit(TRAIN, ROUGH, 0)
TWO, ONE = TwoStage.fit(TRAIN, {}, 0), OneStage.fit(TRAIN, {}, 0)


def error(model: LatencyModel, rows: Dataset, truth: Floats) -> float:
    return float(np.mean(np.abs(model.predict(rows) / truth - 1.0)))


def stepped(data: Dataset) -> Floats:
    """A law in steps of eight requests."""
    solo = 10.0 + 8.0 * np.ceil(data.batch / 8.0) + 1e-3 * data.context_sum
    return np.asarray(np.where(data.solo, solo, solo * (1.0 + data.finetune_units / 4.0)))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_same_data_and_seed_give_the_same_model(model: type[LatencyModel]) -> None:
    one, other = model.fit(TRAIN, {}, 3), model.fit(TRAIN, {}, 3)
    np.testing.assert_array_equal(one.predict(TEST), other.predict(TEST))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_slowdown_is_at_least_one(model: type[LatencyModel]) -> None:
    fitted = model.fit(TRAIN, {}, 0)
    assert np.all(fitted.predict(TEST) >= fitted.predict_solo(TEST))
    np.testing.assert_array_equal(fitted.predict(TEST)[TEST.solo], fitted.predict_solo(TEST)[TEST.solo])


def test_two_stages_beat_their_rivals_on_the_law_of_the_builder() -> None:
    errors = {model.name: error(model.fit(TRAIN, {}, 0), TEST, truth_ms(TEST)) for model in MODELS}
    assert min(errors, key=lambda name: errors[name]) == "two-stage"
    assert errors["two-stage"] < 0.015


def test_a_batch_size_with_a_slow_kernel_is_learned() -> None:
    """Batch 2 takes longer than batch 3."""

    def kinked(data: Dataset) -> Floats:
        return truth_ms(data) * np.where(data.batch == 2, 1.25, 1.0)

    train, test = (synthetic(400, 10, seed=seed, max_batch=6) for seed in (5, 6))
    fitted = TwoStage.fit(replace(train, gap_ms=kinked(train)), {}, 0)
    assert error(fitted, test, kinked(test)) < 0.03
    gaps = fitted.predict_solo(states(MENU, 0, [2, 3], 2000))
    assert gaps[0] > gaps[1]


def test_without_trees_it_is_linear_and_goes_on_linearly() -> None:
    model = TwoStage.fit(synthetic(24, 10), NO_TREES, 0)
    assert model.trees == (None, None)
    for share in (0, 1, 2):
        gaps = model.predict(states(MENU, share, [100, 200, 300], [1e5, 2e5, 3e5]))
        assert gaps[2] - gaps[1] == pytest.approx(gaps[1] - gaps[0])
        assert gaps[1] > gaps[0]


def test_far_outside_the_data_the_gap_grows_in_proportion() -> None:
    near, far = ROUGHLY.predict(states(MENU, [0, 0], [200, 400], [2e5, 4e5]))
    assert 1.8 < far / near <= 2.0


@settings(deadline=None, max_examples=60)
@given(
    state=st.tuples(*(st.integers(0, high) for high in (63, 80_000, 8_000, 300, 6))),
    more=st.tuples(st.just(0), *(st.integers(0, high) for high in (20_000, 2_000, 200, 2))),
    tokens=st.sampled_from([0, 128, 256, 512, 2048]),
)
def test_more_context_prefill_or_admissions_are_never_faster(
    state: tuple[int, ...], more: tuple[int, ...], tokens: int
) -> None:
    rows = np.array([state, np.add(state, more)], dtype=np.float64)
    for model in (TWO, ROUGHLY, CORNERED, ONE):
        for share in (0, 1, 2):
            gaps = model.predict(
                states(
                    MENU, share, 1.0 + rows[:, 0], rows[:, 1], context_max=rows[:, 2], prefill_tokens=rows[:, 3],
                    admitted=rows[:, 4], microbatch_tokens=tokens,
                )
            )  # fmt: skip
            assert gaps[1] >= gaps[0] * (1.0 - 1e-12)


CORNERED = TwoStage.fit(replace(TRAIN, gap_ms=stepped(TRAIN)), ROUGH, 0)


def test_the_finetune_shape_means_nothing_to_decode_alone() -> None:
    shapes = [states(MENU, 0, 8, 4000, microbatch_tokens=tokens) for tokens in (0, 512)]
    for model in (ROUGHLY, ONE):
        assert model.predict(shapes[0]) == model.predict(shapes[1])


def test_a_larger_microbatch_is_learned_to_be_slower() -> None:
    small, large = (
        TWO.predict(states(MENU, 2, [4, 8, 16], [4e3, 8e3, 16e3], microbatch_tokens=tokens)) for tokens in (256, 512)
    )
    assert np.all(large > 1.05 * small)


def test_a_split_without_rows_is_as_slow_as_the_steepest_of_the_others() -> None:
    known = TRAIN.take(TRAIN.share != 1)
    solo_ms = TwoStage.fit(known, NO_TREES, 0).predict_solo(known)
    base = corun_base(known, solo_ms)
    slowdown = np.mean((known.gap_ms / solo_ms)[known.share == 2])
    assert base[0, 1] == pytest.approx(1.0 + (slowdown - 1.0) * 0.25 / 0.5)
    assert np.count_nonzero(base[0]) == 1


def test_weights_decide_between_contradicting_rows() -> None:
    slow = replace(TRAIN, gap_ms=TRAIN.gap_ms * 2.0)
    rows = {name: np.concatenate([getattr(TRAIN, name), getattr(slow, name)]) for name in ("gap_ms", "weight")}
    both = replace(TRAIN.take(np.tile(np.arange(len(TRAIN)), 2)), **rows)
    both.weight[: len(TRAIN)] = 1e-4
    for model in (TwoStage, LinearPerShare):
        assert error(model.fit(both, {}, 0), TEST, 2.0 * truth_ms(TEST)) < 0.08


def test_constant_is_the_median() -> None:
    model = Constant.fit(TRAIN, {}, 0)
    assert model.predict(TEST)[TEST.solo][0] == np.median(TRAIN.gap_ms[TRAIN.solo])


def test_a_fit_needs_decode_alone() -> None:
    with pytest.raises(HarliError, match="no step of decode alone"):
        TwoStage.fit(TRAIN.take(~TRAIN.solo), {}, 0)


def test_the_search_space_is_of_the_parameters() -> None:
    trial = optuna.trial.FixedTrial(DEFAULTS)
    assert TwoStage.space(trial) == DEFAULTS
