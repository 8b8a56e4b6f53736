"""The quality report finds what was put into synthetic profiles."""

from __future__ import annotations

import numpy as np
import pytest

from profiling.report import Report, assess
from tests.profiling.builders import LIMITS, MENU, make_plan, tables


def report(**changes: object) -> Report:
    plan = make_plan(budget_s=400.0)
    steps, segments = tables(plan, **changes)  # type: ignore[arg-type]
    return assess(steps, segments, MENU, len(plan.groups), (LIMITS.max_batch, LIMITS.max_context))


def test_a_good_profile_has_nothing_against_it() -> None:
    found = report()
    assert found.verdict == []
    assert found.points == 2 * (len(make_plan(budget_s=400.0).groups) + 1)
    assert found.coverage > 0.6


def test_noise_floor_and_slowdown_are_found() -> None:
    found = report(noise=0.05, slowdown=1.5)
    expected = 0.05 * np.sqrt(2.0 / np.pi)  # mean absolute deviation of a normal variable
    assert found.noise_floor_solo == pytest.approx(expected, rel=0.15)
    assert found.noise_floor_corun == pytest.approx(expected, rel=0.15)
    for ratio, spread in found.slowdowns.values():
        assert ratio == pytest.approx(1.5, rel=0.03)
        assert spread < 0.05
    assert found.finetune_tokens_per_s["1/1"] == pytest.approx(100.0)


def test_drift_is_found_and_said() -> None:
    assert report().drift == pytest.approx(0.0, abs=0.04)
    drifting = report(speed=(1.0, 1.0, 1.5, 1.5))
    assert drifting.drift is not None
    assert drifting.drift > 0.15
    assert any("drifted" in line for line in drifting.verdict)


def test_noise_is_said() -> None:
    assert any("noisy" in line for line in report(noise=0.3).verdict)


def test_an_unfinished_profile_says_so() -> None:
    plan = make_plan(budget_s=400.0)
    steps, segments = tables(make_plan(budget_s=20.0))
    found = assess(steps, segments, MENU, len(plan.groups), (LIMITS.max_batch, LIMITS.max_context))
    assert any("planned groups" in line for line in found.verdict)
    assert any("only a sketch" in line for line in found.verdict)


def test_an_empty_profile_has_a_report() -> None:
    steps, segments = tables(make_plan(budget_s=20.0))
    found = assess(steps.slice(0, 0), segments.slice(0, 0), MENU, 9, (LIMITS.max_batch, LIMITS.max_context))
    assert found.points == found.steps == 0
    assert found.summary()["profile/noise_floor_solo"] is None
    assert found.verdict
