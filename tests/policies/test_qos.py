"""The look-ahead policy: its hard limit, what it plans, and how it fares against filling every step."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harli.rows import StepRecord
from harli.types import Decision, DecodeState, FinetuneState, HarliError, Menu, Share, Slo
from policies.base import PolicyContext
from policies.load import Load
from policies.plan import make_plan
from policies.qos import Qos
from policies.reactive import Reactive
from policies.separate import Separate
from policies.stepwise import Stepwise
from policies.trial import MENU, ExactPredictor
from predictor.base import Floats, Forecast, Outlook
from tests.policies.queue_loop import serve

TWO = Menu((Share(2, 0), Share(1, 1), Share(0, 2)))
READY = FinetuneState(ready=True, microbatch_tokens=256)
ALONE = Decision(Share(4, 0))
LOAD = Load(arrivals_per_s=2.0, dispersion=1.0, leaving=1 / 100, context=500.0, capacity=32, stretch=1.0, lateness=1.0)


class Bounded(ExactPredictor):
    """Bounds a tenth above the gaps."""

    def forecast(self, decode: DecodeState, finetune: FinetuneState) -> Forecast:
        forecast = super().forecast(decode, finetune)
        forecast.bound_ms = [1.1 * gap for gap in forecast.gap_ms]
        return forecast

    def outlook(self, batch: Floats, context_sum: Floats, finetune: FinetuneState) -> Outlook:
        outlook = super().outlook(batch, context_sum, finetune)
        return replace(outlook, bound_ms=1.1 * outlook.gap_ms)


class Unsure(Bounded):
    """Not sure of batches above 16."""

    def forecast(self, decode: DecodeState, finetune: FinetuneState) -> Forecast:
        forecast = super().forecast(decode, finetune)
        forecast.known = decode.batch <= 16
        return forecast


def make(slo: Slo, menu: Menu = MENU, background: bool = False, **params: Any) -> tuple[Qos, ExactPredictor]:
    predictor = Unsure(menu)
    return Qos(PolicyContext(menu, slo, 0, predictor, 32, background), **params), predictor


def state(time_s: float = 1.0, batch: int = 4, **changes: Any) -> DecodeState:
    return DecodeState(time_s, 1, batch, **{"context_sum": 500 * batch, "context_max": 600, **changes})


# The hard limit

steps = st.builds(
    state,
    time_s=st.floats(0.0, 100.0),
    batch=st.integers(1, 32),
    context_sum=st.integers(1, 100_000),
    prefill_tokens=st.sampled_from([0, 0, 0, 300]),
    admitted=st.integers(0, 3),
    waiting=st.sampled_from([0, 0, 0, 4]),
    slack_ms=st.floats(-50.0, 300.0),
)
slos = st.builds(Slo, st.none() | st.floats(5.0, 300.0), st.none() | st.floats(5.0, 300.0))
finetunes = st.builds(FinetuneState, ready=st.booleans(), held_ms=st.floats(0.0, 30.0), held_units=st.integers(0, 4))


@settings(max_examples=60, deadline=None)
@given(slos, st.lists(st.tuples(steps, finetunes), min_size=1, max_size=15), st.floats(1.0, 3.0) | st.just(math.inf))
def test_every_step_keeps_its_budget_and_the_slowdown(
    slo: Slo, sequence: list[tuple[DecodeState, FinetuneState]], slowdown: float
) -> None:
    policy, predictor = make(slo, slowdown=slowdown)
    for decode, finetune in sorted(sequence, key=lambda pair: pair[0].time_s):
        decision = policy.decide(decode, finetune)
        if decision == ALONE:
            continue
        assert finetune.ready
        assert not decode.waiting
        assert not (decision.exclusive_ms and (decode.prefill_tokens or decode.batch > 16))
        forecast, index = predictor.forecast(decode, finetune), MENU.shares.index(decision.share)
        window = decision.exclusive_ms and decision.exclusive_ms + predictor.costs.window_overhead_ms
        assert forecast.bound_ms[index] + window <= slo.budget_ms(decode.slack_ms) + 1e-6
        assert forecast.gap_ms[index] + window <= slowdown * forecast.gap_ms[0] + 1e-6
        if not forecast.known:
            assert forecast.bound_ms[index] <= 0.8 * slo.budget_ms(decode.slack_ms) + 1e-6


def test_an_slo_that_leaves_nothing_is_decode_alone() -> None:
    policy, _ = make(Slo(itl_ms=10.0))
    assert {policy.decide(state(0.1 * step, 1 + step % 30), READY) for step in range(100)} == {ALONE}


def test_finetuning_gives_way_at_once_when_requests_wait_or_nothing_is_there_to_train() -> None:
    policy, _ = make(Slo(itl_ms=80.0))
    assert policy.decide(state(), READY).share.finetune
    assert policy.decide(state(1.1, waiting=1), READY) == ALONE
    assert policy.decide(state(1.2), replace(READY, ready=False)) == ALONE
    assert policy.decide(state(1.3), READY).share.finetune
    assert policy.idle(READY) == MENU.finetune_alone


def test_a_late_request_has_the_device_to_itself() -> None:
    policy, _ = make(Slo(tpot_ms=60.0))
    assert policy.decide(state(slack_ms=60.0), READY).share.finetune
    assert policy.decide(state(slack_ms=-5.0), READY) == ALONE


def test_a_late_step_where_none_was_expected_says_nothing_about_those_that_are() -> None:
    policy, _ = make(Slo(itl_ms=300.0))
    policy.decide(state(waiting=1), READY)  # decode alone, though its bound fits
    values: dict[str, Any] = dict.fromkeys(StepRecord._fields, 0.0) | {"batch": 4, "gap_ms": 400.0}
    for _ in range(50):
        policy.observe(StepRecord(**values))
    assert policy._meter.load().lateness == 1.0


def test_prefill_has_no_window() -> None:
    policy, _ = make(Slo(itl_ms=300.0))
    assert policy.decide(state(batch=1), READY).exclusive_ms > 0.0
    assert policy.decide(state(1.1, batch=1, prefill_tokens=100), READY).exclusive_ms == 0.0


def test_a_window_has_to_outlast_the_unit_that_runs() -> None:
    policy, predictor = make(Slo(itl_ms=200.0))
    free = policy.decide(state(1.0, 1), READY).exclusive_ms
    held = replace(READY, held_units=2, held_ms=5.0)
    assert policy.decide(state(1.1, 1), held).exclusive_ms >= predictor.units(READY).longest_ms + 5.0
    assert not policy.decide(state(1.2, 1), replace(held, held_ms=free)).exclusive_ms


def test_a_larger_decode_part_is_not_switched_to_for_next_to_nothing() -> None:
    """With an expensive switch, decisions change less often."""
    switches = []
    for switch_ms in (0.0, 100.0):
        policy, predictor = make(Slo(itl_ms=60.0))
        predictor.costs = replace(predictor.costs, switch_ms=switch_ms)
        batches = [6 + round(5 * math.sin(step / 3)) for step in range(400)]
        shares = [policy.decide(state(0.05 * step, batch), READY).share for step, batch in enumerate(batches)]
        switches.append(sum(a.decode < b.decode for a, b in pairwise(shares)))
    assert switches[1] <= switches[0]


# The plan


def test_slowdown_must_not_be_below_one() -> None:
    for value in (0.9, -1.0, math.nan):
        with pytest.raises(HarliError, match="slowdown is a multiple"):
            make(Slo(), slowdown=value)


def test_without_a_predictor_it_says_what_to_do() -> None:
    with pytest.raises(HarliError, match="harli profile"):
        Qos(PolicyContext(MENU, Slo()))


@pytest.mark.parametrize("slo", [Slo(itl_ms=60.0), Slo(tpot_ms=50.0), Slo()])
def test_more_load_means_less_finetuning(slo: Slo) -> None:
    predictor = Unsure(MENU)
    gains = [
        make_plan(predictor, slo, replace(LOAD, arrivals_per_s=rate), READY, math.inf).gain for rate in (0.1, 2.0, 4.0)
    ]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] <= predictor.finetune_alone_tokens_per_s + 1e-6


def test_delay_costs_more_as_the_batch_fills() -> None:
    plan = make_plan(Unsure(MENU), Slo(itl_ms=60.0), replace(LOAD, arrivals_per_s=4.0), READY, math.inf)
    assert plan.capacity == LOAD.capacity
    assert min(plan.delay_cost) >= 0.0
    assert plan.delay_cost[-1] > 2.0 * plan.delay_cost[1]


def test_delay_costs_what_idling_would_earn_where_no_batch_can_gather() -> None:
    """A window before a batch of one only puts off the idle time in which finetuning has the device anyway."""
    whole, slo = Menu((Share(4, 0), Share(0, 4))), Slo(itl_ms=100.0)
    alone_per_s = ExactPredictor(whole).finetune_alone_tokens_per_s
    one, many = (
        make_plan(ExactPredictor(whole), slo, replace(LOAD, capacity=capacity), READY, math.inf) for capacity in (1, 32)
    )
    assert one.delay_cost[1] >= alone_per_s
    assert many.delay_cost[1] < alone_per_s


def test_plans_follow_the_load() -> None:
    """Delay is cheap in a quiet hour and dear in a busy one, when the batch is large."""
    predictor, slo = Unsure(MENU), Slo(itl_ms=60.0)
    quiet, busy = (
        make_plan(predictor, slo, replace(LOAD, arrivals_per_s=rate), READY, math.inf) for rate in (0.5, 5.0)
    )
    assert quiet.delay_cost[16] < busy.delay_cost[16]


def test_steps_slower_than_planned_are_learned() -> None:
    policy, predictor = make(Slo(itl_ms=80.0))
    for step in range(300):
        decode = state(0.05 * step, 4)
        decision = policy.decide(decode, READY)
        gap = 1.5 * predictor.forecast(decode, READY).gap_ms[MENU.shares.index(decision.share)]
        values: dict[str, Any] = dict.fromkeys(StepRecord._fields, 0.0)
        values |= {"batch": 4, "wanted_finetune": decision.share.finetune, "gap_ms": gap if step else math.nan}
        policy.observe(StepRecord(**values))
    assert policy._meter.load().stretch == pytest.approx(1.5, rel=0.02)


def test_in_the_background_it_decides_alone_until_the_first_plan_is_there() -> None:
    policy, _ = make(Slo(itl_ms=80.0), background=True)
    first = policy.decide(state(0.0), READY)
    decision = first
    for step in range(1, 1_000_000):
        if decision.share.finetune:
            break
        decision = policy.decide(state(1e-6 * step), READY)
    assert decision.share.finetune


# Against the others, in a queue


def outcome(kind: type, slo: Slo, rate: float, **params: Any) -> Any:
    predictor = Bounded(TWO)
    policy = kind(PolicyContext(TWO, slo, 0, predictor, 24, background=False), **params)
    return serve(
        policy, predictor, slo, arrivals_per_s=rate, output_tokens=100, duration_s=400.0, max_batch=24, noise=0.03
    )


def test_at_high_load_filling_every_step_fills_the_batch_and_look_ahead_does_not() -> None:
    slo = Slo(itl_ms=120.0)
    alone, qos = outcome(Separate, slo, 3.5), outcome(Qos, slo, 3.5)
    stepwise = outcome(Stepwise, slo, 3.5)
    assert stepwise.mean_batch > 20.0
    assert stepwise.wait_p99_s > 5.0
    assert qos.wait_p99_s < alone.wait_p99_s + 0.5
    assert qos.mean_batch < stepwise.mean_batch
    assert qos.finetune_tokens_per_s > 3.0 * alone.finetune_tokens_per_s


def test_at_moderate_load_it_finetunes_more_and_later_less() -> None:
    slo = Slo(itl_ms=40.0)
    stepwise, qos = outcome(Stepwise, slo, 2.0), outcome(Qos, slo, 2.0)
    assert qos.finetune_tokens_per_s > stepwise.finetune_tokens_per_s
    assert qos.within_slo >= stepwise.within_slo
    assert qos.within_slo > 0.99


def test_a_tpot_slo_is_kept_where_reacting_to_it_is_too_late() -> None:
    slo = Slo(tpot_ms=40.0)
    alone, qos, reactive = (
        outcome(Separate, slo, 2.5),
        outcome(Qos, slo, 2.5),
        outcome(Reactive, slo, 2.5),
    )
    assert qos.requests_within_slo >= 0.99 * alone.requests_within_slo
    assert qos.requests_within_slo > reactive.requests_within_slo
    assert qos.finetune_tokens_per_s > 3.0 * alone.finetune_tokens_per_s


def test_the_same_seed_serves_the_same() -> None:
    first, second = (outcome(Qos, Slo(itl_ms=50.0), 2.0) for _ in range(2))
    assert first.decisions == second.decisions
    assert np.isfinite(first.finetune_tokens_per_s)


def test_slack_is_left_for_steps_that_take_longer_than_planned() -> None:
    def window_ms(slo: Slo, excess_ms: float, plain_steps: int) -> float:
        policy, predictor = make(slo)
        gap_ms = predictor.forecast(state(), READY).gap_ms[0]
        policy.decide(state(slack_ms=100.0), READY)
        for excess in (excess_ms, *[0.0] * plain_steps):
            values: dict[str, Any] = dict.fromkeys(StepRecord._fields, 0.0)
            policy.observe(StepRecord(**values | {"batch": 4, "gap_ms": gap_ms + excess}))
        return policy.decide(state(slack_ms=100.0), READY).exclusive_ms

    tpot, itl = Slo(tpot_ms=60.0), Slo(itl_ms=60.0)
    assert 0.0 < window_ms(tpot, 20.0, 0) <= window_ms(tpot, 0.0, 0) - 20.0
    assert window_ms(tpot, 20.0, 10_000) == pytest.approx(window_ms(tpot, 0.0, 10_000), abs=1.0)
    assert window_ms(itl, 20.0, 0) == window_ms(itl, 0.0, 0)
