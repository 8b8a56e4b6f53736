from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from harli.rows import StepRecord
from harli.types import DecodeState, FinetuneState
from predictor.base import Floats
from predictor.correction import STALE, STEP, WINDOW, CorrectedPredictor
from predictor.table import TablePredictor
from tests.predictor.fitted import artifact
from tests.records.builders import STEP as ROW

INNER = TablePredictor(artifact())
FINETUNE = FinetuneState(True, 256)
SIGMA = 0.04


class Machine:
    """A machine on which a step takes the inner forecast times lognormal noise times what ``slow`` says."""

    def __init__(self, seed: int = 0, coverage: float = 0.99) -> None:
        self.predictor = CorrectedPredictor(INNER, coverage)
        self.rng = np.random.default_rng(seed)
        self.step = 0
        self.bound_ms = math.nan
        self.gap_ms = math.nan
        # The inner bound against which the noise is scaled: it covers ``coverage``.
        self.quantile = float(np.quantile(np.random.default_rng(1).normal(0.0, SIGMA, 200_000), coverage))

    def run(self, steps: int, slow: float = 1.0, share: int = 0, noise: float = 1.0, **changes: Any) -> Floats:
        """Whether each of ``steps`` kept its bound."""
        covered = np.empty(steps)
        for place in range(steps):
            self.step += 1
            decode = DecodeState(time_s=float(self.step), step=self.step, batch=8, context_sum=6000, context_max=800)
            forecast = self.predictor.forecast(decode, FINETUNE)
            self.gap_ms, self.bound_ms = forecast.gap_ms[share], forecast.bound_ms[share]
            raw = INNER.forecast(decode, FINETUNE)
            scale = math.log(raw.bound_ms[share] / raw.gap_ms[share]) / self.quantile
            actual_ms = raw.gap_ms[share] * slow * math.exp(self.rng.normal(0.0, SIGMA) * scale * noise)
            covered[place] = actual_ms <= self.bound_ms
            self.predictor.observe(self.row(actual_ms, share)._replace(**changes))
        return covered

    def row(self, gap_ms: float, share: int) -> StepRecord:
        units = INNER.menu.shares[share]
        return ROW._replace(
            step=self.step,
            gap_ms=gap_ms,
            predicted_ms=self.gap_ms,
            bound_ms=self.bound_ms,
            decode_units=units.decode,
            finetune_units=units.finetune,
            wanted_finetune=0,
        )


@pytest.mark.parametrize("share", [0, 2])
def test_a_machine_that_slows_down_is_covered_again_within_50_steps(share: int) -> None:
    after = []
    for seed in range(10):
        machine = Machine(seed)
        machine.run(300, share=share)
        machine.run(50, 1.5, share)
        after.append(machine.run(300, 1.5, share).mean())
        assert machine.predictor.state()["gap_factor_split" if share else "gap_factor_alone"] == pytest.approx(
            1.5, 0.05
        )
    assert np.mean(after) >= 0.99


def test_it_forgets_a_slowdown_that_is_over() -> None:
    machine = Machine()
    machine.run(200)
    before = machine.bound_ms
    machine.run(200, 1.5)
    assert machine.bound_ms > 1.4 * before
    machine.run(50)
    assert machine.bound_ms < 1.15 * before
    assert machine.predictor.state()["gap_factor_alone"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("coverage", [0.95, 0.99])
def test_long_run_coverage_holds_and_costs_little_width(coverage: float) -> None:
    machine = Machine(3, coverage)
    covered = machine.run(8000)
    assert covered.mean() >= coverage - 0.003
    assert machine.predictor.state()["bound_factor_alone"] < 1.15


def test_coverage_holds_where_the_calibration_was_too_narrow() -> None:
    machine = Machine(4)
    machine.run(1000, noise=2.5)
    assert machine.run(6000, noise=2.5).mean() >= 0.987


def test_one_straggler_widens_a_bound_by_one_step_at_most() -> None:
    machine = Machine(5)
    machine.run(200)
    before = machine.predictor.state()["bound_factor_alone"]
    machine.run(1, slow=20.0)
    after = machine.predictor.state()
    assert after["bound_factor_alone"] <= before * math.exp(STEP) * 1.02
    assert after["gap_factor_alone"] == pytest.approx(1.0, abs=0.03)


def test_bounds_are_never_below_calibration_on_a_faster_machine() -> None:
    machine = Machine(6)
    machine.run(300, slow=0.5)
    state = machine.predictor.state()
    assert state["gap_factor_alone"] == pytest.approx(0.5, abs=0.05)
    assert state["bound_factor_alone"] == 1.0
    assert machine.gap_ms < machine.bound_ms


def test_steps_that_say_nothing_are_not_learned_from() -> None:
    machine = Machine()
    machine.run(20, gap_ms=math.nan)
    machine.run(20, window_ms=6000.0)
    machine.run(20, share=1, finetune_units=0)
    machine.run(20, decode_units=0)
    machine.run(20, step=-5)
    assert machine.predictor.state()["steps"] == 0.0
    assert machine.predictor.state()["bound_factor_split"] == 1.0


def test_a_window_is_not_part_of_the_gap() -> None:
    machine = Machine()
    decode = DecodeState(time_s=1.0, step=1, batch=8, context_sum=6000, context_max=800)
    for step in range(1, WINDOW + 1):
        decode.step = machine.step = step
        forecast = machine.predictor.forecast(decode, FINETUNE)
        machine.gap_ms, machine.bound_ms = forecast.gap_ms[0], forecast.bound_ms[0]
        gap_ms = forecast.gap_ms[0] / machine.predictor.state()["gap_factor_alone"]
        machine.predictor.observe(machine.row(gap_ms + 100.0, 0)._replace(window_ms=100.0))
    assert machine.predictor.state()["gap_factor_alone"] == pytest.approx(1.0)
    assert machine.predictor.state()["steps"] == WINDOW


def test_a_side_that_has_no_steps_follows_the_other() -> None:
    machine = Machine()
    machine.run(WINDOW, 1.5)
    assert machine.predictor.state()["gap_factor_split"] == pytest.approx(1.5, abs=0.1)
    machine.run(2 * WINDOW, 1.5, share=1)
    machine.run(STALE // 2)
    assert machine.predictor.state()["gap_factor_split"] == pytest.approx(1.5, abs=0.1)
    machine.run(STALE)
    assert machine.predictor.state()["gap_factor_split"] == pytest.approx(1.0, abs=0.05)


def test_an_asynchronous_engine_observes_a_step_later() -> None:
    machine = Machine()
    rows = []
    for step in range(1, 60):
        decode = DecodeState(time_s=step, step=step, batch=4 + step % 9, context_sum=6000, context_max=800)
        machine.step = step
        raw = INNER.forecast(decode, FINETUNE).gap_ms[0]
        forecast = machine.predictor.forecast(decode, FINETUNE)
        machine.gap_ms, machine.bound_ms = forecast.gap_ms[0], forecast.bound_ms[0]
        rows.append(machine.row(raw * 1.5, 0))
        if step > 1:
            machine.predictor.observe(rows[-2])
    assert machine.predictor.state()["gap_factor_alone"] == pytest.approx(1.5)


def test_outlooks_are_corrected_like_forecasts() -> None:
    machine = Machine()
    machine.run(100, 1.5, share=1)
    machine.run(40, 1.2, share=0)
    outlook = machine.predictor.outlook(np.array([8.0]), np.array([6000.0]), FINETUNE)
    raw = INNER.outlook(np.array([8.0]), np.array([6000.0]), FINETUNE)
    state = machine.predictor.state()
    gap, split = state["gap_factor_alone"], state["gap_factor_split"]
    np.testing.assert_allclose(outlook.gap_ms / raw.gap_ms, [[gap, split, split]])
    assert split > 1.4 > 1.25 > gap
    np.testing.assert_array_equal(outlook.finetune_tokens_per_s, raw.finetune_tokens_per_s)


def test_a_step_has_one_forecast() -> None:
    predictor = CorrectedPredictor(INNER, 0.99)
    decode = DecodeState(time_s=1.0, step=1, batch=8, context_sum=6000, context_max=800)
    assert predictor.forecast(decode, FINETUNE) is predictor.forecast(decode, FINETUNE)
