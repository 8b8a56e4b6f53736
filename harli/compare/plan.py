"""Which runs a comparison consists of, and in which order.

Decode alone of the first round comes first, since SLO scales are multiples of its latency. Then, if
some policy has variants, a short pass over all of them; what it finds best takes part in the rounds.
In each round every entrant runs once, in an order of its own, so that drift hits all alike. The order
follows from the seed and from results: it is the same again when a comparison is resumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, Protocol

import numpy as np

from harli.compare.cell import SEPARATE, Entrant, Group, Objective
from harli.compare.settings import ComparisonSettings
from harli.compare.verdict import Run, rank
from harli.types import Menu, Slo

PRUNING = 0
"""The "round" in which variants are chosen."""


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run of one entrant."""

    round: int
    entrant: Entrant
    objective: Objective | None = None
    """What the policy is given; None for one that does not look at it."""
    load: Literal["all", "half", "none"] = "all"
    """Of the requests."""

    def __str__(self) -> str:
        where = f"round {self.round}" if self.round else "choosing variants"
        return f"{where}: {', '.join(self._parts(str(self.entrant)))}"

    @property
    def folder(self) -> str:
        """Where its record is, below the comparison's folder."""
        where = f"round-{self.round}" if self.round else "pruning"
        return f"{where}/{'-'.join(self._parts(self.entrant.label))}"

    def _parts(self, entrant: str) -> list[str]:
        if self.load == "none":
            return ["finetuning-alone"]
        parts = [entrant, self.objective.label if self.objective else "", self.load if self.load == "half" else ""]
        return [part for part in parts if part]


class Results(Protocol):
    """What the runs that are complete have shown."""

    def run(self, planned: PlannedRun, slo: Slo) -> Run | None:
        """A run held against ``slo``; None if it is not complete."""


def planned_runs(
    settings: ComparisonSettings, variants: Sequence[Group], menu: Menu, results: Results
) -> Iterator[PlannedRun]:
    """All runs in order; ends early where the rest follows from a run that is not complete.

    Each run has to be complete before the next one is asked for, if the iteration is to go on to its end.
    """
    return chain.from_iterable(planned_batches(settings, variants, menu, results))


def planned_batches(
    settings: ComparisonSettings, variants: Sequence[Group], menu: Menu, results: Results
) -> Iterator[list[PlannedRun]]:
    """All runs in order, in batches whose runs do not wait for each other's results.

    Each batch has to be complete before the next one is asked for, if the iteration is to go on to its end.
    """
    first, seed = PlannedRun(1, SEPARATE), settings.run.workload.seed
    yield [first]
    alone = results.run(first, Slo())
    if alone is None:
        return
    objectives = settings.objectives(dict(alone.metrics))
    contested = [group for group in variants if len(group) > 1]
    chosen = [(group[0], wanted) for group in variants if len(group) == 1 for wanted in _wanted(group[0], objectives)]
    if contested:
        tried = [entrant for group in contested for entrant in group]
        pairs = [(entrant, wanted) for entrant in tried for wanted in _wanted(entrant, objectives)]
        pruning = [PlannedRun(PRUNING, entrant, wanted) for entrant, wanted in [(SEPARATE, None), *pairs]]
        yield _shuffled(pruning, seed, PRUNING)
        for group in contested:
            best = [_best(group, objective, results) for objective in objectives]
            if None in best:
                return
            chosen += dict.fromkeys(pair for pair in best if pair is not None)
    rounds: list[PlannedRun] = []
    for number in range(1, settings.rounds + 1):
        runs = [PlannedRun(number, entrant, wanted) for entrant, wanted in [(SEPARATE, None), *chosen]]
        if settings.dedicated:
            runs += [PlannedRun(number, entrant, wanted, "half") for entrant, wanted in chosen]
            runs.append(alone_run(number, menu))
        rounds += (run for run in _shuffled(runs, seed, number) if run != first)
    yield rounds


def alone_run(number: int, menu: Menu) -> PlannedRun:
    """Finetuning without any request: it then has the whole device."""
    params = (("share", str(menu.decode_alone)), ("work_conserving", True))
    return PlannedRun(number, Entrant("static", params, slo_aware=False), load="none")


def planned_s(settings: ComparisonSettings, planned: PlannedRun) -> float:
    """Seconds of workload in one run."""
    return settings.pruning_s if planned.round == PRUNING else settings.run.workload.duration_s


def expected_s(settings: ComparisonSettings, variants: Sequence[Group]) -> float:
    """Seconds of workload in all runs together, if each group with variants has one best."""
    slos = max(1, len(settings.slo_scales))
    runs = [slos if group[0].slo_aware else 1 for group in variants]
    contested = sum(count * len(group) for count, group in zip(runs, variants, strict=True) if len(group) > 1)
    a_round = 1 + sum(runs) + (1 + sum(runs) if settings.dedicated else 0)
    pruning_s = (1 + contested) * settings.pruning_s if contested else 0.0
    return settings.rounds * a_round * settings.run.workload.duration_s + pruning_s


def _wanted(entrant: Entrant, objectives: Sequence[Objective]) -> Sequence[Objective | None]:
    return objectives if entrant.slo_aware else (None,)


def _best(group: Group, objective: Objective, results: Results) -> tuple[Entrant, Objective | None] | None:
    """The variant that did best at an objective; None while a run is missing."""
    wanted = objective if group[0].slo_aware else None
    separate = results.run(PlannedRun(PRUNING, SEPARATE), objective.slo)
    runs = [results.run(PlannedRun(PRUNING, entrant, wanted), objective.slo) for entrant in group]
    if separate is None or None in runs:
        return None
    ranks = [rank(run, separate, objective.slo) for run in runs if run is not None]
    return group[ranks.index(max(ranks))], wanted


def _shuffled(runs: Sequence[PlannedRun], seed: int, number: int) -> list[PlannedRun]:
    return [runs[index] for index in np.random.default_rng((seed, number)).permutation(len(runs))]
