"""What becomes of decode in a run, beside decode alone in the same rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from harli.compare.means import Interval, arithmetic
from harli.types import Slo

ATTAINED = 0.99
ATTAINED_LESS = 0.005
"""An SLO is kept at this attainment, or if decode alone attains at most so much more."""
SERVED = 0.99
"""Fraction of decode alone's requests per second."""
WAIT_FACTOR = 1.1
"""Requests may wait so many times as long as with decode alone, or one SLO longer."""

TOKENS, WAIT, ADMITTED = "finetune/tokens_per_s", "decode/queue_wait_p99_ms", "decode/admitted_per_s"
"""What a comparison counts in its own way, see ``harli.compare.results.compared``, but for ``WAIT``."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run held against one SLO."""

    metrics: Mapping[str, float | None]
    """As ``harli.compare.results.compared`` has them."""
    failure: str = ""
    """Why finetuning stopped."""

    def get(self, name: str) -> float:
        """A metric; NaN where there was no data."""
        value = self.metrics[name]
        return math.nan if value is None else value

    def attainment(self, slo: Slo) -> float:
        """The smaller one where there are two SLOs; NaN without a request that has a gap."""
        names = [name for name, limit in (("itl", slo.itl_ms), ("tpot", slo.tpot_ms)) if limit is not None]
        return min(self.get(f"slo/{name}_attainment") for name in names)


Rounds = Mapping[int, Run]
"""By number of the round, from 1."""


@dataclass(frozen=True, slots=True)
class Attainment:
    """Of an SLO, beside decode alone's; means over the rounds that both have."""

    ours: float
    alone: float
    interval: Interval | None
    """Of the difference, from its values in each round."""

    @property
    def difference(self) -> float:
        """How much more than decode alone's."""
        return self.ours - self.alone

    @property
    def limit(self) -> float:
        """The least difference at which the SLO counts as kept."""
        return min(ATTAINED - self.alone, -ATTAINED_LESS)

    @property
    def kept(self) -> bool:
        """It is 99%, or within half a point of decode alone's."""
        return self.ours >= min(ATTAINED, self.alone - ATTAINED_LESS)

    @property
    def unclear(self) -> bool:
        """The limit lies within the interval."""
        return self.interval is not None and self.interval[0] < self.limit < self.interval[1]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of decode."""

    attainment: Attainment
    waits: bool
    """Requests wait for longer, or are served more slowly, than with decode alone."""
    reason: str
    """Empty when decode is unharmed."""
    undecided: bool
    """It hangs on the attainment, which is unclear."""

    @property
    def keeps_slo(self) -> bool:
        return self.attainment.kept


def attainment(ours: Rounds, separate: Rounds, slo: Slo) -> Attainment:
    """Over the rounds that both have; there has to be one."""
    both = sorted(ours.keys() & separate.keys())
    mine, alone = ([rounds[number].attainment(slo) for number in both] for rounds in (ours, separate))
    interval = arithmetic([one - other for one, other in zip(mine, alone, strict=True)])[1]
    return Attainment(float(np.mean(mine)), float(np.mean(alone)), interval)


def judge(ours: Rounds, separate: Rounds, slo: Slo) -> Verdict:
    """What became of decode, by means over the rounds that both have, against decode alone in the same rounds.

    Decode is unharmed when the SLO's attainment is 99% or within half a point of decode alone's, requests
    are served at 99% of its rate or more, their P99 wait is at most one SLO longer or 1.1 times as long, no
    request failed and finetuning did not.
    """
    both = sorted(ours.keys() & separate.keys())

    def mean(rounds: Rounds, name: str) -> float:
        return float(np.mean([rounds[number].get(name) for number in both]))

    attained = attainment(ours, separate, slo)
    served = mean(ours, ADMITTED) / mean(separate, ADMITTED)
    wait_ms, alone_ms = mean(ours, WAIT), mean(separate, WAIT)
    longest_ms = max(alone_ms + (slo.itl_ms or slo.tpot_ms or 0.0), WAIT_FACTOR * alone_ms)
    slow, late = not served >= SERVED, not wait_ms <= longest_ms
    failed = sum(ours[number].get("decode/requests_failed") for number in both)
    missed = "" if attained.kept else f"attains {attained.ours:.1%}, decode alone {attained.alone:.1%}"
    others = [
        f"serves requests at {served:.1%} of decode alone's rate" if slow else "",
        f"requests wait {wait_ms:.0f} ms at P99, decode alone {alone_ms:.0f} ms" if late else "",
        f"{failed:.0f} failed requests" if failed else "",
        next((ours[number].failure for number in both if ours[number].failure), ""),
    ]
    reason = "; ".join(filter(None, [missed, *others]))
    return Verdict(attained, slow or late, reason, undecided=attained.unclear and not any(others))


def rank(run: Run, separate: Run, slo: Slo) -> tuple[bool, bool, float]:
    """Orders variants: decode unharmed, then the SLO kept, then most tokens, or else the best attainment."""
    verdict = judge({1: run}, {1: separate}, slo)
    return not verdict.reason, verdict.keeps_slo, run.get(TOKENS) if verdict.keeps_slo else run.attainment(slo)
