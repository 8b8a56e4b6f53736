"""The policies that the look-ahead is measured against."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from harli.rows import StepRecord
from harli.types import Decision, DecodeState, FinetuneState, HarliError, Menu, Share, Slo
from policies.base import PolicyContext
from policies.linear import Linear
from policies.reactive import Reactive
from policies.stepwise import Stepwise
from policies.timeslice import Timeslice
from policies.trial import MENU, ExactPredictor
from policies.unmanaged import Unmanaged
from predictor.base import Floats, Outlook

READY = FinetuneState(ready=True, microbatch_tokens=256)
ALONE = Decision(Share(4, 0))
WHOLE = Menu((Share(4, 0), Share(0, 4)))


def context(slo: Slo, menu: Menu = MENU) -> PolicyContext:
    return PolicyContext(menu, slo, 0, ExactPredictor(menu), 32)


def state(batch: int = 4, **changes: Any) -> DecodeState:
    return DecodeState(**{"batch": batch, "context_sum": 500 * batch, **changes})


def row(gap_ms: float) -> StepRecord:
    return StepRecord(**{**dict.fromkeys(StepRecord._fields, 0.0), "gap_ms": gap_ms})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Timeslice, Stepwise, Linear])
def test_those_that_predict_need_a_predictor(kind: type) -> None:
    with pytest.raises(HarliError, match="harli train-predictor"):
        kind(PolicyContext(MENU, Slo()))


@pytest.mark.parametrize("kind", [Timeslice, Stepwise, Linear, Reactive])
def test_nothing_to_train_is_decode_alone(kind: type) -> None:
    policy = kind(context(Slo(itl_ms=200.0)))
    assert policy.decide(state(), FinetuneState()) == ALONE


# Unmanaged


def test_unmanaged_takes_the_largest_split_whatever_happens() -> None:
    policy = Unmanaged(context(Slo(itl_ms=1.0)))
    assert policy.decide(state(32, waiting=9, slack_ms=-5.0), READY) == Decision(Share(1, 3))
    assert policy.idle(READY) == Share(0, 4)
    with pytest.raises(HarliError, match="cannot be split"):
        Unmanaged(context(Slo(), WHOLE))


# Time slices


def test_a_time_slice_fills_the_budget_and_leaves_decode_the_device() -> None:
    policy = Timeslice(context(Slo(itl_ms=50.0)))  # a step of 8 + 4 + 2 ms, 1 ms for the window
    decision = policy.decide(state(), READY)
    assert decision.share == Share(4, 0)
    assert decision.exclusive_ms == pytest.approx(35.0)
    assert policy.decide(state(28), READY) == ALONE  # no unit fits into what is left
    held = replace(READY, held_units=2, held_ms=20.0)
    assert policy.decide(state(), held).exclusive_ms == pytest.approx(35.0)
    assert policy.decide(state(), replace(held, held_ms=36.0)) == ALONE
    assert policy.decide(state(100), READY) == ALONE


def test_without_an_slo_windows_end_all_the_same() -> None:
    assert Timeslice(context(Slo())).decide(state(), READY).exclusive_ms == pytest.approx(1000.0 - 15.0)
    assert Stepwise(context(Slo())).decide(state(), READY).exclusive_ms < 1000.0


# Stepwise


@pytest.mark.parametrize("itl_ms", [10.0, 18.0, 25.0, 40.0, 80.0, 300.0])
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_stepwise_takes_the_most_tokens_that_fit(itl_ms: float, batch: int) -> None:
    given = context(Slo(itl_ms=itl_ms))
    predictor = given.need_predictor()
    forecast, costs = predictor.forecast(state(batch), READY), predictor.costs
    options = [(0.0, ALONE)]
    for index, share in enumerate(MENU.shares[:-1]):
        gap, rate = forecast.gap_ms[index], forecast.finetune_tokens_per_s[index]
        if gap <= itl_ms:
            options.append((rate * gap, Decision(share)))
            window = itl_ms - gap - costs.window_overhead_ms
            used = predictor.units(READY).in_window_ms(window, split=index > 0)
            if used:
                more = predictor.alone_tokens_per_s(READY) * used
                options.append((rate * gap + more, Decision(share, window)))
    assert Stepwise(given).decide(state(batch), READY) == max(options, key=lambda option: option[0])[1]


def test_stepwise_spends_slack_but_not_more_than_twice_a_tpot_slo() -> None:
    policy = Stepwise(context(Slo(tpot_ms=40.0)))
    windows = [policy.decide(state(slack_ms=slack), READY) for slack in (-10.0, 40.0, 80.0, 500.0, math.inf)]
    assert windows[0] == ALONE
    assert windows[1].exclusive_ms < windows[2].exclusive_ms
    assert windows[2] == windows[3] == windows[4]


# Linear


def test_the_linear_model_is_right_where_the_device_is_linear() -> None:
    """The device's slowdown is not linear in the share, so only decode alone is."""
    policy = Linear(context(Slo()))
    for batch in (1, 7, 30):
        gaps, bounds, _ = policy.limits(state(batch), READY)
        assert gaps[0] == pytest.approx(8.0 + batch + 0.5 * batch)
        assert gaps is bounds
        assert list(gaps) == sorted(gaps)
        steps = np.diff(gaps)
        assert steps == pytest.approx(np.full(len(steps), steps[0]))


class Straight(ExactPredictor):
    """A device as the linear model has it: slowdown 1 + 0.8 share."""

    def outlook(self, batch: Floats, context_sum: Floats, finetune: FinetuneState) -> Outlook:
        outlook = super().outlook(batch, context_sum, finetune)
        slowdowns = 1.0 + 0.8 * np.array([share.finetune_share for share in self.menu.shares[:-1]])
        return replace(outlook, gap_ms=outlook.gap_ms[:, :1] * slowdowns)


def test_the_linear_model_finds_its_own_constants() -> None:
    policy = Linear(PolicyContext(MENU, Slo(), 0, Straight(MENU), 32))
    gaps, _, _ = policy.limits(state(10), READY)
    assert gaps == pytest.approx([23.0 * (1.0 + 0.8 * share) for share in (0.0, 0.25, 0.5, 0.75)])


def test_linear_works_without_splits_and_with_a_batch_of_one() -> None:
    policy = Linear(PolicyContext(WHOLE, Slo(itl_ms=50.0), 0, ExactPredictor(WHOLE), 1))
    assert policy.decide(state(1), READY).exclusive_ms > 0.0


# Reactive


def level(policy: Reactive) -> int:
    return policy.decide(state(), READY).share.finetune


def test_reactive_climbs_while_gaps_are_short_and_stays_between_the_marks() -> None:
    policy = Reactive(context(Slo(itl_ms=100.0)), every=4)
    assert level(policy) == 0
    for _ in range(8):
        policy.observe(row(50.0))
    assert level(policy) == 2
    for _ in range(40):
        policy.observe(row(80.0))
    assert level(policy) == 2
    for _ in range(40):
        policy.observe(row(50.0))
    assert level(policy) == 3


def test_reactive_steps_back_at_once_when_the_slo_is_missed() -> None:
    policy = Reactive(context(Slo(itl_ms=100.0)), every=4)
    for _ in range(12):
        policy.observe(row(10.0))
    policy.observe(row(101.0))
    assert level(policy) == 2
    for _ in range(4):
        policy.observe(row(97.0))
    assert level(policy) == 1
    for _ in range(9):
        policy.observe(row(500.0))
    assert level(policy) == 0


def test_reactive_looks_at_the_mean_for_a_tpot_slo() -> None:
    policy = Reactive(context(Slo(tpot_ms=100.0)), every=4)
    for gap in (10.0, 10.0, 10.0, 190.0):  # 55 on average
        policy.observe(row(gap))
    assert level(policy) == 1
    for gap in (10.0, 10.0, 10.0, 390.0):
        policy.observe(row(gap))
    assert level(policy) == 0


def test_reactive_ignores_the_first_step_after_idling() -> None:
    policy = Reactive(context(Slo(itl_ms=100.0)), every=2)
    for gap in (math.nan, 10.0, math.nan, 10.0):
        policy.observe(row(gap))
    assert level(policy) == 1


@pytest.mark.parametrize("params", [{"low": 0.0}, {"low": 1.0, "high": 0.9}, {"every": 0}])
def test_reactive_refuses_marks_that_make_no_sense(params: dict[str, Any]) -> None:
    with pytest.raises(HarliError, match="policy 'reactive' needs"):
        Reactive(context(Slo()), **params)
