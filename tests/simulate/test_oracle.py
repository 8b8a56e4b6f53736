"""The oracle: what it knows comes true, and nobody who keeps the SLO earns more."""

from __future__ import annotations

import numpy as np
import pytest

from harli.compare.cell import groups
from harli.compare.results import compared
from harli.compare.verdict import TOKENS, Run, judge
from harli.config import FinetuneSettings
from harli.simulate.device import Noise
from harli.simulate.finetune import UnitClock
from harli.simulate.oracle import Foresight, Oracle
from harli.simulate.run import Simulation
from harli.types import DecodeState, FinetuneState, HarliError, Slo
from harli.workload.base import Request
from harli.workload.make import make_workload
from policies.base import PolicyContext
from policies.testing import check
from policies.trial import MENU, ExactPredictor
from tests.simulate.builders import FINETUNE, device
from tests.simulate.test_run import settings

NOISY = Noise(sigma=0.1)
REQUESTS = tuple(Request(0.02 * place, 20 + place, 10 + 7 * (place % 9)) for place in range(60))


def clock(accumulation: int = 1) -> UnitClock:
    finetune = FinetuneSettings(microbatch_tokens=64, accumulation=accumulation)
    return UnitClock(device(NOISY, finetune), finetune, np.random.default_rng(3))


def test_a_draw_is_what_was_coming() -> None:
    one, decode, finetune = device(NOISY), DecodeState(batch=3, context_sum=90), FinetuneState(ready=True)
    shown, drawn = [], []
    for place in range(50):
        share = one.menu.shares[place % 3]
        shown.append(one.coming_step_ms(decode, finetune, share.decode, share.finetune))
        drawn.append(one.draw_step_ms(decode, finetune, share.decode, share.finetune))
    assert shown == drawn
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_coming_window_is_the_one_that_then_comes_and_ends_in_time(accumulation: int) -> None:
    units, rng, now_s, opened = clock(accumulation), np.random.default_rng(0), 0.0, 0
    for _ in range(300):
        most_ms = float(rng.uniform(0.0, 30.0))
        asked_ms, takes_ms, work_ms = units.coming_window(now_s, most_ms)
        assert takes_ms <= most_ms
        held_ms = units.held_ms(now_s)
        if takes_ms > 0.0:
            end_s = units.window(now_s, asked_ms, np.inf)
            assert (end_s - now_s) * 1e3 == pytest.approx(takes_ms)
            assert work_ms == pytest.approx(takes_ms - held_ms, rel=0.5, abs=1e-9)
            now_s, opened = end_s, opened + (work_ms > 0.0)
        units.run(now_s, now_s + 0.004, 2, 1.1)
        now_s += 0.004
    assert opened > 100


def test_forecasts_come_true_and_every_step_keeps_its_budget() -> None:
    one = device(NOISY)
    foresight = Foresight(one, clock(), REQUESTS)
    decode, finetune = DecodeState(batch=2, context_sum=50), FinetuneState(ready=True, microbatch_tokens=64)
    forecast = foresight.forecast(decode, finetune)
    assert forecast.gap_ms == [
        one.coming_step_ms(decode, finetune, share.decode, share.finetune) for share in one.menu.shares[:-1]
    ]
    chosen = settings(policy="oracle", params={"price": 0.0}, slo={"itl_ms": 40.0}, noise={"sigma": 0.1})
    workload = make_workload(chosen.workload, 256)
    simulation = Simulation(chosen, device(chosen.noise, FINETUNE), workload)
    info, tables = simulation.measure()
    gaps = [gap for row in tables.requests["itl_ms"].to_pylist() for gap in row]
    assert info.finetune.state == "finished"
    assert max(gaps) <= 40.0 + 1e-6
    assert np.percentile(gaps, 90) > 39.0  # and uses it up
    assert info.summary["finetune/tokens_per_s"]


@pytest.mark.parametrize(("requests_per_s", "itl_ms"), [(0.5, 22.0), (0.5, 60.0), (1.0, 30.0)])
def test_nobody_who_leaves_decode_unharmed_earns_more(requests_per_s: float, itl_ms: float) -> None:
    slo = Slo(itl_ms=itl_ms)

    def run(policy: str, **params: object) -> Run:
        chosen = settings(
            policy=policy,
            params=params,
            slo={"itl_ms": itl_ms},
            workload={"requests_per_s": requests_per_s, "duration_s": 60.0},
        )
        workload = make_workload(chosen.workload, 256)
        info, tables = Simulation(chosen, device(chosen.noise, chosen.finetune), workload).measure()
        return Run(compared(info.summary, tables.requests, tables.updates, 60.0), info.finetune.reason)

    separate = run("separate")

    def earned(one: Run) -> float:
        return one.get(TOKENS) if not judge({1: one}, {1: separate}, slo).reason else 0.0

    (variants,) = groups(("oracle",), device().menu)
    best = max(earned(run(entrant.policy, **dict(entrant.params))) for entrant in variants)
    rivals = [run("qos"), run("stepwise"), run("timeslice")]
    rivals += [run("static", share=share, work_conserving=True) for share in ("3/1", "2/2")]
    assert best > 0.0
    assert best >= 0.98 * max(map(earned, rivals))  # a near limit, as its page says


def test_only_a_simulation_has_it() -> None:
    for predictor in (None, ExactPredictor(MENU)):
        with pytest.raises(HarliError, match="only a simulation does: use it with harli simulate"):
            Oracle(PolicyContext(MENU, Slo(itl_ms=40.0), predictor=predictor))
    with pytest.raises(HarliError, match="only a simulation does"):
        check("oracle")


def test_a_negative_price_is_refused() -> None:
    one = device()
    context = PolicyContext(one.menu, Slo(itl_ms=40.0), predictor=Foresight(one, clock(), REQUESTS))
    with pytest.raises(HarliError, match="from 0 on, not -1"):
        Oracle(context, price=-1.0)


def test_without_anything_to_train_decode_is_alone() -> None:
    one = device()
    context = PolicyContext(one.menu, Slo(itl_ms=40.0), predictor=Foresight(one, clock(), REQUESTS))
    decision = Oracle(context).decide(DecodeState(batch=1, context_sum=5), FinetuneState())
    assert (decision.share, decision.exclusive_ms) == (one.menu.decode_alone, 0.0)
