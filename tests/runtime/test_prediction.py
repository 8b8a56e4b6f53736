"""The predictor in the loop: its forecast is in the rows, it hears of every step, and it can do no harm."""

from __future__ import annotations

import math

import pytest

from harli.rows import StepRecord
from harli.runtime.controller import Controller
from harli.types import DecodeState, FinetuneState, Slo
from policies.testing import ExactPredictor
from predictor.base import Forecast
from tests.runtime.stand_ins import ALONE, FINETUNE, HALF, MENU, Engine


class Watched(ExactPredictor):
    def __init__(self) -> None:
        super().__init__(MENU)
        self.heard: list[StepRecord] = []
        self.held: list[int] = []
        self.error: Exception | None = None

    def forecast(self, decode: DecodeState, finetune: FinetuneState) -> Forecast:
        if self.error is not None:
            raise self.error
        self.held.append(finetune.held_units)
        return super().forecast(decode, finetune)

    def observe(self, row: StepRecord) -> None:
        self.heard.append(row)


@pytest.fixture
def predictor(engine: Engine) -> Watched:
    predictor = Watched()
    engine.controller = Controller(engine.policy, "scripted", predictor)
    engine.session.begin(engine.controller, Slo(), engine.clock_zero)
    return predictor


def test_rows_have_the_forecast_of_the_share_that_the_step_had(engine: Engine, predictor: Watched) -> None:
    alone, half = engine.step(ALONE), engine.step(HALF)
    forecast = predictor.forecast(DecodeState(), FinetuneState())
    assert (alone.predicted_ms, alone.bound_ms) == (forecast.gap_ms[0], forecast.bound_ms[0])
    assert half.predicted_ms == forecast.gap_ms[2]
    assert predictor.heard == [alone, half]


def test_a_unit_that_runs_is_in_the_state_and_its_share_in_the_row(engine: Engine, predictor: Watched) -> None:
    units = engine.attach()
    engine.step(HALF)
    units.entered()
    row = engine.step(ALONE)  # the unit holds two of four until it ends
    assert predictor.held[-1] == 2
    assert row.decode_units == 2
    assert row.predicted_ms == predictor.forecast(DecodeState(), FinetuneState()).gap_ms[2]
    units.end()
    assert units.stays_out()
    engine.step(ALONE)
    assert predictor.held[-1] == 0


def test_no_unit_begins_once_decode_alone_is_decided(engine: Engine, predictor: Watched) -> None:
    engine.policy.idle_share = FINETUNE
    engine.attach()
    engine.policy.decision = type(engine.policy.decision)(ALONE)
    engine.session.decide(engine._observe)
    assert engine.session.gate.allowed == 0


def test_a_predictor_that_raises_pauses_finetuning_and_decode_goes_on(engine: Engine, predictor: Watched) -> None:
    engine.step(HALF)
    predictor.error = RuntimeError("broken")
    row = engine.step(HALF)
    assert row.wanted_finetune == 0
    assert math.isnan(row.predicted_ms)
    assert "broken" in engine.controller.failure


def test_without_a_predictor_the_columns_are_empty(engine: Engine) -> None:
    engine.begin()
    row = engine.step(HALF)
    assert math.isnan(row.predicted_ms)
    assert math.isnan(row.bound_ms)
