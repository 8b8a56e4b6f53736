"""The requests of a run, from its settings."""

from __future__ import annotations

from harli.config import WorkloadSettings
from harli.workload.base import Workload, fit
from harli.workload.generate import generate
from harli.workload.trace import read_trace


def make_workload(wanted: WorkloadSettings, max_model_len: int) -> Workload:
    """A trace's requests or generated ones, cut to ``max_model_len`` tokens. Raises HarliError when there are none."""
    if wanted.trace is not None:
        requests = read_trace(wanted.trace)
    else:
        unscaled_s = wanted.duration_s * wanted.rate_scale  # fit divides arrivals by the scale
        requests = generate(seed=wanted.seed, duration_s=unscaled_s, requests_per_s=wanted.requests_per_s)
    return fit(
        requests,
        max_model_len,
        rate_scale=wanted.rate_scale,
        length_scale=wanted.length_scale,
        duration_s=wanted.duration_s,
    )
