"""A decode instance small enough for a test: a queue, a batch, and steps that take what the predictor says."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from harli.rows import StepRecord
from harli.types import DecodeState, FinetuneState, Slo
from policies.base import Policy
from predictor.base import Predictor


@dataclass
class Outcome:
    """What a run came to."""

    finetune_tokens_per_s: float
    within_slo: float
    """Fraction of output tokens whose gap was within the ITL SLO."""
    requests_within_slo: float
    """Fraction of requests whose mean gap was within the TPOT SLO."""
    wait_p99_s: float
    mean_batch: float
    decisions: list[tuple[int, float]]
    """Finetune units and window of every step."""


def serve(
    policy: Policy,
    predictor: Predictor,
    slo: Slo,
    *,
    arrivals_per_s: float,
    output_tokens: int,
    duration_s: float,
    max_batch: int,
    noise: float = 0.0,
    seed: int = 0,
) -> Outcome:
    """Poisson arrivals of requests with a context of 500 tokens, output lengths geometric."""
    random, noises = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    count = int(2 * arrivals_per_s * duration_s) + 10
    arrivals = np.cumsum(random.exponential(1 / arrivals_per_s, count)).tolist()
    due = deque(zip(arrivals, random.geometric(1.0 / output_tokens, count).tolist(), strict=True))
    waiting: deque[tuple[float, int]] = deque()
    running: list[list[float]] = []  # tokens left, context, time of the first token, tokens done
    menu, costs = predictor.menu, predictor.costs
    finetune = FinetuneState(ready=True, microbatch_tokens=256)
    alone_per_s = predictor.finetune_alone_tokens_per_s
    now_s = tokens = late = made = batches = 0.0
    waits: list[float] = []
    means_ms: list[float] = []
    decisions: list[tuple[int, float]] = []
    last_units = menu.decode_alone.decode
    while now_s < duration_s:
        while due and due[0][0] <= now_s:
            waiting.append(due.popleft())
        if not running and not waiting:
            tokens += alone_per_s * (due[0][0] - now_s)
            now_s = due[0][0]
            continue
        admitted = 0
        while waiting and len(running) < max_batch:
            arrived, length = waiting.popleft()
            waits.append(now_s - arrived)
            running.append([float(length), 500.0, now_s, 0.0])
            admitted += 1
        slack_ms = min(
            ((start + (done + 1) * slo.tpot_ms / 1e3 - now_s) * 1e3 for _, _, start, done in running if slo.tpot_ms),
            default=float("inf"),
        )
        decode = DecodeState(
            time_s=now_s,
            step=len(decisions) + 1,
            batch=len(running),
            context_sum=int(sum(request[1] for request in running)),
            admitted=admitted,
            waiting=len(waiting),
            slack_ms=slack_ms,
        )
        decision = policy.decide(decode, finetune)
        index = menu.shares.index(decision.share)
        forecast = predictor.forecast(decode, finetune)
        gap_ms = forecast.gap_ms[index] * float(np.exp(noise * noises.standard_normal()))
        tokens += forecast.finetune_tokens_per_s[index] * gap_ms / 1e3
        window_ms = decision.exclusive_ms
        if window_ms:
            window_ms = predictor.units(finetune).in_window_ms(window_ms, split=index > 0)
            tokens += alone_per_s * window_ms / 1e3
            window_ms += costs.window_overhead_ms
        elif decision.share.decode > last_units:
            gap_ms += costs.switch_ms
        last_units = decision.share.decode
        gap_ms += window_ms
        now_s += gap_ms / 1e3
        late += len(running) * (gap_ms > (slo.itl_ms or float("inf")) + 1e-6)
        made += len(running)
        batches += len(running) * gap_ms / 1e3
        decisions.append((decision.share.finetune, decision.exclusive_ms))
        values: dict[str, float] = dict.fromkeys(StepRecord._fields, 0.0)
        values |= {"batch": len(running), "wanted_finetune": decision.share.finetune, "gap_ms": gap_ms}
        policy.observe(StepRecord(**values | {"window_ms": window_ms}))  # type: ignore[arg-type]
        for request in running:
            request[0] -= 1.0
            request[1] += 1.0
            request[3] += 1.0
            if request[0] == 0.0:
                means_ms.append((now_s - request[2]) * 1e3 / request[3])
        running = [request for request in running if request[0] > 0.0]
    waits.extend(now_s - arrived for arrived, _ in waiting)
    return Outcome(
        finetune_tokens_per_s=tokens / now_s,
        within_slo=1.0 - late / made,
        requests_within_slo=float(np.mean(np.array(means_ms) <= (slo.tpot_ms or float("inf")))),
        wait_p99_s=float(np.percentile(waits, 99.0)),
        mean_batch=batches / now_s,
        decisions=decisions,
    )
