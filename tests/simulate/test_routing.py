"""Routers: every request goes to one instance, and the least loaded one gets the next."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harli.simulate.routing import ROUTERS, Router, planned_step_s, route
from harli.types import FinetuneState
from harli.workload.base import Request
from tests.simulate.builders import device

streams = st.lists(
    st.builds(Request, st.floats(0.0, 50.0), st.just(8), st.integers(1, 200)), min_size=1, max_size=60
).map(sorted)


@settings(max_examples=60, deadline=None)
@given(requests=streams, instances=st.integers(1, 9), router=st.sampled_from(ROUTERS))
def test_every_request_goes_to_one_instance_in_order(requests: list[Request], instances: int, router: Router) -> None:
    routed = route(router, requests, instances, 0.05)
    assert len(routed) == instances
    assert sorted(request for part in routed for request in part) == requests
    assert all(list(part) == sorted(part, key=lambda request: request.arrival_s) for part in routed)


@settings(max_examples=60, deadline=None)
@given(requests=streams, instances=st.integers(1, 6))
def test_the_least_loaded_is_the_one_with_the_fewest_tokens_outstanding(
    requests: list[Request], instances: int
) -> None:
    step_s = 0.05
    routed = route("least-loaded", requests, instances, step_s)
    places = {id(request): place for place, part in enumerate(routed) for request in part}

    def outstanding_s(place: int, number: int) -> float:
        now_s = requests[number].arrival_s
        before = [one for one in requests[:number] if places[id(one)] == place]
        return sum(max(0.0, one.arrival_s + one.output_tokens * step_s - now_s) for one in before)

    for number, request in enumerate(requests):
        loads = [outstanding_s(place, number) for place in range(instances)]
        assert loads[places[id(request)]] == pytest.approx(min(loads), abs=1e-9)


def test_idle_instances_take_turns() -> None:
    sparse = [Request(float(number), 8, 2) for number in range(12)]
    assert [len(part) for part in route("least-loaded", sparse, 4, 0.01)] == [3, 3, 3, 3]


def test_a_long_answer_keeps_others_away() -> None:
    requests = [Request(0.0, 8, 1000), *(Request(0.1 * number, 8, 10) for number in range(1, 9))]
    long, short = route("least-loaded", requests, 2, 0.02)
    assert (len(long), len(short)) == (1, 8)
    assert [len(part) for part in route("round-robin", requests, 2, 0.02)] == [5, 4]


def test_the_planned_step_is_that_of_the_smallest_batch_that_keeps_up() -> None:
    predictor, state = device().predictor, FinetuneState(ready=True, microbatch_tokens=64)
    requests = [Request(0.0, 100, 50)] * 4

    def step_s(batch: int) -> float:
        return float(predictor.outlook(np.array([batch * 1.0]), np.array([batch * 125.0]), state).gap_ms[0, 0]) / 1e3

    planned = [planned_step_s(predictor, state, requests, per_s, 8) for per_s in (0.01, 4.0, 6.0, 1e6)]
    assert planned == sorted(planned)
    assert planned[0] == pytest.approx(step_s(1))
    assert planned[-1] == pytest.approx(step_s(8))
    batch = next(batch for batch in range(1, 9) if batch / step_s(batch) >= 4.0 * 50)
    assert batch > 1
    assert planned[1] == pytest.approx(step_s(batch))
