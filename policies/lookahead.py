"""The best long-run decisions of a queue whose service can be slowed: an average-reward semi-Markov decision process.

The process is looked at when a decode step begins. A state ``n`` is the number of requests, in the batch and waiting.
An action ``a`` takes ``tau(n, a)`` seconds and earns ``r(n, a)``; meanwhile requests arrive, and each request of the
batch ends with the same probability, so that Binomial(batch, leaving) leave. State 0 lasts until a request comes.
Arrivals come in bursts: their number has the mean ``rate x tau`` and ``dispersion`` times that as its variance, as a
negative binomial, which is Poisson where the dispersion is 1. (Bursts come as a Poisson process then, and their sizes
have the logarithmic distribution: Quenouille, Biometrics 5, 1949.) The largest ``g`` for which some values ``V`` solve,
in every state,

    max over a of [ r(n, a) + E V(n') - V(n) ] / tau(n, a) = g

is the most that can be earned per second in the long run, and an action that reaches the maximum is best (Puterman,
"Markov Decision Processes", 1994, chapter 11.4). The bracket over tau is the data transformation that relative value
iteration runs on (Tijms, "A First Course in Stochastic Models", 2003, chapter 7). Howard's policy iteration (the same
chapters) reaches the same optimum: a batch changes slowly, so values take thousands of sweeps to settle, where policy
iteration takes a handful of banded linear systems and is exact.

Evaluating a policy means solving V = r - g tau + P V. A restart from state 0 with probability ``RESTART`` per step
keeps the matrix regular for policies under which some states are practically never seen again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_banded

Floats = NDArray[np.float64]

RESTART = 1e-9
MAX_ROUNDS = 50


@dataclass(frozen=True, slots=True)
class Solution:
    policy: NDArray[np.int64]
    """[states]: the best action."""
    gain: float
    """Reward per second in the long run."""
    value: Floats
    """[states]: what it is worth to be there, relative to state 0."""


class Process:
    """The queue without its rewards."""

    def __init__(
        self,
        tau_s: Floats,
        batch: NDArray[np.int64],
        arrivals_per_s: float,
        leaving: float,
        dispersion: float = 1.0,
    ) -> None:
        """``tau_s``: [states, actions], positive; row 0 is idling, and counts beyond the last state count as the last.

        ``batch``: [states], the requests that take part in a step: the state's number, or what fits.
        ``dispersion``: variance over mean of the number of arrivals, at least 1.
        """
        self._tau_s = tau_s
        self._states = np.arange(len(batch))
        self._arrivals_per_s = arrivals_per_s
        self._dispersion = dispersion
        self._arrive = _arrivals(arrivals_per_s * tau_s, dispersion)
        self._leave = _departures(batch, leaving)

    def best(self, reward: Floats, policy: NDArray[np.int64] | None = None) -> Solution:
        """The policy with the largest gain. ``reward``: [states, actions], -inf where an action is not allowed.

        ``policy`` is where to start, a solution for other rewards perhaps.
        """
        states, tau_s = self._states, self._tau_s
        if policy is None:
            policy = np.argmax(reward / tau_s, axis=1)
        for _ in range(MAX_ROUNDS):
            (gain,), (value,) = self._evaluate(policy, reward)
            earned = (reward + _expected(self._arrive, self._leave, value) - value[:, None]) / tau_s
            best = np.argmax(earned, axis=1)
            better = earned[states, best] - earned[states, policy] > 1e-7 * max(1.0, abs(gain))
            if not better.any():
                break
            policy = np.where(better, best, policy)
        return Solution(policy, gain, value)

    def per_second(self, policy: NDArray[np.int64], *amounts: Floats) -> list[float]:
        """The long-run rates of amounts that actions come with, each [states, actions]."""
        return self._evaluate(policy, *amounts)[0]

    def delay_cost(self, solution: Solution) -> Floats:
        """[states]: what a second costs in the long run: the gain, and what bursts in it are expected to take away.

        Bursts of ``k`` requests come at the rate ``arrivals_per_s / dispersion x q^(k - 1) / k``, where ``q`` is
        ``1 - 1 / dispersion``.
        """
        value, last = solution.value, len(solution.value) - 1
        size = np.arange(1, last + 1)
        rate = self._arrivals_per_s / self._dispersion * (1.0 - 1.0 / self._dispersion) ** (size - 1) / size
        rate[-1] += self._arrivals_per_s * _bursts(self._dispersion) - rate.sum()
        lost = value[:, None] - value[np.minimum(self._states[:, None] + size, last)]
        return np.asarray(solution.gain + lost @ rate)

    def _evaluate(self, policy: NDArray[np.int64], *amounts: Floats) -> tuple[list[float], list[Floats]]:
        """Long-run rate, and values relative to state 0, of every amount."""
        states = self._states
        jumps, below = _jumps(self._arrive[:, states, policy].T, self._leave)
        above = jumps.shape[1] - 1 - below
        bands = np.zeros((above + below + 1, len(states)))  # solve_banded's layout: row above + i - j, column j
        for column in range(above + below + 1):
            jump = column - below
            rows = states[max(0, -jump) : len(states) - max(0, jump)]
            bands[above - jump, rows + jump] = (RESTART - 1.0) * jumps[rows, column]
        bands[above] += 1.0
        sides = np.column_stack([amount[states, policy] for amount in (self._tau_s, *amounts)])
        time, *sums = solve_banded((below, above), bands, sides, check_finite=False).T
        rates = [float(total[0] / time[0]) for total in sums]
        return rates, [total - rate * time for total, rate in zip(sums, rates, strict=True)]


def _tail(mean: float, dispersion: float = 1.0) -> int:
    """A count that is exceeded less than once in a million times; more counts as it."""
    return math.ceil(mean + 6.0 * math.sqrt(mean * dispersion) + 14.0 * (dispersion - 1.0) + 3.0)


def _bursts(dispersion: float) -> float:
    """Per arrival."""
    return math.log(dispersion) / (dispersion - 1.0) if dispersion > 1.0 else 1.0


def _arrivals(mean: Floats, dispersion: float) -> Floats:
    """[arrivals, states, actions]: negative binomial; exactly one arrival ends idling."""
    most = min(_tail(float(mean[1:].max(initial=0.0)), dispersion), max(len(mean) - 1, 1))
    found = np.empty((most + 1, *mean.shape))
    found[0] = np.exp(-mean * _bursts(dispersion))
    for count in range(1, most):
        more = mean / dispersion + (count - 1) * (1.0 - 1.0 / dispersion)
        found[count] = found[count - 1] * more / count
    found[most] = np.maximum(0.0, 1.0 - found[:most].sum(axis=0))
    found[:, 0] = 0.0
    found[1, 0] = 1.0
    return found


def _departures(batch: NDArray[np.int64], leaving: float) -> Floats:
    """[states, departures]: Binomial."""
    largest = int(batch.max())
    most = min(_tail(largest * leaving), largest)
    found = np.zeros((len(batch), most + 1))
    found[:, 0] = (1.0 - leaving) ** batch
    for count in range(1, most):
        found[:, count] = found[:, count - 1] * (leaving / (1.0 - leaving)) * np.maximum(batch - count + 1, 0) / count
    found[:, most] = np.maximum(0.0, 1.0 - found[:, :most].sum(axis=1))
    return found


def _expected(arrive: Floats, leave: Floats, value: Floats) -> Floats:
    """[states, actions]: E V(n') of every action."""
    states, most = len(value), len(arrive)
    later = value[np.minimum(np.arange(states)[:, None] + np.arange(most), states - 1)]
    after = leave[:, :1] * later
    for count in range(1, min(leave.shape[1], states)):
        after[count:] += leave[count:, count, None] * later[:-count]
    expected = np.zeros(arrive.shape[1:])
    for count in range(most):
        expected += arrive[count] * after[:, count, None]
    return expected


def _jumps(arrive: Floats, leave: Floats) -> tuple[Floats, int]:
    """[states, jumps]: probabilities of n' - n, and how many of the jumps lead down."""
    states, above, below = len(arrive), arrive.shape[1] - 1, leave.shape[1] - 1
    jumps = np.zeros((states, below + above + 1))
    for count in range(below + 1):
        jumps[:, below - count : below - count + above + 1] += leave[:, count, None] * arrive
    for room in range(min(above, states)):  # beyond the last state is the last state
        row = jumps[states - 1 - room]
        row[below + room] = row[below + room :].sum()
        row[below + room + 1 :] = 0.0
    return jumps, below
