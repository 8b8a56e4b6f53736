from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harli.types import DecodeState, FinetuneState, HarliError, Menu, Share
from predictor import trees
from predictor.artifact import Artifact
from predictor.dataset import states
from predictor.linear import LinearPerShare
from predictor.one_stage import OneStage
from predictor.ranges import FAR, GROWTH
from predictor.table import TablePredictor
from tests.predictor.builders import synthetic
from tests.predictor.fitted import artifact

NINE = Menu(tuple(Share(16 - 2 * place, 2 * place) for place in range(9)))
ARTIFACTS = (artifact(), artifact(menu=NINE), artifact(LinearPerShare), artifact(OneStage))
TABLES = tuple(map(TablePredictor, ARTIFACTS))


def decode_state(batch: int, context: int, longest: int, prefill: int, admitted: int, step: int = 1) -> DecodeState:
    return DecodeState(
        time_s=float(step), step=step, batch=batch, context_sum=context, context_max=longest, prefill_tokens=prefill,
        admitted=admitted,
    )  # fmt: skip


def check_equal(saved: Artifact, table: TablePredictor, decode: DecodeState, tokens: int, kept: int) -> None:
    """``table``'s forecast is what the model itself says."""
    forecast = table.forecast(decode, FinetuneState(True, tokens, kept, 5.0))
    shares = np.arange(len(saved.menu.shares) - 1)
    rows = states(
        saved.menu, shares, decode.batch, decode.context_sum, context_max=decode.context_max,
        prefill_tokens=decode.prefill_tokens, admitted=decode.admitted, microbatch_tokens=tokens, kept_layers=kept,
    )  # fmt: skip
    gap_ms, solo_ms = saved.model.predict(rows), saved.model.predict_solo(rows)
    np.testing.assert_allclose(forecast.gap_ms, gap_ms, rtol=1e-9)
    np.testing.assert_allclose(forecast.bound_ms, saved.bound(rows, gap_ms, solo_ms), rtol=1e-9)
    rates = saved.rate.tokens_per_s(solo_ms[:1], tokens, kept)[0]
    np.testing.assert_allclose(forecast.finetune_tokens_per_s, rates, rtol=1e-9)
    state = (decode.batch, decode.context_sum, decode.context_max, decode.prefill_tokens, decode.admitted)
    assert forecast.known == (min(saved.ranges.distances(state)) <= FAR)


@settings(deadline=None, max_examples=150)
@given(
    state=st.tuples(*(st.integers(low, high) for low, high in ((1, 60), (0, 90_000), (0, 9_000), (0, 300), (0, 9)))),
    tokens=st.sampled_from([0, 256, 400, 512, 4096]),
    kept=st.integers(0, 4),
)
def test_the_table_is_the_model(state: tuple[int, int, int, int, int], tokens: int, kept: int) -> None:
    for saved, table in zip(ARTIFACTS, TABLES, strict=True):
        table.forecast(DecodeState(step=-2), FinetuneState())  # forget the last step
        check_equal(saved, table, decode_state(*state), tokens, kept)


def test_the_table_is_the_model_on_and_beside_every_threshold() -> None:
    compiled = ARTIFACTS[0].model.compiled()
    assert isinstance(compiled.corun_trees, trees.Cells)
    step = 1
    for cells in (compiled.solo_trees, compiled.corun_trees):
        assert isinstance(cells, trees.Cells)
        for name, thresholds in zip(cells.features, cells.thresholds, strict=True):
            for value in (int(threshold) + extra for threshold in thresholds for extra in (0, 1)):
                step += 1
                decode = decode_state(8, 6000, 900, 0, 0, step)
                if hasattr(decode, name):
                    setattr(decode, name, value)
                check_equal(ARTIFACTS[0], TABLES[0], decode, 256, 0)


def test_a_step_is_computed_once_and_the_object_is_the_same() -> None:
    table = TABLES[0]
    one = table.forecast(decode_state(4, 2000, 500, 0, 0, step=7), FinetuneState(True, 256))
    first = one.gap_ms[0]
    assert table.forecast(decode_state(9, 9000, 900, 0, 0, step=7), FinetuneState(True, 256)) is one
    assert one.gap_ms[0] == first
    assert table.forecast(decode_state(9, 9000, 900, 0, 0, step=8), FinetuneState(True, 256)) is one
    assert one.gap_ms[0] > first


def test_bounds_are_above_gaps_and_grow_outside_the_data() -> None:
    table = TABLES[0]
    near = table.forecast(decode_state(16, 16_000, 1000, 0, 0, step=20), FinetuneState(True, 256))
    assert near.known
    assert all(bound > gap for bound, gap in zip(near.bound_ms, near.gap_ms, strict=True))
    assert near.gap_ms == sorted(near.gap_ms)
    ratio = near.bound_ms[1] / near.gap_ms[1]
    far = table.forecast(decode_state(128, 16_000, 1000, 0, 0, step=21), FinetuneState(True, 256))
    assert not far.known
    assert far.bound_ms[1] / far.gap_ms[1] > ratio * (1.0 + GROWTH * FAR)


def test_an_outlook_is_a_forecast_of_many_states() -> None:
    saved, table = ARTIFACTS[0], TABLES[0]
    batch = np.arange(1, 65).astype(np.float64)
    finetune = FinetuneState(True, 256, 0)
    outlook = table.outlook(batch, batch * 700.0, finetune)
    assert outlook.gap_ms.shape == outlook.bound_ms.shape == outlook.finetune_tokens_per_s.shape == (64, 3)
    for place in (0, 17, 63):
        context = int(batch[place] * 700)
        longest = int(700 * saved.context_skew)
        decode = decode_state(int(batch[place]), context, longest, 0, 0, step=100 + place)
        forecast = table.forecast(decode, finetune)
        np.testing.assert_allclose(outlook.gap_ms[place], forecast.gap_ms, rtol=1e-9)
        np.testing.assert_allclose(outlook.bound_ms[place], forecast.bound_ms, rtol=1e-9)
        np.testing.assert_allclose(outlook.finetune_tokens_per_s[place], forecast.finetune_tokens_per_s, rtol=1e-9)


def test_a_share_without_data_is_bounded_widely() -> None:
    data = synthetic(120, 20, seed=1)
    known = data.take(data.share != 1)
    saved = ARTIFACTS[0]
    partial = Artifact.of(saved.model, saved.bounds, known, {})
    decode = decode_state(8, 6000, 800, 0, 0, step=200)
    wide = TablePredictor(partial).forecast(decode, FinetuneState(True, 256))
    assert wide.known
    usual = TablePredictor(saved).forecast(decode, FinetuneState(True, 256))
    assert wide.bound_ms[1] > 1.5 * usual.bound_ms[1]
    assert wide.bound_ms[2] == usual.bound_ms[2]


def test_a_model_too_large_for_a_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "CELL_LIMIT", 10)
    with pytest.raises(HarliError, match="cells, the limit is 10"):
        TablePredictor(ARTIFACTS[0])
