"""From metrics of runs to rows: means, intervals, ratios to the best rival, and who harmed decode.

Finetune tokens/s are compared by their ratios, so all means of them are geometric.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from harli.compare.cell import ORACLE, SEPARATE, Entrant, Objective
from harli.compare.means import Interval, geometric
from harli.compare.verdict import ADMITTED, TOKENS, Attainment, Rounds, Run, Verdict, attainment, judge
from harli.records.summary import METRICS
from harli.types import Slo


@dataclass(frozen=True, slots=True)
class Gain:
    """Over dedicated devices: two devices that do both, against one that decodes and one that finetunes."""

    value: float | None
    """None where the two would not keep the SLO."""
    attainment: Attainment
    """With half of the requests, beside decode alone with all of them."""


@dataclass(frozen=True, slots=True)
class Row:
    """One entrant at one objective, over all rounds that are complete."""

    entrant: Entrant
    objective: Objective
    metrics: Mapping[str, float | None]
    """Means over rounds: that of finetune tokens/s is geometric."""
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
    gain: Gain | None = None

    @property
    def unharmed(self) -> bool:
        return not self.verdict.reason

    @property
    def tokens_per_s(self) -> float:
        return self.metrics[TOKENS] or 0.0

    @property
    def attainment(self) -> float:
        """Mean over rounds."""
        return Run(self.metrics).attainment(self.objective.slo)

    def as_json(self) -> dict[str, Any]:
        """Flat, with plain JSON values."""
        slo, attained = self.objective.slo, self.verdict.attainment
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
            "finetune/gain_vs_dedicated": self.gain.value if self.gain else None,
            "finetune/gain_vs_dedicated_keeps_slo": self.gain.attainment.kept if self.gain else None,
            "slo/attainment_vs_separate": None if math.isnan(attained.difference) else attained.difference,
            "slo/attainment_vs_separate_interval": attained.interval,
            "keeps_slo": self.verdict.keeps_slo,
            "unharmed": self.unharmed,
            "undecided": self.verdict.undecided,
            "waits": self.verdict.waits,
            "reason": self.verdict.reason,
        }


def score(objective: Objective, runs: Mapping[Entrant, Rounds], gains: Mapping[Entrant, Gain]) -> list[Row]:
    """A row per entrant, `separate` first and then by finetune tokens/s; ``runs`` has to have `separate`."""
    separate = runs[SEPARATE]
    rows = [
        _row(entrant, objective, rounds, separate, gains.get(entrant))
        for entrant, rounds in runs.items()
        if rounds.keys() & separate.keys()
    ]
    rows.sort(key=lambda row: (row.entrant != SEPARATE, -row.tokens_per_s))
    good = [row for row in rows if row.unharmed and row.entrant != SEPARATE and row.tokens_per_s]
    oracle = next((runs[row.entrant] for row in good if row.entrant.policy == ORACLE), None)
    if oracle:
        rows = [replace(row, of_oracle=_ratio(runs[row.entrant], oracle)[0]) for row in rows]
    rivals = [row for row in good if row.entrant.policy != ORACLE]
    return [row if row.entrant == SEPARATE else _against_rival(row, rivals, runs) for row in rows]


def marks(rows: Sequence[Row]) -> list[str]:
    """What a reader of these rows of one objective should know about them."""
    found = [
        f"{row.entrant} keeps the SLO only by letting requests wait"
        for row in rows
        if row.verdict.keeps_slo and row.verdict.waits
    ]
    found += [f"{row.entrant} is undecided: {_said(row.verdict.attainment)}" for row in rows if row.verdict.undecided]
    for row in rows:
        idle, several = sum(not tokens for _, tokens in row.points), len(row.points)
        if 0 < idle < several:
            found.append(f"{row.entrant} finetuned nothing in {idle} of {several} rounds, so that its mean is 0")
        if row.gain and row.gain.value is None:
            half = row.gain.attainment
            found.append(
                f"{row.entrant} has no gain over dedicated devices: with half of the requests it attains "
                f"{half.ours:.1%}, decode alone with all {half.alone:.1%}"
            )
    static = [row.verdict.keeps_slo for row in rows if row.entrant.policy == "static"]
    if static and not any(static):
        found.append("no static split keeps the SLO")
    return found


def gain_over_dedicated(halves: Rounds, alone: Rounds, separate: Rounds, slo: Slo) -> Gain | None:
    """``2 * harvest(half the requests) / rate_alone - 1``, over the rounds that all have; None without such a round.

    ``alone``: finetuning without requests. ``separate``: decode alone with all of them, as the dedicated device has.
    """
    both = [number for number in halves.keys() & separate.keys() & alone.keys() if alone[number].get(TOKENS)]
    if not both:
        return None
    counted = {number: halves[number] for number in both}
    attained, ratio = attainment(counted, separate, slo), _ratio(counted, alone)[0]
    return Gain(2.0 * ratio - 1.0 if attained.kept and ratio is not None else None, attained)


def _row(entrant: Entrant, objective: Objective, rounds: Rounds, separate: Rounds, gain: Gain | None) -> Row:
    metrics = {name: _mean(run.metrics[name] for run in rounds.values()) for name in (*METRICS, ADMITTED)}
    points = tuple((run.attainment(objective.slo), run.get(TOKENS)) for run in rounds.values())
    metrics[TOKENS], interval = geometric([tokens for _, tokens in points])
    verdict = judge(rounds, separate, objective.slo)
    return Row(entrant, objective, metrics, points, interval, verdict, gain=gain)


def _against_rival(row: Row, candidates: Sequence[Row], runs: Mapping[Entrant, Rounds]) -> Row:
    ours = runs[row.entrant]
    rivals = [
        other
        for other in candidates
        if other.entrant.policy != row.entrant.policy and runs[other.entrant].keys() & ours.keys()
    ]
    if not rivals:
        return row
    best = max(rivals, key=lambda other: other.tokens_per_s)
    ratio, interval = _ratio(ours, runs[best.entrant])
    return replace(row, rival=best.entrant, ratio=ratio, ratio_interval=interval)


def _ratio(ours: Rounds, theirs: Rounds) -> tuple[float | None, Interval | None]:
    """Of finetune tokens/s over the rounds that both have, in all of which ``theirs`` has some."""
    both = sorted(ours.keys() & theirs.keys())
    ratios = [ours[number].get(TOKENS) / theirs[number].get(TOKENS) for number in both]
    return geometric(ratios) if ratios else (None, None)


def _said(attained: Attainment) -> str:
    assert attained.interval is not None
    shown = [f"{100.0 * value:+.2f}" for value in (attained.difference, *attained.interval, attained.limit)]
    return "its attainment less decode alone's is {} points ({} to {}), the limit {}".format(*shown)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
