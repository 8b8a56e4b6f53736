"""Figures and card of a trained predictor."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from harli.tracking.predictor_card import HEADINGS, card, rows
from harli.tracking.predictor_figures import figures, importance
from predictor.contest import contest
from predictor.training import Trained, train
from predictor.tuning import Budget
from tests.predictor.builders import synthetic


@pytest.fixture(scope="module")
def trained() -> Trained:
    return train(synthetic(120, 10), Budget(1), coverage=0.95, seed=0)


@pytest.fixture(scope="module")
def drawn(trained):
    return figures(trained)


def test_every_figure_is_labelled_and_can_be_saved(drawn, tmp_path):
    assert set(drawn) == {"parity.png", "error.png", "coverage.png", "shares.png", "importance.png"}
    for name, figure in drawn.items():
        assert all(axes.get_xlabel() for axes in figure.axes)
        figure.savefig(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_parity_shows_every_judged_step_once(drawn, trained):
    points = [axes.lines[0].get_xydata() for axes in drawn["parity.png"].axes]
    judged = trained.winner.judged
    assert sum(map(len, points)) == len(judged.data)
    np.testing.assert_array_equal(points[0][:, 0], judged.data.gap_ms[judged.data.solo])


def test_coverage_is_drawn_against_what_was_promised(drawn):
    (axes,) = drawn["coverage.png"].axes
    assert axes.lines[-1].get_label() == "promised, 95%"
    assert all(max(line.get_ydata()) <= 100.0 for line in axes.lines)


def test_gaps_grow_with_the_finetune_share(drawn):
    (axes,) = drawn["shares.png"].axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["4/0", "3/1", "2/2"]
    assert len(axes.lines) == 3
    assert all((np.diff(line.get_ydata()) > 0.0).all() for line in axes.lines)


def test_a_model_without_trees_has_no_importance(trained):
    model = replace(trained.artifact.model, solo_trees=None, corun_trees=None)
    bare = trained.artifact.model_copy(update={"model": model})
    titles = [axes.get_title() for axes in importance(bare).axes]
    assert titles == ["decode alone: no trees, linear only", "beside finetuning: no trees, linear only"]


def test_pyplot_stays_out_of_it(drawn):
    if "matplotlib.pyplot" in sys.modules:
        pytest.skip("something else has imported pyplot")
    assert drawn


def test_the_card_says_what_it_was_trained_on_and_how_good_it_is(trained):
    verdict = contest(trained, None)
    text = card(trained, verdict, ["profile-1", "run-2"], seed=7)
    assert "# Decode latency of some/model-24M" in text
    assert "profile-1, run-2 (SHA-256 synthetic-120-10" in text
    assert "seed 7" in text
    assert "kind cpu, cores 4" in text
    assert f"| {' | '.join(HEADINGS)} |" in text
    for rival in trained.rivals:
        assert f"| {rival.name} | {100 * rival.scores.solo.mape:.1f}% |" in text
    assert f"{trained.verdict}. Champion: the first champion." in text
    assert "## Limits" in text


def test_a_side_without_repeats_has_no_noise_floor(trained):
    unknown = replace(trained, noise=tuple(replace(noise, mape=np.nan) for noise in trained.noise))
    assert rows(unknown)[-1][:3] == ("noise floor", "-", "-")
    assert all(len(row) == len(HEADINGS) for row in rows(unknown))
