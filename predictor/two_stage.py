"""The candidate: decode alone first, then its slowdown beside finetuning; LightGBM over a linear base in both.

The first stage predicts the gap of decode alone from the state. The second takes that prediction, the
state, the share and the finetune shape. Its base is linear in the predicted solo gap (the slowdown
proper) and in the state, per split, and its trees learn the log residual over that base. Written that
way, and not as slowdown times solo gap, the slowdown may shrink as contexts grow while the gap beside
finetuning still never falls (see ``predictor.latency_model``). With no trees it is a linear model per
share, so it needs no more data than that, and outside the data it goes on linearly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from predictor.base import Floats
from predictor.base_fit import corun_base, solo_base
from predictor.dataset import Dataset
from predictor.features import matrix
from predictor.latency_model import LatencyModel, Params
from predictor.trees import Trees

if TYPE_CHECKING:
    from optuna import Trial

SOLO_BINS = {"batch": 32, "context_sum": 16, "context_max": 8, "prefill_tokens": 4, "admitted": 4}
CORUN_BINS = {
    "solo_ms": 16, "batch": 16, "context_sum": 8, "admitted": 3, "finetune_share": 8, "microbatch_tokens": 4,
    "kept_layers": 4,
}  # fmt: skip
"""Distinct values that the trees tell apart: at most 65,536 states alone, 6,144 beside per share and shape."""

DEFAULTS = {
    "solo_rounds": 60, "solo_leaves": 4, "solo_learning_rate": 0.1, "solo_leaf_points": 5.0, "solo_l2": 5.0,
    "corun_rounds": 60, "corun_leaves": 4, "corun_learning_rate": 0.1, "corun_leaf_points": 5.0, "corun_l2": 5.0,
}  # fmt: skip


class TwoStage(LatencyModel):
    """Two stages, each a linear base and trees; parameters as in ``DEFAULTS``."""

    name: ClassVar[str] = "two-stage"

    @classmethod
    def fit(cls, data: Dataset, params: Params, seed: int) -> Self:
        """Fit both stages. ``{stage}_leaf_points`` is the fewest operating points that a leaf may stand on."""
        alone, beside = data.take(data.solo), data.take(~data.solo)
        model = cls(solo_base(data), np.zeros((0, 0)))
        trees = _trees("solo", alone, model.predict_solo(alone), SOLO_BINS, params, seed)
        model = replace(model, solo_trees=trees)
        model = replace(model, corun_base=corun_base(data, model.predict_solo(data)))
        solo_ms = model.predict_solo(beside)
        trees = _trees("corun", beside, model.corun_line(beside, solo_ms), CORUN_BINS, params, seed, solo_ms)
        return replace(model, corun_trees=trees)

    @staticmethod
    def space(trial: Trial) -> dict[str, float | int]:
        """Optuna's search space."""
        found: dict[str, float | int] = {}
        for stage in ("solo", "corun"):
            found[f"{stage}_rounds"] = trial.suggest_int(f"{stage}_rounds", 0, 200, step=20)
            found[f"{stage}_leaves"] = trial.suggest_int(f"{stage}_leaves", 2, 12)
            found[f"{stage}_learning_rate"] = trial.suggest_float(f"{stage}_learning_rate", 0.02, 0.2, log=True)
            found[f"{stage}_leaf_points"] = trial.suggest_float(f"{stage}_leaf_points", 1.0, 12.0, log=True)
            found[f"{stage}_l2"] = trial.suggest_float(f"{stage}_l2", 0.1, 100.0, log=True)
        return found


def _trees(
    stage: str,
    rows: Dataset,
    base_ms: Floats,
    bins: dict[str, int],
    params: Params,
    seed: int,
    solo_ms: Floats | None = None,
) -> Trees | None:
    """Trees for log(gap / base) of ``rows``, with the parameters that begin with ``stage``."""
    values = {**DEFAULTS, **params}
    points = max(1, len(np.unique(rows.point)))
    return Trees.fit(
        tuple(bins),
        matrix(rows, tuple(bins), solo_ms),
        np.log(rows.gap_ms / base_ms),
        rows.weight,
        bins,
        rounds=int(values[f"{stage}_rounds"]),
        leaves=int(values[f"{stage}_leaves"]),
        learning_rate=float(values[f"{stage}_learning_rate"]),
        leaf_rows=max(1, round(values[f"{stage}_leaf_points"] * len(rows) / points)),
        l2=float(values[f"{stage}_l2"]),
        seed=seed,
    )
