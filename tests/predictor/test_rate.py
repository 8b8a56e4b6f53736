from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from predictor.rate import Rate
from tests.predictor.builders import synthetic, truth_ms

DATA = synthetic(200, 60, seed=5)


def test_rates_are_recovered_from_sparse_credits() -> None:
    rate = Rate.fit(DATA, truth_ms(DATA))
    found = rate.tokens_per_s(np.array([20.0, 60.0]), 256, 0)
    assert found.shape == (2, 3)
    assert not found[:, 0].any()
    np.testing.assert_allclose(found[:, 1:], [[200.0, 400.0]] * 2, rtol=0.1)


def test_a_rate_that_falls_with_the_load_is_followed_and_never_negative() -> None:
    solo_ms = 12.0 + 1.5 * DATA.batch + 1e-3 * DATA.context_sum
    exact = DATA.gap_ms / 1e3 * 200.0 * DATA.finetune_units * (1.0 - solo_ms / 200.0)
    rate = Rate.fit(replace(DATA, finetune_tokens=np.where(DATA.solo, 0.0, exact)), solo_ms)
    np.testing.assert_allclose(rate.tokens_per_s(np.array([20.0, 60.0]), 256, 0)[:, 2], [360.0, 280.0], rtol=0.02)
    assert rate.tokens_per_s(np.array([1e9]), 256, 0).min() >= 0.0


def test_shapes_have_their_own_factor_and_an_unknown_one_is_like_its_neighbour() -> None:
    exact = DATA.gap_ms / 1e3 * 200.0 * DATA.finetune_units * np.where(DATA.microbatch_tokens > 256, 1.5, 1.0)
    rate = Rate.fit(replace(DATA, finetune_tokens=np.where(DATA.solo, 0.0, exact)), truth_ms(DATA))
    small, large = (rate.tokens_per_s(np.array([30.0]), tokens, 2)[0, 1] for tokens in (256, 512))
    assert large / small == pytest.approx(1.5, rel=0.01)
    assert rate.shape_factor(1024, 0) == rate.shape_factor(512, 2)


def test_nothing_known_means_no_rate() -> None:
    rate = Rate.fit(replace(DATA, finetune_tokens=DATA.finetune_tokens * np.nan), truth_ms(DATA))
    assert not rate.tokens_per_s(np.array([30.0]), 256, 0).any()


def test_a_split_that_was_not_seen_has_the_rate_per_unit_of_the_others() -> None:
    known = DATA.take(DATA.share != 2)
    rate = Rate.fit(known, truth_ms(known))
    assert rate.level[1] == pytest.approx(2.0 * np.mean(rate.tokens_per_s(np.array([30.0]), 0, 0)[0, 1]), rel=0.2)
