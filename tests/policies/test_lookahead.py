"""The solver against other ways to the same optimum."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, nbinom, poisson

from policies.lookahead import Process
from predictor.base import Floats


def arrivals(most: int, mean: float, dispersion: float) -> Floats:
    """Chances of 0 to ``most`` arrivals."""
    counts = np.arange(most + 1)
    if dispersion == 1.0:
        return np.asarray(poisson.pmf(counts, mean))
    return np.asarray(nbinom.pmf(counts, mean / (dispersion - 1.0), 1.0 / dispersion))


def transitions(
    tau_s: Floats, batch: NDArray[np.int64], arrivals_per_s: float, leaving: float, dispersion: float = 1.0
) -> Floats:
    """[states, actions, states], from the definitions."""
    states, actions = tau_s.shape
    found = np.zeros((states, actions, states))
    found[0, :, 1] = 1.0
    for n, a in product(range(1, states), range(actions)):
        for left in range(batch[n] + 1):
            stay = n - left
            chance = binom.pmf(left, batch[n], leaving)
            came = arrivals(states - stay - 1, arrivals_per_s * tau_s[n, a], dispersion)
            found[n, a, stay : states - 1] += chance * came[:-1]
            found[n, a, states - 1] += chance * (1.0 - came[:-1].sum())
    return found


def gain_of(policy: tuple[int, ...], chances: Floats, reward: Floats, tau_s: Floats) -> float:
    """Long-run reward per second of one policy, from the stationary distribution of its chain."""
    rows = np.arange(len(policy))
    chain = chances[rows, policy]
    system = np.vstack([chain.T - np.eye(len(policy)), np.ones(len(policy))])
    often = np.linalg.lstsq(system, np.append(np.zeros(len(policy)), 1.0))[0]
    return float(often @ reward[rows, policy] / (often @ tau_s[rows, policy]))


@pytest.mark.parametrize("dispersion", [1.0, 1.7, 6.0])
@pytest.mark.parametrize("seed", range(6))
def test_no_stationary_policy_is_better(seed: int, dispersion: float) -> None:
    random = np.random.default_rng(seed)
    batch = np.array([0, 1, 2, 3, 3])
    tau_s = random.uniform(0.02, 0.5, (5, 3))
    reward = random.uniform(-1.0, 1.0, (5, 3))
    rate, leaving = float(random.uniform(0.2, 6.0)), float(random.uniform(0.02, 0.4))
    tau_s[0], reward[0] = 1.0 / rate, 0.3
    reward[0, 1:] = -np.inf
    reward[4, 2] = -np.inf
    chances = transitions(tau_s, batch, rate, leaving, dispersion)
    gains = {
        policy: gain_of(policy, chances, reward, tau_s)
        for policy in product([0], range(3), range(3), range(3), range(2))
    }
    solution = Process(tau_s, batch, rate, leaving, dispersion).best(reward)
    assert solution.gain == pytest.approx(max(gains.values()), rel=1e-6, abs=1e-6)
    assert gains[tuple(solution.policy.tolist())] == pytest.approx(solution.gain, rel=1e-6, abs=1e-6)


def queue(size: int, rate: float, leaving: float) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Slow and earning, or fast and earning nothing; waiting costs."""
    states = np.arange(size + size // 4 + 1)
    batch = np.minimum(states, size)
    alone = 0.01 + 0.001 * batch
    tau_s = np.column_stack([alone, 1.4 * alone, 2.5 * alone])
    reward = tau_s * [0.0, 200.0, 280.0] - 3000.0 * (states - batch)[:, None] * tau_s
    tau_s[0], reward[0] = 1.0 / rate, 300.0 / rate
    return tau_s, reward, batch


@pytest.mark.parametrize(("size", "rate", "leaving"), [(20, 4.0, 0.01), (40, 9.0, 0.02), (40, 1.0, 0.005)])
def test_relative_value_iteration_finds_the_same_gain(size: int, rate: float, leaving: float) -> None:
    tau_s, reward, batch = queue(size, rate, leaving)
    solution = Process(tau_s, batch, rate, leaving).best(reward)
    chances = transitions(tau_s, batch, rate, leaving)
    value, pace = solution.value.copy(), tau_s.min()
    for _ in range(200):  # from the solution on: it must not move
        rates = ((reward + chances @ value - value[:, None]) / tau_s).max(axis=1)
        value += pace * (rates - rates[0])
    assert rates == pytest.approx(np.full(len(batch), solution.gain), rel=1e-4, abs=1e-3)


def test_amounts_per_second_agree_with_the_chain() -> None:
    tau_s, reward, batch = queue(12, 6.0, 0.05)
    process = Process(tau_s, batch, 6.0, 0.05)
    policy = process.best(reward).policy
    chances = transitions(tau_s, batch, 6.0, 0.05)
    made = np.repeat(batch[:, None].astype(float), 3, axis=1)
    expected = [gain_of(tuple(policy.tolist()), chances, amount, tau_s) for amount in (reward, made)]
    assert process.per_second(policy, reward, made) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rate", [1e-2, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("leaving", [1e-4, 0.005, 0.5])
def test_idle_and_overloaded_queues_are_solved_as_well(rate: float, leaving: float) -> None:
    tau_s, reward, batch = queue(256, rate, leaving)
    process = Process(tau_s, batch, rate, leaving)
    solution = process.best(reward)
    assert np.isfinite(solution.value).all()
    for action in range(3):
        same = process.per_second(np.full(len(batch), action), reward)[0]
        assert solution.gain >= same - 1e-3 * max(1.0, abs(same))


def test_the_start_does_not_matter() -> None:
    tau_s, reward, batch = queue(40, 9.0, 0.02)
    process = Process(tau_s, batch, 9.0, 0.02)
    cold = process.best(reward)
    for action in range(3):
        assert process.best(reward, np.full(len(batch), action)).gain == pytest.approx(cold.gain, rel=1e-7)


def test_slowing_down_pays_only_while_the_queue_is_far() -> None:
    """The more arrivals, the less of it; decode alone once requests wait."""
    earning = []
    for rate in (2.0, 6.0, 12.0):
        tau_s, reward, batch = queue(40, rate, 0.01)
        policy = Process(tau_s, batch, rate, 0.01).best(reward).policy
        earning.append(int((policy[1:41] > 0).sum()))
        assert policy[-1] == 0
    assert earning[0] > earning[-1]
    assert earning == sorted(earning, reverse=True)


@pytest.mark.parametrize("dispersion", [1.0, 1.7, 6.0])
def test_a_second_costs_what_a_short_delay_does(dispersion: float) -> None:
    tau_s, reward, batch = queue(12, 3.0, 0.1)
    process = Process(tau_s, batch, 3.0, 0.1, dispersion)
    solution = process.best(reward)
    delay_s, last = 1e-5, len(batch) - 1
    came = arrivals(last, 3.0 * delay_s, dispersion)
    for state, cost in enumerate(process.delay_cost(solution)):
        later = solution.value[np.minimum(state + np.arange(last + 1), last)]
        expected = came @ later + (1.0 - came.sum()) * solution.value[last]
        assert cost == pytest.approx(solution.gain + (solution.value[state] - expected) / delay_s, rel=1e-2, abs=1e-2)
