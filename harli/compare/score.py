"""From metrics of runs to rows: means, intervals, ratios to the best rival, and who harmed decode."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from harli.compare.cell import ORACLE, SEPARATE, Entrant, Objective
from harli.records.summary import METRICS, Floats
from harli.types import Slo

ATTAINED = 0.99
ATTAINED_LESS = 0.005
"""An SLO is kept at this attainment, or if decode alone attains at most so much more."""
SERVED = 0.99
"""Fraction of decode alone's requests per second."""
WAIT_FACTOR = 1.1
"""Requests may wait so many times as long as with decode alone, or one SLO longer."""
CONFIDENCE = 0.95

TOKENS, WAIT, ADMITTED = "finetune/tokens_per_s", "decode/queue_wait_p99_ms", "decode/admitted_per_s"
"""``ADMITTED``: requests over the seconds until the last one was scheduled first.

``decode/requests_per_s`` counts until the last answer has ended. In a run of minutes the longest answer decides
that, which may take longer within the SLO; whether requests are served as they come shows in the admissions.
"""

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Run:
    """One run held against one SLO."""

    metrics: Mapping[str, float | None]
    """Those of ``harli.records.summary`` and ``ADMITTED``."""
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
class Verdict:
    """What became of decode."""

    keeps_slo: bool
    waits: bool
    """Requests wait for longer, or are served more slowly, than with decode alone."""
    reason: str
    """Empty when decode is unharmed."""


@dataclass(frozen=True, slots=True)
class Row:
    """One entrant at one objective, over all rounds that are complete."""

    entrant: Entrant
    objective: Objective
    metrics: Mapping[str, float | None]
    """Means over rounds."""
    points: tuple[tuple[float, float], ...]
    """Attainment and finetune tokens/s of each round."""
    interval: Interval | None
    """Of finetune tokens/s."""
    verdict: Verdict
    rival: Entrant | None = None
    """The best other policy that leaves decode unharmed."""
    ratio: float | None = None
    """Finetune tokens/s over the rival's."""
    ratio_interval: Interval | None = None
    of_oracle: float | None = None
    """Finetune tokens/s over those of `oracle`, if it takes part and leaves decode unharmed."""
    gain: float | None = None
    """Over dedicated devices: two devices that do both, against one that decodes and one that finetunes."""

    @property
    def unharmed(self) -> bool:
        return not self.verdict.reason

    @property
    def attainment(self) -> float:
        """Mean over rounds."""
        return Run(self.metrics).attainment(self.objective.slo)

    def as_json(self) -> dict[str, Any]:
        """Flat, with plain JSON values."""
        slo = self.objective.slo
        return {
            "policy": self.entrant.policy,
            "params": dict(self.entrant.params),
            "slo_scale": self.objective.scale,
            "slo_itl_ms": slo.itl_ms,
            "slo_tpot_ms": slo.tpot_ms,
            "rounds": len(self.points),
            **self.metrics,
            f"{TOKENS}_interval": self.interval,
            f"{TOKENS}_vs_best_rival": self.ratio,
            f"{TOKENS}_vs_best_rival_interval": self.ratio_interval,
            f"{TOKENS}_vs_oracle": self.of_oracle,
            "best_rival": str(self.rival) if self.rival else None,
            "finetune/gain_vs_dedicated": self.gain,
            "keeps_slo": self.verdict.keeps_slo,
            "unharmed": self.unharmed,
            "waits": self.verdict.waits,
            "reason": self.verdict.reason,
        }


def judge(ours: Rounds, separate: Rounds, slo: Slo) -> Verdict:
    """What became of decode, by means over the rounds that both have, against decode alone in the same rounds.

    Decode is unharmed when the SLO's attainment is 99% or within half a point of decode alone's, requests
    are served at 99% of its rate or more, their P99 wait is at most one SLO longer or 1.1 times as long, no
    request failed and finetuning did not.
    """
    both = sorted(ours.keys() & separate.keys())

    def mean(rounds: Rounds, name: str) -> float:
        return float(np.mean([rounds[number].get(name) for number in both]))

    attained, alone = (float(np.mean([runs[number].attainment(slo) for number in both])) for runs in (ours, separate))
    keeps_slo = attained >= min(ATTAINED, alone - ATTAINED_LESS)
    served = mean(ours, ADMITTED) / mean(separate, ADMITTED)
    wait_ms, alone_ms = mean(ours, WAIT), mean(separate, WAIT)
    longest_ms = max(alone_ms + (slo.itl_ms or slo.tpot_ms or 0.0), WAIT_FACTOR * alone_ms)
    slow, late = not served >= SERVED, not wait_ms <= longest_ms
    failed = sum(ours[number].get("decode/requests_failed") for number in both)
    reasons = [
        "" if keeps_slo else f"attains {attained:.1%}, decode alone {alone:.1%}",
        f"serves requests at {served:.1%} of decode alone's rate" if slow else "",
        f"requests wait {wait_ms:.0f} ms at P99, decode alone {alone_ms:.0f} ms" if late else "",
        f"{failed:.0f} failed requests" if failed else "",
        next((ours[number].failure for number in both if ours[number].failure), ""),
    ]
    return Verdict(keeps_slo, slow or late, "; ".join(filter(None, reasons)))


def rank(run: Run, separate: Run, slo: Slo) -> tuple[bool, bool, float]:
    """Orders variants: decode unharmed, then the SLO kept, then most tokens, or else the best attainment."""
    verdict = judge({1: run}, {1: separate}, slo)
    return not verdict.reason, verdict.keeps_slo, run.get(TOKENS) if verdict.keeps_slo else run.attainment(slo)


def score(objective: Objective, runs: Mapping[Entrant, Rounds], gains: Mapping[Entrant, float]) -> list[Row]:
    """A row per entrant, `separate` first and then by finetune tokens/s; ``runs`` has to have `separate`."""
    separate = runs[SEPARATE]
    rows = [
        _row(entrant, objective, rounds, separate, gains.get(entrant))
        for entrant, rounds in runs.items()
        if rounds.keys() & separate.keys()
    ]
    rows.sort(key=lambda row: (row.entrant != SEPARATE, -(row.metrics[TOKENS] or 0.0)))
    good = [row for row in rows if row.unharmed and row.entrant != SEPARATE and row.metrics[TOKENS]]
    limit = next((row.metrics[TOKENS] for row in good if row.entrant.policy == ORACLE), None)
    if limit:
        rows = [replace(row, of_oracle=(row.metrics[TOKENS] or 0.0) / limit) for row in rows]
    rivals = [row for row in good if row.entrant.policy != ORACLE]
    return [row if row.entrant == SEPARATE else _against_rival(row, rivals, runs) for row in rows]


def marks(rows: Sequence[Row]) -> list[str]:
    """What a reader of these rows of one objective should know about the rivals."""
    found = [
        f"{row.entrant} keeps the SLO only by letting requests wait"
        for row in rows
        if row.verdict.keeps_slo and row.verdict.waits
    ]
    static = [row.verdict.keeps_slo for row in rows if row.entrant.policy == "static"]
    if static and not any(static):
        found.append("no static split keeps the SLO")
    return found


def gain_over_dedicated(half_tokens_per_s: Sequence[float], alone_tokens_per_s: Sequence[float]) -> float | None:
    """``2 * harvest(half the requests) / rate_alone - 1``, the mean over rounds; None without a round."""
    pairs = [(half, alone) for half, alone in zip(half_tokens_per_s, alone_tokens_per_s, strict=True) if alone > 0.0]
    return float(np.mean([2.0 * half / alone - 1.0 for half, alone in pairs])) if pairs else None


def _row(entrant: Entrant, objective: Objective, rounds: Rounds, separate: Rounds, gain: float | None) -> Row:
    metrics = {name: _mean(run.metrics[name] for run in rounds.values()) for name in (*METRICS, ADMITTED)}
    tokens = np.array([run.get(TOKENS) for run in rounds.values()])
    return Row(
        entrant=entrant,
        objective=objective,
        metrics=metrics,
        points=tuple((run.attainment(objective.slo), run.get(TOKENS)) for run in rounds.values()),
        interval=_geometric(tokens)[1] if tokens.all() else None,
        verdict=judge(rounds, separate, objective.slo),
        gain=gain,
    )


def _against_rival(row: Row, candidates: Sequence[Row], runs: Mapping[Entrant, Rounds]) -> Row:
    ours = runs[row.entrant]
    rivals = [
        other
        for other in candidates
        if other.entrant.policy != row.entrant.policy and runs[other.entrant].keys() & ours.keys()
    ]
    if not rivals:
        return row
    best = max(rivals, key=lambda other: other.metrics[TOKENS] or 0.0)
    theirs = runs[best.entrant]
    both = sorted(ours.keys() & theirs.keys())
    mine, other = (np.array([runs[number].get(TOKENS) for number in both]) for runs in (ours, theirs))
    ratio: float | None = None
    interval: Interval | None = None
    if mine.all() and other.all():
        ratio, interval = _geometric(mine / other)
    elif other.any():  # a round without a single update has no logarithm
        ratio = float(mine.sum() / other.sum())
    return replace(row, rival=best.entrant, ratio=ratio, ratio_interval=interval)


def _geometric(values: Floats) -> tuple[float, Interval | None]:
    """Geometric mean of positive values and its t-interval, of logarithms; one value has no interval."""
    from scipy import stats

    logs = np.log(values)
    mean = float(logs.mean())
    if len(logs) < 2:
        return math.exp(mean), None
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(logs) - 1) * stats.sem(logs))
    return math.exp(mean), (math.exp(mean - half), math.exp(mean + half))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
