"""Fitting a workload to a model's limit, a rate and a duration."""

from __future__ import annotations

import math

import pytest

from harli.types import HarliError
from harli.workload.base import Request, Workload, fit


def workload(*requests: Request) -> Workload:
    return Workload("test", requests)


@pytest.mark.parametrize(
    ("lengths", "fitted"),
    [
        pytest.param((60, 40), (60, 40), id="fits exactly"),
        pytest.param((90, 40), (60, 40), id="prompt cut first"),
        pytest.param((500, 98), (2, 98), id="prompt cut almost away"),
        pytest.param((500, 300), (1, 99), id="output cut when the prompt is at 1"),
        pytest.param((1, 100), (1, 99), id="output alone too long"),
        pytest.param((0, 0), (1, 1), id="empty lengths raised"),
    ],
)
def test_lengths_are_clipped_to_the_models_limit(lengths: tuple[int, int], fitted: tuple[int, int]) -> None:
    (request,) = fit(workload(Request(0.0, *lengths)), 100).requests
    assert (request.prompt_tokens, request.output_tokens) == fitted
    assert request.clipped == (lengths != fitted)


def test_a_clipped_request_stays_marked() -> None:
    once = fit(workload(Request(0.0, 90, 40)), 100)
    assert fit(once, 1000).requests[0].clipped


def test_rate_scale_moves_arrivals_and_duration_counts_after_it() -> None:
    arrivals = workload(*(Request(t, 8, 8) for t in (0.0, 10.0, 19.0, 20.0, 30.0)))
    fitted = fit(arrivals, 100, rate_scale=2.0, duration_s=10.0)
    assert [request.arrival_s for request in fitted.requests] == [0.0, 5.0, 9.5]
    assert fitted.name == arrivals.name


def test_without_arguments_every_request_stays() -> None:
    arrivals = workload(*(Request(float(t), 8, 8) for t in range(5)))
    assert fit(arrivals, 16) == arrivals


def test_length_scale_moves_both_lengths_and_leaves_a_token() -> None:
    fitted = fit(workload(Request(0.0, 400, 200), Request(1.0, 3, 1)), 1000, length_scale=0.25)
    assert [request[1:3] for request in fitted.requests] == [(100, 50), (1, 1)]
    assert not any(request.clipped for request in fitted.requests[:1])


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["rate", "length"])
def test_an_impossible_scale_is_refused(name: str, scale: float) -> None:
    with pytest.raises(HarliError, match=f"{name} scale"):
        fit(workload(Request(0.0, 8, 8)), 100, **{f"{name}_scale": scale})


@pytest.mark.parametrize("duration_s", [0.0, -1.0, math.nan])
def test_an_impossible_duration_is_refused(duration_s: float) -> None:
    with pytest.raises(HarliError, match="duration"):
        fit(workload(Request(0.0, 8, 8)), 100, duration_s=duration_s)


def test_a_model_without_room_for_an_answer_is_refused() -> None:
    with pytest.raises(HarliError, match="maximum length"):
        fit(workload(Request(0.0, 8, 8)), 1)


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(HarliError, match="no request in its first 2 s"):
        fit(workload(Request(3.0, 8, 8)), 100, duration_s=2.0)
    with pytest.raises(HarliError, match=r"no request$"):
        fit(workload(), 100)


def test_requests_must_be_in_order() -> None:
    with pytest.raises(ValueError, match="order"):
        workload(Request(1.0, 8, 8), Request(0.5, 8, 8))
