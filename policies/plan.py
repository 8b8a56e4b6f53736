"""From a load and a predictor to a table: what a second of delay costs at every batch size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from harli.types import LONGEST_GAP_MS, FinetuneState, Slo
from policies.load import Load
from policies.lookahead import Process, Solution
from predictor.base import Floats, Predictor

LATE = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Prices of a late token that are tried, in what the whole device finetunes per SLO period; the lowest that meets
``LATE_AIM`` is taken."""
LATE_AIM = 0.005
"""Fraction of late tokens to plan for: half of what 99% attainment leaves."""
LATE_ALONE = 1.25
"""Where decode alone has more late tokens, the aim is this multiple of them: finetuning cannot mend that."""
WAITING = 30.0
"""A waiting request costs what this many whole devices finetune while it waits."""
COVERAGE_DEVIATIONS = 2.33
"""A bound with 99% coverage lies this many standard deviations above the middle."""
ROOM_USED = (0.0, 0.3, 0.6, 1.0)
"""Windows to choose from, as fractions of what a share's bound leaves of the budget."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Tables over the batch size, from 0 to the capacity."""

    gain: float
    """Finetune tokens per second in the long run, less the costs of late tokens and waiting requests."""
    delay_cost: list[float]
    """Finetune tokens that a second of delay at this batch costs in the long run."""
    gap_ms: list[list[float]]
    """Planned gap of every share, without a window."""
    late: list[float]
    """Late tokens that the predictor expects of a step, decode being alone because nothing else fits."""

    @property
    def capacity(self) -> int:
        return len(self.delay_cost) - 1


def make_plan(predictor: Predictor, slo: Slo, load: Load, finetune: FinetuneState, slowdown: float) -> Plan:
    """What delay costs in the long run, for a load that stays as it is.

    The best decision in a state maximises r(a) - g tau(a) + E V(n') (``policies.lookahead``). Departures do not depend
    on the decision, and a step of tau seconds sees an arrival with probability rate x tau, so that it maximises
    r(a) - tau(a) (g + rate (V(n) - V(n + 1))): finetune tokens, less their time at the price of delay. So a step can be
    decided by its own forecast instead of the mean state's.

    An ITL SLO limits the upper bound of a gap, a TPOT SLO its mean, since a request's TPOT averages over
    many steps, ``slowdown`` the mean as a multiple of decode alone's. Once requests wait, decode is alone.
    """
    costs, alone_per_ms = predictor.costs, predictor.alone_tokens_per_s(finetune) / 1e3
    queue = max(8, load.capacity // 4)
    states = np.arange(load.capacity + queue + 1)
    batch = np.minimum(states, load.capacity)
    full = states > load.capacity

    size = np.maximum(np.arange(load.capacity + 1, dtype=float), 1.0)
    outlook = predictor.outlook(size, size * load.context, finetune)
    gap = (outlook.gap_ms * load.stretch)[batch]
    bound = outlook.bound_ms[batch]

    room = LONGEST_GAP_MS - gap
    if slo.itl_ms is not None:
        room = np.minimum(room, slo.itl_ms - bound)
    if slo.tpot_ms is not None:
        room = np.minimum(room, slo.tpot_ms - gap)
    room = np.minimum(room, slowdown * gap[:, :1] - gap)
    fits = (room >= 0.0) & ~full[:, None]
    fits[:, 0] = True

    units = predictor.units(finetune)
    rest_ms = np.array([units.rest_ms(share.finetune) for share in predictor.menu.shares[:-1]])[:, None]
    split = np.arange(len(rest_ms))[:, None] > 0
    window = (room - costs.window_overhead_ms)[:, :, None] * np.array(ROOM_USED)
    used_ms = np.where(fits[:, :, None], units.in_windows_ms(window - rest_ms, split), 0.0)
    opened = used_ms > 0.0
    allowed = opened.copy()
    allowed[:, :, 0] = fits

    tau_ms = gap[:, :, None] + np.where(opened, rest_ms + used_ms + costs.window_overhead_ms, 0.0)
    rate = outlook.finetune_tokens_per_s[batch][:, :, None] / 1e3
    reward = rate * (gap[:, :, None] + np.where(opened, rest_ms, 0.0))
    reward += alone_per_ms * used_ms
    reward -= WAITING * alone_per_ms * (states - batch)[:, None, None] * tau_ms
    tau_ms[0] = 1e3 / load.arrivals_per_s
    reward[0] = alone_per_ms * tau_ms[0]
    reward[~allowed] = -np.inf

    made = np.broadcast_to(batch[:, None, None].astype(float), tau_ms.shape)
    expected = batch[:, None] * _late(slo, gap[:, :1], outlook.gap_ms[batch][:, :1], bound[:, :1], room[:, :1])
    late = np.minimum(load.lateness * expected[:, :, None], made)
    late_costs = alone_per_ms * min(slo.itl_ms or LONGEST_GAP_MS, slo.tpot_ms or LONGEST_GAP_MS) * late

    shape = (len(states), -1)
    process = Process(tau_ms.reshape(shape) / 1e3, batch, load.arrivals_per_s, load.leaving, load.dispersion)
    solution = _within_aim(process, *(array.reshape(shape) for array in (reward, late_costs, late, made)))
    delay = process.delay_cost(solution)[: load.capacity + 1]
    expected = expected[: load.capacity + 1, 0]
    return Plan(solution.gain, np.maximum(delay, 0.0).tolist(), outlook.gap_ms.tolist(), expected.tolist())


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


def _late(slo: Slo, planned_ms: Floats, gap_ms: Floats, bound_ms: Floats, room_ms: Floats) -> Floats:
    """The probability that a token is late though decode is alone, gaps around the forecast being lognormal.

    0 where a bound fits: such steps keep the SLO as often as the bounds promise. For a TPOT SLO, whether the step is
    slower than the mean that the SLO allows.
    """
    late = np.zeros(gap_ms.shape)
    if slo.itl_ms is not None:
        deviation = np.maximum(np.log(bound_ms / gap_ms) / COVERAGE_DEVIATIONS, 1e-3)
        late = ndtr(-np.log(slo.itl_ms / bound_ms) / deviation - COVERAGE_DEVIATIONS)
    if slo.tpot_ms is not None:
        late = np.maximum(late, planned_ms > slo.tpot_ms + 1e-6)
    return np.where(room_ms >= 0.0, 0.0, late)
