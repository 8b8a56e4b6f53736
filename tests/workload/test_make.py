"""The requests that a run's settings ask for."""

from __future__ import annotations

import pytest

from harli.config import WorkloadSettings
from harli.workload.make import make_workload


@pytest.mark.parametrize("rate_scale", [0.5, 1.0, 4.0])
def test_generated_requests_fill_the_run_at_any_rate(rate_scale: float) -> None:
    wanted = WorkloadSettings(requests_per_s=5.0, duration_s=200.0, rate_scale=rate_scale)
    requests = make_workload(wanted, max_model_len=512).requests
    assert len(requests) == pytest.approx(1000 * rate_scale, rel=0.5)
    assert 180.0 < requests[-1].arrival_s < 200.0
