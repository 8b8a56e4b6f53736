"""The form that every latency model here has, the candidate and its rivals: two bases and what trees add.

    solo(state)         = solo_base . terms(state) * solo_trees(state)
    corun(state, share) = corun_base[share] . terms(solo, state) * corun_trees(solo, state, share, shape)
    gap                 = solo for decode alone, max(solo, corun) beside finetuning

in ms. All base coefficients are at least 0, and no tree's factor falls with contexts, prefill or
admissions, so a gap never does; the slowdown, gap / solo, is at least 1. Batch size is free: a matrix
product of two rows may take longer than one of three (oneDNN on two cores, by 10%), and a model that
denies it is 3 points of MAPE worse there. One form means one file format and one fast path for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from predictor.base import Floats
from predictor.dataset import Dataset
from predictor.features import CORUN_TERMS, SOLO_TERMS, matrix
from predictor.trees import Cells, Trees

Params = Mapping[str, float | int]

LEAST_MS = 1e-3
"""Gaps below this are not predicted: a base may be 0 in a state far from any that was seen."""


@dataclass(frozen=True)
class LatencyModel(ABC):
    """A fitted model."""

    name: ClassVar[str]

    solo_base: Floats
    """[SOLO_TERMS], ms per term."""
    corun_base: Floats
    """[splits, CORUN_TERMS], in the order of ``menu.splits``."""
    solo_trees: Trees | Cells | None = None
    corun_trees: Trees | Cells | None = None

    @classmethod
    @abstractmethod
    def fit(cls, data: Dataset, params: Params, seed: int) -> Self:
        """Fit to ``data``, which has passed ``check_trainable``. Same data, parameters and seed: same model."""

    def predict_solo(self, data: Dataset) -> Floats:
        """The gap of every row's state if decode had the device alone, in ms [rows]."""
        base_ms = self.solo_line(data)
        if self.solo_trees is None:
            return base_ms
        factor = self.solo_trees.factor(matrix(data, self.solo_trees.features, alone=True))
        return np.asarray(base_ms * factor)

    def predict(self, data: Dataset) -> Floats:
        """The gap of every row at its own share, in ms [rows]."""
        solo_ms = self.predict_solo(data)
        places = np.flatnonzero(~data.solo)
        rows, beside_ms = data.take(places), solo_ms[places]
        corun_ms = self.corun_line(rows, beside_ms)
        if self.corun_trees is not None:
            corun_ms *= self.corun_trees.factor(matrix(rows, self.corun_trees.features, beside_ms))
        gap_ms = solo_ms.copy()
        gap_ms[places] = np.maximum(beside_ms, corun_ms)
        return gap_ms

    def solo_line(self, rows: Dataset) -> Floats:
        """The base of decode alone, in ms [rows]."""
        return np.asarray(np.maximum(LEAST_MS, matrix(rows, SOLO_TERMS) @ self.solo_base))

    def corun_line(self, rows: Dataset, solo_ms: Floats) -> Floats:
        """The bases of rows beside finetuning, in ms [rows]."""
        terms = matrix(rows, CORUN_TERMS, solo_ms) * self.corun_base[rows.share - 1]
        return np.asarray(np.maximum(LEAST_MS, terms.sum(axis=1)))

    def compiled(self) -> Self:
        """The same model with tables for trees. Raises HarliError as ``Trees.cells`` does."""
        solo, corun = (trees.cells() if isinstance(trees, Trees) else trees for trees in self.trees)
        return replace(self, solo_trees=solo, corun_trees=corun)

    @property
    def trees(self) -> tuple[Trees | Cells | None, Trees | Cells | None]:
        """Of decode alone, and beside finetuning."""
        return self.solo_trees, self.corun_trees
