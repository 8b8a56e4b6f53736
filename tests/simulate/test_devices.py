"""The device models: the numbers that they stand for, the noise, and predictors that agree with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harli.config import FinetuneSettings
from harli.simulate.analytic import H200_LLAMA_3_8B, AnalyticDevice
from harli.simulate.device import BLOCK, Noise
from harli.simulate.devices import trained_device
from harli.simulate.finetune import UnitClock
from harli.simulate.predicted import PredictedDevice
from harli.types import DecodeState, FinetuneState, HarliError, UnitTime
from predictor.base import Predictor
from tests.predictor.fitted import artifact
from tests.simulate.builders import FINETUNE, QUIET, device

READY = FinetuneState(ready=True, microbatch_tokens=64)


def state(batch: int, context_sum: int, step: int = 1) -> DecodeState:
    return DecodeState(step=step, batch=batch, context_sum=context_sum)


def test_the_h200_is_the_one_that_was_measured() -> None:
    h200 = AnalyticDevice(H200_LLAMA_3_8B, FinetuneSettings(microbatch_tokens=4096), QUIET, 0)
    assert h200.step_ms(state(1, 1), READY, 132, 0) == pytest.approx(3.5, rel=0.02)
    assert h200.step_ms(state(256, 256 << 10), READY, 132, 0) == pytest.approx(11.5, rel=0.02)
    assert h200.predictor.finetune_alone_tokens_per_s == pytest.approx(17_500, rel=0.02)
    rates = h200.predictor.forecast(state(80, 80_000), READY).finetune_tokens_per_s
    assert rates[0] == 0.0
    assert rates[-1] == pytest.approx(10_590, rel=0.02)  # 40/92


@pytest.mark.parametrize(("batch", "context_sum"), [(1, 10), (8, 4000), (200, 900_000)])
def test_the_predictor_is_exact(batch: int, context_sum: int) -> None:
    small = device(Noise(sigma=0.1, straggler_probability=0.002))
    predictor, decode = small.predictor, state(batch, context_sum)
    forecast = predictor.forecast(decode, READY)
    outlook = predictor.outlook(np.array([float(batch)]), np.array([float(context_sum)]), READY)
    for index, share in enumerate(small.menu.shares[:-1]):
        draws = [small.draw_step_ms(decode, READY, share.decode, share.finetune) for _ in range(40_000)]
        assert forecast.gap_ms[index] == pytest.approx(np.mean(draws), rel=0.01)
        assert np.mean(np.array(draws) <= forecast.bound_ms[index]) == pytest.approx(0.99, abs=0.003)
    assert outlook.gap_ms[0] == pytest.approx(forecast.gap_ms)
    assert outlook.bound_ms[0] == pytest.approx(forecast.bound_ms)
    assert outlook.finetune_tokens_per_s[0] == pytest.approx(forecast.finetune_tokens_per_s)


def played_back(finetune: FinetuneSettings, predictor: Predictor) -> PredictedDevice:
    return PredictedDevice(
        predictor, finetune, QUIET, 0, name="played", model="four-layers", coverage=0.99, data_sha256="0"
    )


def test_a_predicted_device_plays_its_predictor_back() -> None:
    finetune = FINETUNE.model_copy(update={"accumulation": 2})
    origin = device(finetune=finetune)
    played = played_back(finetune, origin.predictor)
    assert (played.layers, played.pass_tokens) == (origin.layers, origin.pass_tokens)
    decode = state(5, 3000)
    for share in origin.menu.shares[:-1]:
        arguments = (decode, READY, share.decode, share.finetune)
        assert played.step_ms(*arguments) == pytest.approx(origin.step_ms(*arguments))
        if share.finetune:
            assert played.slowdown(*arguments) == pytest.approx(origin.slowdown(*arguments))
            assert played.unit_ms("backward", share.finetune) == origin.unit_ms("backward", share.finetune)


def test_a_trained_predictor_is_a_device(tmp_path: Path) -> None:
    finetune = FINETUNE.model_copy(update={"microbatch_tokens": 256})
    trained = artifact()
    whole = {"embed": 1.0, "forward": 10.0, "loss": 20.0, "backward": 25.0, "optimizer": 2.0}
    times = [UnitTime(kind, 4, 256, 0, 8.0, mean_ms) for kind, mean_ms in whole.items()]
    times += [UnitTime("forward", part, 256, 0, 8.0, 40.0 / part) for part in (1, 2)]
    trained.model_copy(update={"unit_times": tuple(times)}).save(tmp_path)
    on = trained_device(tmp_path, "profiled", finetune, QUIET, 0)
    assert (on.model, on.layers, on.coverage) == ("some/model-24M", 8, 0.99)
    assert on.unit_ms("backward", 1) == pytest.approx(100.0)  # as many times longer as the forward units
    ready = FinetuneState(ready=True, microbatch_tokens=256)
    alone_ms, beside_ms = (on.step_ms(state(8, 4000), ready, *share) for share in ((4, 0), (2, 2)))
    assert 12.0 < alone_ms < beside_ms
    rate = on.predictor.forecast(state(8, 4000), ready).finetune_tokens_per_s[2]
    beside_pass_ms = on.slowdown(state(8, 4000), ready, 2, 2) * on.pass_ms(2, 1)
    assert 1e3 * on.pass_tokens / beside_pass_ms == pytest.approx(rate)


def test_unknown_micro_batches_are_named() -> None:
    other = FINETUNE.model_copy(update={"microbatch_tokens": 128})
    with pytest.raises(HarliError, match=r"128 tokens .* \(others: 64\)"):
        played_back(other, device().predictor)


def test_stragglers_and_drift() -> None:
    noise = Noise(sigma=0.0, straggler_probability=0.25, straggler_factor=4.0, drift_per_minute=0.5)
    ratios = noise.steps(np.random.default_rng(0))
    drawn = [next(ratios) for _ in range(4 * BLOCK)]
    assert set(drawn) == {1.0, 4.0}
    assert np.mean(drawn) == pytest.approx(noise.mean, rel=0.03)
    assert noise.quantile(0.7) == 1.0
    assert noise.quantile(0.8) == 4.0
    small = device(Noise(sigma=0.0, drift_per_minute=0.5))
    early, late = (DecodeState(time_s=time_s, batch=1, context_sum=10) for time_s in (0.0, 120.0))
    assert small.draw_step_ms(late, READY, 4, 0) == pytest.approx(2.0 * small.draw_step_ms(early, READY, 4, 0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sigma", -0.1),
        ("sigma", float("nan")),
        ("straggler_probability", 1.5),
        ("straggler_factor", 0.5),
        ("drift_per_minute", -1.0),
    ],
)
def test_impossible_noise_is_one_line(field: str, value: object) -> None:
    with pytest.raises(HarliError):
        Noise(**{field: value})  # type: ignore[arg-type]


def test_with_lending_a_predicted_device_keeps_as_many_layers_as_its_profile_has_seen(tmp_path: Path) -> None:
    finetune = FINETUNE.model_copy(update={"microbatch_tokens": 256})
    recomputed = {"embed": 1.0, "forward": 10.0, "loss": 20.0, "backward": 30.0, "optimizer": 2.0}
    kept = recomputed | {"forward_kept": 11.0, "backward_kept": 20.0}
    times = [
        UnitTime(kind, units, 256, layers, 8.0, mean_ms)
        for units in (1, 2, 4)
        for layers, whole in ((0, recomputed), (6, kept))
        for kind, mean_ms in whole.items()
    ]
    artifact().model_copy(update={"unit_times": tuple(times)}).save(tmp_path)
    on = trained_device(tmp_path, "profiled", finetune, QUIET, 0)
    off = trained_device(tmp_path, "profiled", finetune.model_copy(update={"lending": False}), QUIET, 0)
    assert (on.kept_layers, off.kept_layers) == (6, 0)
    assert on.pass_tokens == off.pass_tokens
    assert off.pass_ms(4, 1) - on.pass_ms(4, 1) == pytest.approx(6 * (30.0 - 20.0 - 1.0))
    clocks = [UnitClock(played, finetune, np.random.default_rng(0)) for played in (on, off)]
    for clock in clocks:
        clock.run(0.0, 10.0, 4)
    assert clocks[0].state.kept_layers == 6
    gain = off.pass_ms(4, 1) / on.pass_ms(4, 1)
    assert clocks[0].tokens_done / clocks[1].tokens_done == pytest.approx(gain, rel=0.05)
