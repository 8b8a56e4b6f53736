"""The generated workload has the statistics of the Azure conversation trace."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harli.types import HarliError
from harli.workload.base import Workload
from harli.workload.generate import generate

HOURS_S = 8 * 3600.0


@pytest.fixture(scope="module")
def workload() -> Workload:
    return generate(seed=1, duration_s=HOURS_S)


@pytest.mark.parametrize(
    ("field", "mean", "p50", "p90"), [("prompt_tokens", 1155, 1020, 2734), ("output_tokens", 211, 129, 424)]
)
def test_lengths_are_those_of_the_trace(workload: Workload, field: str, mean: float, p50: float, p90: float) -> None:
    lengths = np.array([getattr(request, field) for request in workload.requests])
    assert lengths.mean() == pytest.approx(mean, rel=0.03)
    assert np.percentile(lengths, [50, 90]) == pytest.approx([p50, p90], rel=0.05)
    assert lengths.min() >= 1


def test_arrivals_are_as_bursty_as_the_traces(workload: Workload) -> None:
    arrivals_s = np.array([request.arrival_s for request in workload.requests])
    gaps_s = np.diff(arrivals_s)
    assert (gaps_s >= 0).all()
    assert 0 <= arrivals_s[0] <= arrivals_s[-1] < HOURS_S
    assert 1.05 < gaps_s.std() / gaps_s.mean() < 1.2, "1.09 in the trace, 1 in a Poisson process"

    per_minute = np.histogram(arrivals_s, np.arange(0.0, HOURS_S + 1, 60.0))[0] / 60.0
    assert 0.17 < per_minute.std() / per_minute.mean() < 0.33, "0.21 in an hour of the trace, 0.05 in a Poisson process"
    assert np.corrcoef(per_minute[1:], per_minute[:-1])[0, 1] > 0.7


@pytest.mark.parametrize(("duration_s", "rate"), [(30.0, 20.0), (600.0, 2.0), (1000.0, 5.5)])
def test_the_mean_rate_is_the_one_asked_for(duration_s: float, rate: float) -> None:
    counts = [
        len(generate(seed=seed, duration_s=duration_s, requests_per_s=rate).requests) / (duration_s * rate)
        for seed in range(20)
    ]
    assert np.mean(counts) == pytest.approx(1.0, rel=0.03)


def test_the_seed_decides() -> None:
    assert generate(seed=3, duration_s=60.0) == generate(seed=3, duration_s=60.0)
    assert generate(seed=3, duration_s=60.0) != generate(seed=4, duration_s=60.0)


def test_the_rate_leaves_the_sequence_of_lengths_alone() -> None:
    slow, fast = (generate(seed=3, duration_s=60.0, requests_per_s=rate).requests for rate in (2.0, 8.0))
    assert len(slow) < len(fast)
    assert all(one[1:] == other[1:] for one, other in zip(slow, fast, strict=False))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_impossible_arguments_are_refused(value: float) -> None:
    with pytest.raises(HarliError, match="duration"):
        generate(seed=0, duration_s=value)
    with pytest.raises(HarliError, match="request rate"):
        generate(seed=0, duration_s=10.0, requests_per_s=value)


def test_a_negative_seed_and_an_empty_workload_are_refused() -> None:
    with pytest.raises(HarliError, match="seed"):
        generate(seed=-1, duration_s=10.0)
    with pytest.raises(HarliError, match="longer duration"):
        generate(seed=0, duration_s=1e-6)
