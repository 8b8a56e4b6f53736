"""A workload of our own with the statistics of a production trace, so that no trace need be shipped.

All constants below were measured on, or fitted to, the conversation trace of 2023 in the Azure Public Dataset
(19,366 requests in 58 minutes; Patel et al., "Splitwise", ISCA 2024).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from harli.types import HarliError
from harli.workload.base import Request, Workload

_QUANTILES = (0, 0.01, 0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 0.99, 0.999, 1)
_PROMPT_TOKENS = (2, 29, 181, 207, 387, 396, 403, 703, 1020, 1071, 1130, 1189, 1315, 2734, 4083, 4142, 6179, 14050)
_OUTPUT_TOKENS = (7, 16, 41, 54, 77, 85, 91, 103, 129, 177, 384, 395, 400, 424, 451, 601, 954, 1000)
# Neither a lognormal nor a mixture of two fits: both lengths have several modes. So the quantiles
# themselves are the model. Prompt and output are independent: in the trace their correlation is -0.1.

# The trace shows 0.21 and 0.82, but an hour of such a process shows less than the process has.
_RATE_CV = 0.25
"""Coefficient of variation of the request rate from minute to minute."""
_RATE_MEMORY = 0.9
"""Correlation of that rate between neighbouring minutes."""
_GAP_CV = 1.05
"""Coefficient of variation of the gaps between arrivals, the rate's variation apart; Poisson has 1."""
_MINUTE_S = 60.0

_Floats = npt.NDArray[np.float64]


def generate(*, seed: int, duration_s: float, requests_per_s: float = 5.5) -> Workload:
    """Requests for ``duration_s`` seconds at a mean rate of ``requests_per_s``, the same for the same seed.

    Arrivals are a Gamma renewal process whose rate changes every minute: a lognormal first-order
    autoregressive process, scaled so that its mean over the duration is ``requests_per_s``. Lengths
    are drawn by inverse transform from the trace's quantiles, log-linear between them.

    Raises HarliError when an argument is out of range, or when the duration is too short for a request.
    """
    for name, value in (("duration", duration_s), ("request rate", requests_per_s)):
        if not (math.isfinite(value) and value > 0):
            raise HarliError(f"the {name} of a generated workload must be a positive number, not {value}")
    if seed < 0:
        raise HarliError(f"the seed must not be negative, but is {seed}")

    # Streams of their own: another rate or duration keeps the sequence of lengths.
    arrival_rng, length_rng = np.random.default_rng(seed).spawn(2)
    arrivals_s = _arrivals(arrival_rng, duration_s, requests_per_s)
    if not arrivals_s.size:
        raise HarliError(
            f"no request arrives in {duration_s:g} s at {requests_per_s:g} requests/s; choose a longer duration"
        )
    uniform = length_rng.random((arrivals_s.size, 2))
    prompts = _lengths(uniform[:, 0], _PROMPT_TOKENS)
    outputs = _lengths(uniform[:, 1], _OUTPUT_TOKENS)
    requests = map(Request, arrivals_s.tolist(), prompts, outputs)
    return Workload("generated", tuple(requests))


def _arrivals(rng: np.random.Generator, duration_s: float, requests_per_s: float) -> _Floats:
    """Arrival times in seconds, ascending: unit-rate arrivals seen through the integral of the rate."""
    edges_s = np.append(np.arange(0.0, duration_s, _MINUTE_S), duration_s)
    expected = _rate_path(rng, edges_s.size - 1) * np.diff(edges_s)
    expected *= requests_per_s * duration_s / expected.sum()
    integral = np.concatenate(([0.0], np.cumsum(expected)))

    total = integral[-1]
    enough = int(total + 12.0 * math.sqrt(total) + 100.0)
    shape = _GAP_CV**-2
    unit_arrivals = np.cumsum(rng.gamma(shape, 1.0 / shape, enough))
    arrivals_s: _Floats = np.interp(unit_arrivals[unit_arrivals < total], integral, edges_s)
    return arrivals_s


def _rate_path(rng: np.random.Generator, minutes: int) -> _Floats:
    """Relative request rate of each minute."""
    level = rng.standard_normal(minutes)
    for minute in range(1, minutes):
        level[minute] = _RATE_MEMORY * level[minute - 1] + math.sqrt(1.0 - _RATE_MEMORY**2) * level[minute]
    rate: _Floats = np.exp(math.sqrt(math.log1p(_RATE_CV**2)) * level)
    return rate


def _lengths(uniform: _Floats, quantiles: tuple[int, ...]) -> list[int]:
    lengths: list[int] = np.rint(np.exp(np.interp(uniform, _QUANTILES, np.log(quantiles)))).astype(int).tolist()
    return lengths
