"""Upper bounds: a factor on the predicted gap, calibrated on groups that the model has not seen.

Split conformal prediction on the ratio actual / predicted, apart for decode alone and for splits, and
within those by the predicted solo gap (Mondrian: Vovk, Gammerman and Shafer, "Algorithmic Learning in a
Random World", 2005, section 4.5). Rows of one group resemble each other, whatever their operating point, so
what matters is how many groups there are: a factor is chosen such that the coverage of a group, averaged over
groups of equal say, reaches the target (Dunn, Wasserman and Ramdas, "Distribution-Free Prediction Sets for
Two-Layer Hierarchical Models", 2023). Their exact guarantee for a new group needs 1 / (1 - coverage)
groups, 100 for 99%, which a bucket seldom has. Instead the groups are drawn again many times, and the
factor is what suffices in ``CONFIDENCE`` of the draws: an approximate guarantee, and one for states like
those profiled. No factor is below the row-wise conformal quantile of its bucket.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from harli.types import HarliError
from predictor.base import Floats

MAX_BUCKETS = 4
BUCKET_GROUPS = 12
BUCKET_ROWS = 1000
"""A bucket stands on at least this many groups and rows; with fewer there are fewer buckets."""
LEAST_GROUPS = 4
"""Groups below which there is nothing to calibrate on: what five leave when one is held out."""
DRAWS = 200
CONFIDENCE = 0.9


@dataclass(frozen=True)
class Bounds:
    """Factors by load; ``*_edges`` are solo gaps in ms that divide the buckets, one fewer than factors."""

    coverage: float
    solo_edges: tuple[float, ...]
    solo_factors: tuple[float, ...]
    split_edges: tuple[float, ...]
    split_factors: tuple[float, ...]

    @classmethod
    def calibrate(
        cls,
        predicted: Floats,
        actual: Floats,
        load: Floats,
        group: NDArray[np.int64],
        coverage: float,
        seed: int,
        *,
        split: NDArray[np.bool_],
    ) -> Self:
        """Calibrate on held-out rows: gaps in ms, ``load`` the predicted solo gap, ``split`` beside finetuning.

        A side of fewer than ``LEAST_GROUPS`` groups has the factor of both together. Raises HarliError when
        all rows together are of fewer.
        """
        if not 0.5 <= coverage < 1.0:
            raise HarliError(f"the coverage must be from 0.5 to below 1, not {coverage}")
        if (count := len(np.unique(group))) < LEAST_GROUPS:
            raise HarliError(f"{count} groups of steps are too few to calibrate a bound: {LEAST_GROUPS} are needed")
        ratio = actual / predicted
        rng = np.random.default_rng(seed)
        sides = []
        for side in (~split, split):
            chosen = side if len(np.unique(group[side])) >= LEAST_GROUPS else np.ones(len(side), dtype=bool)
            sides.append(_buckets(ratio[chosen], load[chosen], group[chosen], coverage, rng))
        return cls(coverage, *sides[0], *sides[1])

    def factor(self, load: Floats, split: NDArray[np.bool_]) -> Floats:
        """bound / predicted, at least 1, for predicted solo gaps in ms [rows]."""
        alone = np.array(self.solo_factors)[np.searchsorted(self.solo_edges, load, side="right")]
        beside = np.array(self.split_factors)[np.searchsorted(self.split_edges, load, side="right")]
        return np.where(split, beside, alone)


def _buckets(
    ratio: Floats, load: Floats, group: NDArray[np.int64], coverage: float, rng: np.random.Generator
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Edges and factors. Edges are quantiles over groups, so that buckets have equally many of them."""
    groups, index = np.unique(group, return_inverse=True)
    centre = np.bincount(index, load) / np.bincount(index)
    count = max(1, min(MAX_BUCKETS, len(groups) // BUCKET_GROUPS, len(ratio) // BUCKET_ROWS))
    edges = np.unique(np.quantile(centre, np.arange(1, count) / count))
    bucket = np.searchsorted(edges, load, side="right")
    pooled = _factor(ratio, index, coverage, rng)
    factors = []
    for number in range(len(edges) + 1):
        chosen = bucket == number
        enough = len(np.unique(index[chosen])) >= LEAST_GROUPS and chosen.sum() >= BUCKET_ROWS // 2
        factors.append(_factor(ratio[chosen], index[chosen], coverage, rng) if enough else pooled)
    return tuple(edges.tolist()), tuple(factors)


def _factor(ratio: Floats, group: NDArray[np.int64], coverage: float, rng: np.random.Generator) -> float:
    order = np.argsort(ratio)
    ratio, index = ratio[order], np.unique(group[order], return_inverse=True)[1]
    rows = np.bincount(index)
    row_wise = ratio[min(len(ratio), math.ceil((len(ratio) + 1) * coverage)) - 1]
    draws = rng.multinomial(len(rows), np.full(len(rows), 1.0 / len(rows)), DRAWS)
    needed = np.empty(DRAWS)
    for number, times in enumerate(draws):
        covered = np.cumsum((times / rows)[index])
        needed[number] = ratio[min(len(ratio) - 1, np.searchsorted(covered, coverage * covered[-1]))]
    return float(max(1.0, row_wise, np.quantile(needed, CONFIDENCE)))
