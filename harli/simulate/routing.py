"""Routers: which instance of a fleet gets which request, settled before any instance is simulated.

A router that looked at simulated instances would tie them together, step by step; this one sees what a router in
front of real instances could estimate, and the instances can be simulated side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Literal, get_args

import numpy as np

from harli.types import FinetuneState
from harli.workload.base import Request
from predictor.base import Floats, Predictor

Router = Literal["round-robin", "least-loaded"]
ROUTERS: tuple[Router, ...] = get_args(Router)


def route(router: Router, requests: Sequence[Request], instances: int, step_s: float) -> list[tuple[Request, ...]]:
    """The requests of every instance, in order of arrival.

    ``round-robin`` takes the instances in turn. ``least-loaded`` takes the one with the fewest output tokens
    outstanding, and of equals the one that has had the fewest requests. It reckons that a request makes a token every
    ``step_s`` seconds from its arrival on: queues, admission and what finetuning does to steps are left out. That takes
    time proportional to requests times instances.
    """
    if router == "round-robin":
        return [tuple(requests[place::instances]) for place in range(instances)]
    routed: list[list[Request]] = [[] for _ in range(instances)]
    for request, place in zip(requests, _least_loaded(requests, instances, step_s), strict=True):
        routed[place].append(request)
    return [tuple(part) for part in routed]


def _least_loaded(requests: Sequence[Request], instances: int, step_s: float) -> list[int]:
    """Of an instance, only the number and the summed ends of its running requests are kept: that gives its load."""
    running, ends_s, routed = np.zeros((3, instances))
    ending: list[tuple[float, int]] = []
    places = []
    for request in requests:
        now_s = request.arrival_s
        while ending and ending[0][0] <= now_s:
            end_s, place = heappop(ending)
            running[place] -= 1.0
            ends_s[place] = ends_s[place] - end_s if running[place] else 0.0  # without what rounding leaves
        load_s = ends_s - running * now_s
        least = np.flatnonzero(load_s == load_s.min())
        place = int(least[routed[least].argmin()])
        end_s = now_s + request.output_tokens * step_s
        heappush(ending, (end_s, place))
        running[place] += 1.0
        ends_s[place] += end_s
        routed[place] += 1.0
        places.append(place)
    return places


def planned_step_s(
    predictor: Predictor, finetune: FinetuneState, requests: Sequence[Request], per_s: float, max_num_seqs: int
) -> float:
    """Seconds of decode's steps, alone, at the smallest batch that keeps up with ``per_s`` such requests a second.

    With Little's law a batch of n keeps up when n tokens a step are as many as arrive during it. The largest batch's
    where none keeps up.
    """
    if not requests:
        return 1.0  # there is nothing to route
    prompt, output = np.array([request[1:3] for request in requests], dtype=np.float64).T
    context = float(output @ (prompt + output / 2.0) / output.sum())  # of a request in the batch, as it is met there
    batch: Floats = np.arange(1, max_num_seqs + 1, dtype=np.float64)
    step_s = predictor.outlook(batch, context * batch, finetune).gap_ms[:, 0] / 1e3
    keeps_up = batch / step_s >= per_s * output.mean()
    return float(step_s[keeps_up.argmax() if keeps_up.any() else -1])
