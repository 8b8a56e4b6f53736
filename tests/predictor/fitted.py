"""A fitted artifact of the builder's data."""

from __future__ import annotations

from harli.types import Menu
from predictor.artifact import Artifact
from predictor.bounds import Bounds
from predictor.latency_model import LatencyModel, Params
from predictor.two_stage import TwoStage
from tests.predictor.builders import MENU, synthetic

ROUGH = {f"{stage}_{name}": value for stage in ("solo", "corun") for name, value in
         (("rounds", 80), ("leaves", 8), ("leaf_points", 1.0), ("l2", 0.1))}  # fmt: skip
"""Parameters that make many cells."""


def artifact(model: type[LatencyModel] = TwoStage, params: Params = ROUGH, menu: Menu = MENU) -> Artifact:
    """Fitted to 120 points and calibrated on 60 others."""
    data, other = synthetic(120, 20, seed=1, menu=menu), synthetic(60, 20, seed=2, menu=menu)
    fitted = model.fit(data, params, 0)
    bounds = Bounds.calibrate(
        fitted.predict(other), other.gap_ms, fitted.predict_solo(other), other.group, 0.99, 0, split=~other.solo
    )
    return Artifact.of(fitted, bounds, data, {"corun_mape": 0.03})
