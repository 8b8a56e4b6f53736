"""What a workload is, and how it is fitted to a model and a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from harli.rows import RequestRecord
from harli.types import HarliError


class Request(NamedTuple):
    """One request; lengths are in tokens."""

    arrival_s: float
    """When it is due, in seconds since the workload began."""
    prompt_tokens: int
    output_tokens: int
    clipped: bool = False
    """Its lengths were cut to the model's limit."""

    def record(
        self,
        request_id: str,
        *,
        ttft_ms: float,
        itl_ms: tuple[float, ...],
        queue_wait_ms: float,
        finished_s: float,
        error: str = "",
    ) -> RequestRecord:
        """What became of it, with the mean of its gaps."""
        return RequestRecord(
            request_id=request_id,
            arrival_s=self.arrival_s,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            clipped=self.clipped,
            ttft_ms=ttft_ms,
            tpot_ms=sum(itl_ms) / len(itl_ms) if itl_ms else math.nan,
            queue_wait_ms=queue_wait_ms,
            finished_s=finished_s,
            itl_ms=itl_ms,
            error=error,
        )


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order of their arrival."""

    name: str
    requests: tuple[Request, ...]

    def __post_init__(self) -> None:
        if any(later.arrival_s < earlier.arrival_s for earlier, later in pairwise(self.requests)):
            raise ValueError(f"the requests of {self.name} are not in the order of their arrival")


def fit(
    workload: Workload,
    max_model_len: int,
    *,
    rate_scale: float = 1.0,
    length_scale: float = 1.0,
    duration_s: float | None = None,
) -> Workload:
    """The part of a workload that a run of ``duration_s`` can serve, with lengths that the model takes.

    Arrivals are divided by ``rate_scale``, so 2.0 doubles the request rate; requests due at
    ``duration_s`` or later are left out. Lengths are multiplied by ``length_scale`` and rounded. Prompt and
    output are raised to 1 token where they are empty.
    Where they exceed ``max_model_len`` together, the prompt is cut first, down to 1 token, and only
    then the output, to ``max_model_len - 1``: outputs keep their lengths and so decode its load.

    Raises HarliError when an argument is out of range or no request is left.
    """
    if max_model_len < 2:
        raise HarliError(f"the model's maximum length must be 2 tokens or more, not {max_model_len}")
    for name, scale in (("rate", rate_scale), ("length", length_scale)):
        if not (math.isfinite(scale) and scale > 0):
            raise HarliError(f"the {name} scale must be a positive number, not {scale}")
    if duration_s is not None and not duration_s > 0:
        raise HarliError(f"the duration must be a positive number of seconds, not {duration_s}")

    end_s = math.inf if duration_s is None else duration_s
    scaled = (_scaled(request, rate_scale, length_scale) for request in workload.requests)
    requests = tuple(_clip(request, max_model_len) for request in scaled if request.arrival_s < end_s)
    if not requests:
        within = "" if duration_s is None else f" in its first {duration_s:g} s; choose a longer duration"
        raise HarliError(f"the workload {workload.name} has no request{within}")
    return replace(workload, requests=requests)


def _scaled(request: Request, rate_scale: float, length_scale: float) -> Request:
    prompt_tokens, output_tokens = request.prompt_tokens, request.output_tokens
    if length_scale != 1.0:
        prompt_tokens, output_tokens = round(prompt_tokens * length_scale), round(output_tokens * length_scale)
    return Request(request.arrival_s / rate_scale, prompt_tokens, output_tokens, request.clipped)


def _clip(request: Request, max_model_len: int) -> Request:
    output_tokens = min(max(request.output_tokens, 1), max_model_len - 1)
    prompt_tokens = min(max(request.prompt_tokens, 1), max_model_len - output_tokens)
    if (prompt_tokens, output_tokens) == (request.prompt_tokens, request.output_tokens):
        return request
    return request._replace(prompt_tokens=prompt_tokens, output_tokens=output_tokens, clipped=True)
