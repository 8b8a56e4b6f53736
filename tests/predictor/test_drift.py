from __future__ import annotations

import numpy as np
import pytest

from predictor.drift import LEAST_VISITS, VISIT_S, Visit, at_usual_speed, reference_course
from tests.profiling.builders import make_plan, tables


def test_the_reference_says_how_slow_the_machine_was() -> None:
    plan = make_plan()
    speed = [1.0] * 2 + [0.8] * 2  # a group and the reference after it
    steps, segments = tables(plan, noise=0.0, speed=speed)
    course = reference_course(steps, segments)
    assert {round(visit.slowness / course[0].slowness, 6) for visit in course} == {1.0, 1.25}
    steady = reference_course(*tables(plan, noise=0.0))
    assert {visit.slowness for visit in steady} == {1.0}


def test_between_visits_the_slowness_is_interpolated_and_windows_are_left_alone() -> None:
    apart = 10.0 * VISIT_S
    course = [Visit(apart * number, 1.0 + 0.1 * number, 0) for number in range(LEAST_VISITS)]
    time_s = np.array([-apart, 0.0, apart / 2, 2 * apart, 100 * apart])
    columns = {"gap_ms": np.full(5, 30.0), "window_ms": np.full(5, 10.0), "decode_cpu_ms": np.full(5, 40.0)}
    at_usual_speed(columns, time_s, course)
    slowness = np.array([1.0, 1.0, 1.05, 1.2, 1.4])
    assert columns["gap_ms"] == pytest.approx(20.0 / slowness + 10.0)
    assert columns["decode_cpu_ms"] == pytest.approx(40.0 / slowness)


def test_a_few_visits_say_nothing() -> None:
    course = [Visit(100.0 * number, 1.0 + number, 0) for number in range(LEAST_VISITS - 1)]
    columns = {"gap_ms": np.full(3, 30.0), "window_ms": np.zeros(3), "decode_cpu_ms": np.full(3, 40.0)}
    at_usual_speed(columns, np.array([0.0, 100.0, 200.0]), course)
    assert (columns["gap_ms"] == 30.0).all()
