"""The rival with one stage: LightGBM from scratch on log latency, the share a feature like any other."""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np

from predictor.dataset import Dataset
from predictor.features import CORUN_TERMS, SOLO_TERMS, matrix
from predictor.latency_model import LatencyModel, Params
from predictor.trees import Trees

# More bins than the two-stage model's: here the trees alone have to follow the load.
BINS = {
    "batch": 32, "context_sum": 60, "prefill_tokens": 4, "admitted": 4, "finetune_share": 8, "microbatch_tokens": 4,
    "kept_layers": 4,
}  # fmt: skip


class OneStage(LatencyModel):
    """One ensemble over state, share and finetune shape; its base is the geometric mean of all gaps."""

    name: ClassVar[str] = "one-stage"

    @classmethod
    def fit(cls, data: Dataset, params: Params, seed: int) -> Self:
        """``params``: ``rounds``, ``leaves``, ``learning_rate``, ``leaf_points``."""
        log_gap = np.log(data.gap_ms)
        mean = float(np.average(log_gap, weights=data.weight))
        constant = np.exp(mean)
        rows = matrix(data, tuple(BINS))
        trees = Trees.fit(
            tuple(BINS),
            rows,
            log_gap - mean,
            data.weight,
            BINS,
            rounds=int(params.get("rounds", 200)),
            leaves=int(params.get("leaves", 15)),
            learning_rate=float(params.get("learning_rate", 0.1)),
            leaf_rows=max(1, round(params.get("leaf_points", 1.0) * len(data) / len(np.unique(data.point)))),
            l2=0.0,
            seed=seed,
        )
        alone = np.array([constant if name == "one" else 0.0 for name in SOLO_TERMS])
        beside = np.array([constant if name == "one" else 0.0 for name in CORUN_TERMS])
        return cls(alone, np.tile(beside, (len(data.menu.splits), 1)), trees, trees)
