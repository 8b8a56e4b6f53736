"""A LightGBM ensemble of few cells: what it adds to a linear base, as a factor.

The ensemble is fitted to log(gap / base) with squared error, which is what LightGBM does with log(base)
as ``init_score``. Without a row of data for it, or with no rounds, the factor is 1 and the base speaks.

Trees are constant between their thresholds. Few bins per feature mean few thresholds, so a table over
the cells between all of them is the ensemble itself, not an approximation (``Trees.cells``).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from harli.types import HarliError
from predictor.base import Floats
from predictor.features import SHAPE

FREE = {"batch", *SHAPE}
"""Features that the factor may fall with: some batch sizes have slower kernels than larger ones."""
CELL_LIMIT = 4_000_000
CHUNK_ROWS = 200_000
"""Cells are computed in pieces, to bound the memory that takes."""


@dataclass(frozen=True)
class Cells:
    """An ensemble as a table."""

    features: tuple[str, ...]
    thresholds: tuple[tuple[float, ...], ...]
    """By feature, ascending; a value equal to one belongs to the cell below it."""
    strides: tuple[int, ...]
    """By feature: how far apart neighbouring cells stand in ``values``."""
    values: array[float]
    """The factor of every cell."""

    def factor(self, rows: Floats) -> Floats:
        """The ensemble's factor for feature rows [rows, features]."""
        cell = np.zeros(len(rows), dtype=np.int64)
        for column, thresholds, stride in zip(rows.T, self.thresholds, self.strides, strict=True):
            cell += stride * np.searchsorted(thresholds, column, side="left")
        return np.frombuffer(self.values)[cell]


@dataclass(frozen=True)
class Trees:
    """A fitted ensemble; ``text`` is LightGBM's own format."""

    features: tuple[str, ...]
    text: str
    booster: Any

    @classmethod
    def fit(
        cls,
        features: Sequence[str],
        rows: Floats,
        log_ratio: Floats,
        weight: Floats,
        bins: Mapping[str, int],
        *,
        rounds: int,
        leaves: int,
        learning_rate: float,
        leaf_rows: int,
        l2: float,
        seed: int,
    ) -> Self | None:
        """Fit log(gap / base). The factor never falls with a feature that is not in ``FREE``.

        ``bins`` limits each feature's distinct values. None without rounds or rows.
        """
        if not rounds or not len(rows):
            return None
        import lightgbm as lgb

        params = {
            "objective": "regression",
            "boost_from_average": False,
            "num_leaves": leaves,
            "learning_rate": learning_rate,
            "min_data_in_leaf": leaf_rows,
            "lambda_l2": l2,
            "max_bin_by_feature": [bins[name] for name in features],
            "monotone_constraints": [0 if name in FREE else 1 for name in features],
            "seed": seed,
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": 1,
            "verbosity": -1,
        }
        data = lgb.Dataset(rows, log_ratio, weight=weight, feature_name=list(features), params=params)
        return cls.from_text(lgb.train(params, data, num_boost_round=rounds).model_to_string())

    @classmethod
    def from_text(cls, text: str) -> Self:
        """An ensemble from LightGBM's format. Raises HarliError when it is not that."""
        import lightgbm as lgb

        try:
            booster = lgb.Booster(model_str=text)
        except lgb.basic.LightGBMError as error:
            raise HarliError(f"not a LightGBM model ({str(error).splitlines()[0]})") from error
        return cls(tuple(booster.feature_name()), text, booster)

    def factor(self, rows: Floats) -> Floats:
        """The ensemble's factor for feature rows [rows, features]."""
        if not len(rows):
            return np.zeros(0)
        return np.exp(np.asarray(self.booster.predict(rows, num_threads=1), dtype=np.float64))

    def importance(self) -> dict[str, float]:
        """What each feature's splits gained."""
        return dict(zip(self.features, self.booster.feature_importance("gain").tolist(), strict=True))

    def cells(self) -> Cells:
        """The same as a table. Raises HarliError when it would not fit into memory."""
        found: list[set[float]] = [set() for _ in self.features]
        for tree in self.booster.dump_model()["tree_info"]:
            _collect(tree["tree_structure"], found)
        thresholds = tuple(tuple(sorted(values)) for values in found)
        sizes = [len(values) + 1 for values in thresholds]
        count = int(np.prod(sizes))
        if count > CELL_LIMIT:
            raise HarliError(f"the model has {count} cells, the limit is {CELL_LIMIT}: train with fewer bins or shapes")
        strides = tuple(int(np.prod(sizes[place + 1 :])) for place in range(len(sizes)))
        # A cell's own value: its upper threshold, or something above the last one.
        inside = [np.array([*values, values[-1] + abs(values[-1]) + 1.0 if values else 0.0]) for values in thresholds]
        cell = np.arange(count)
        values = array("d")
        for start in range(0, count, CHUNK_ROWS):
            part = cell[start : start + CHUNK_ROWS]
            places = [part // stride % size for stride, size in zip(strides, sizes, strict=True)]
            rows = np.stack([column[place] for column, place in zip(inside, places, strict=True)], axis=1)
            values.frombytes(self.factor(rows).tobytes())
        return Cells(self.features, thresholds, strides, values)


def _collect(node: dict[str, Any], found: list[set[float]]) -> None:
    if "split_feature" in node:
        found[node["split_feature"]].add(float(node["threshold"]))
        for child in (node["left_child"], node["right_child"]):
            _collect(child, found)
