"""From a trained predictor's folder to what a scheduler asks."""

from __future__ import annotations

from pathlib import Path

from predictor.artifact import Artifact
from predictor.base import Predictor
from predictor.correction import CorrectedPredictor
from predictor.table import TablePredictor


def load_predictor(folder: Path) -> Predictor:
    """The predictor in ``folder``, which corrects itself as it is used. Raises HarliError when it is damaged."""
    return in_use(Artifact.load(folder))


def in_use(artifact: Artifact) -> Predictor:
    """A loaded predictor for one run."""
    return CorrectedPredictor(TablePredictor(artifact), artifact.bounds.coverage)
