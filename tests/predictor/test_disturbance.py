from __future__ import annotations

import numpy as np

from predictor.disturbance import disturbed


def test_a_time_without_cores_is_found_and_single_late_steps_are_not() -> None:
    cpu_ms, step_ms, units = (np.full(100, value) for value in (57.0, 30.0, 2.0))
    step_ms[20] = 90.0  # late by itself
    step_ms[50:70] = 60.0
    found = disturbed(cpu_ms, step_ms, units)
    assert found[50:70].all()
    assert not found[:46].any()
    assert not found[74:].any()


def test_without_cpu_times_nothing_is_known_to_be_disturbed() -> None:
    step_ms = np.array([30.0, 300.0, np.nan])
    assert not disturbed(np.full(3, np.nan), step_ms, np.ones(3)).any()
    assert not len(disturbed(np.empty(0), np.empty(0), np.empty(0)))
