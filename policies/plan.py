"""From a load and a predictor to a table: what to do at every batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from harli.types import FinetuneState, Slo
from policies.budget import NO_SLO_MS
from policies.load import Load
from policies.lookahead import Process, Solution
from predictor.base import Floats, Predictor

LATE = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""A late token costs what the whole device finetunes in this many SLO periods; the first that is enough is taken."""
LATE_AIM = 0.005
"""Fraction of late tokens to plan for: half of what 99% attainment leaves."""
LATE_ALONE = 1.25
"""Where decode alone has more late tokens, the aim is this multiple of them: finetuning cannot mend that."""
COVERAGE_DEVIATIONS = 2.33
"""A bound with 99% coverage lies this many standard deviations above the middle."""
WAITING = 10.0
"""A waiting request costs what this many whole devices finetune while it waits."""
ROOM_USED = (0.0, 0.3, 0.6, 0.95)
"""Windows to choose from, as fractions of what a share's bound leaves of the budget."""


class Entry(NamedTuple):
    """One way to run a step: the best window with one share."""

    share: int
    """Index in ``menu.shares``."""
    window_ms: float
    shortfall: float
    """Finetune tokens per second lost against the best entry, while this one is kept."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Tables over the batch size, from 0 to the capacity."""

    gain: float
    """Finetune tokens per second in the long run, less the costs of late tokens and waiting requests."""
    entries: list[tuple[Entry, ...]]
    """Best first, "decode alone" always among them."""
    patience: list[float]
    """The shortfall at which giving decode a larger part is worth what the switch costs."""
    gap_ms: list[list[float]]
    """Planned gap of every share, without a window."""
    shortest_window_ms: float
    """Below it no unit fits."""

    @property
    def capacity(self) -> int:
        return len(self.entries) - 1


def make_plan(predictor: Predictor, slo: Slo, load: Load, finetune: FinetuneState, slowdown: float) -> Plan:
    """The long-run best for a load that stays as it is.

    An ITL SLO limits the upper bound of a gap, a TPOT SLO its mean, since a request's TPOT averages over
    many steps, ``slowdown`` the mean as a multiple of decode alone's. Once requests wait, decode is alone.
    """
    costs, alone_per_ms = predictor.costs, predictor.finetune_alone_tokens_per_s / 1e3
    queue = max(8, load.capacity // 4)
    states = np.arange(load.capacity + queue + 1)
    batch = np.minimum(states, load.capacity)
    full = states > load.capacity

    size = np.maximum(np.arange(load.capacity + 1, dtype=float), 1.0)
    outlook = predictor.outlook(size, size * load.context, finetune)
    gap = (outlook.gap_ms * load.stretch)[batch]
    bound = outlook.bound_ms[batch]

    room = NO_SLO_MS - gap
    if slo.itl_ms is not None:
        room = np.minimum(room, slo.itl_ms - bound)
    if slo.tpot_ms is not None:
        room = np.minimum(room, slo.tpot_ms - gap)
    room = np.minimum(room, slowdown * gap[:, :1] - gap)
    fits = (room >= 0.0) & ~full[:, None]
    fits[:, 0] = True

    shortest = costs.window_dead_ms + finetune.unit_ms
    window = (room - costs.window_overhead_ms)[:, :, None] * np.array(ROOM_USED)
    allowed = fits[:, :, None] & (window > shortest) & ~full[:, None, None]
    window = np.where(allowed, window, 0.0)
    allowed[:, :, 0] = fits

    tau_ms = gap[:, :, None] + np.where(window > 0.0, window + costs.window_overhead_ms, 0.0)
    earned = outlook.finetune_tokens_per_s[batch] * gap / 1e3
    reward = earned[:, :, None] + alone_per_ms * np.maximum(0.0, window - costs.window_dead_ms)
    reward -= WAITING * alone_per_ms * (states - batch)[:, None, None] * tau_ms
    tau_ms[0] = 1e3 / load.arrivals_per_s
    reward[0] = alone_per_ms * tau_ms[0]
    reward[~allowed] = -np.inf

    made = np.broadcast_to(batch[:, None, None].astype(float), tau_ms.shape)
    late = made * _late(slo, tau_ms, tau_ms - gap[:, :, None], outlook.gap_ms[batch], bound)
    late_costs = alone_per_ms * min(slo.itl_ms or NO_SLO_MS, slo.tpot_ms or NO_SLO_MS) * late

    shape = (len(states), -1)
    process = Process(tau_ms.reshape(shape) / 1e3, batch, load.arrivals_per_s, load.leaving)
    solution = _within_aim(process, *(array.reshape(shape) for array in (reward, late_costs, late, made)))
    value = solution.value

    # A second of delay at n loses the gain, and what an arrival brings on then. Batches change twice per arrival.
    delay = solution.gain + load.arrivals_per_s * (value[:-1] - value[1:])
    patience = np.maximum(delay, 0.0) * costs.switch_ms / 1e3 * 2.0 * load.arrivals_per_s
    shortfall = solution.shortfall.reshape(window.shape)
    best = np.argmin(shortfall, axis=2, keepdims=True)
    return Plan(
        gain=solution.gain,
        entries=_ranked(
            np.take_along_axis(window, best, 2)[: load.capacity + 1, :, 0],
            np.take_along_axis(shortfall, best, 2)[: load.capacity + 1, :, 0],
        ),
        patience=patience[: load.capacity + 1].tolist(),
        gap_ms=outlook.gap_ms.tolist(),
        shortest_window_ms=shortest,
    )


def _within_aim(process: Process, reward: Floats, late_costs: Floats, late: Floats, made: Floats) -> Solution:
    """The best with few enough late tokens: the lowest price of one that is enough, by bisection."""

    def late_part(policy: NDArray[np.int64]) -> float:
        late_per_s, made_per_s = process.per_second(policy, late, made)
        return late_per_s / made_per_s

    policy = np.zeros(len(reward), np.int64)  # decode alone
    aim = max(LATE_AIM, LATE_ALONE * late_part(policy))
    low, high, found = 0, len(LATE) - 1, None
    while low < high or found is None:
        price = (low + high) // 2
        tried = process.best(reward - LATE[price] * late_costs, policy)
        policy = tried.policy
        if late_part(policy) <= aim or price == len(LATE) - 1:
            high, found = price, tried
        else:
            low = price + 1
    return found


def _late(slo: Slo, tau_ms: Floats, window_ms: Floats, gap_ms: Floats, bound_ms: Floats) -> Floats:
    """[states, shares, windows]: the probability that a token is late, gaps around the forecast being lognormal.

    For a TPOT SLO, whether the step is slower than the mean that the SLO allows.
    """
    late = np.zeros(tau_ms.shape)
    if slo.itl_ms is not None:
        deviation = np.maximum(np.log(bound_ms / gap_ms) / COVERAGE_DEVIATIONS, 1e-3)
        rest = np.log(np.maximum(slo.itl_ms - window_ms, 1e-9) / bound_ms[:, :, None])
        late = ndtr(-rest / deviation[:, :, None] - COVERAGE_DEVIATIONS)
    if slo.tpot_ms is not None:
        late = np.maximum(late, tau_ms > slo.tpot_ms + 1e-6)
    return late


def _ranked(windows: Floats, shortfalls: Floats) -> list[tuple[Entry, ...]]:
    """Entries per state from [states, shares] arrays; a share that is not allowed falls short by infinity."""
    return [
        tuple(Entry(share, window_ms[share], lost[share]) for share in order if lost[share] < np.inf)
        for window_ms, lost, order in zip(
            windows.tolist(), shortfalls.tolist(), np.argsort(shortfalls, axis=1).tolist(), strict=True
        )
    ]
