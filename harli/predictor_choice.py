"""Finds the predictor of a run and makes sure that it was trained for what it is to predict."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harli.config import CHAMPION, EngineSettings, RunSettings
from harli.engine import device
from harli.records.schema import PredictorInfo
from harli.types import HarliError, Slo
from policies.base import NoPredictorError, PolicyContext
from policies.registry import make_policy


@dataclass(frozen=True)
class Chosen:
    """A predictor that a run uses; without a folder it uses none."""

    folder: Path | None = None
    info: PredictorInfo | None = None
    note: str = ""
    """Why a policy that can do without one has none."""


def identity(engine: EngineSettings) -> dict[str, Any]:
    """What a predictor has to have been trained for."""
    return {
        "model": engine.model,
        "role": engine.role,
        "menu": [str(share) for share in device.menu().shares],
        "device": device.describe(),
        "versions": device.versions(),
    }


def choose(settings: RunSettings, slo: Slo) -> Chosen:
    """The predictor of a run, after a trial of its policy. Raises HarliError for what the user can mend.

    The champion is taken if there is one. A policy that can do without is not kept from running by a
    champion of another model, device or menu; one that was asked for by name has to fit.
    """
    context = PolicyContext(device.menu(), slo, settings.workload.seed, None, settings.engine.max_num_seqs)
    missing: HarliError | None = None
    try:
        make_policy(settings.policy, settings.params, context)
    except NoPredictorError as error:
        missing = error
    optional = missing is None and settings.predictor == CHAMPION
    try:
        return _load(settings, context)
    except HarliError as error:
        if optional:
            return Chosen(note=f"runs without a predictor: {error}")
        raise


def _load(settings: RunSettings, context: PolicyContext) -> Chosen:
    from harli.tracking.registry import load_predictor_folder
    from predictor.artifact import Artifact
    from predictor.load import in_use

    folder = load_predictor_folder(settings.predictor).resolve()
    artifact = Artifact.load(folder)
    reasons = artifact.check(identity(settings.engine))
    if reasons and not settings.force_predictor:
        raise HarliError(
            f"the predictor {settings.predictor} is not for this run: {reasons[0]}; `harli profile --model "
            f"{settings.engine.model} --role {settings.engine.role}` and `harli train-predictor` make one that is; "
            "--force-predictor uses this one"
        )
    make_policy(settings.policy, settings.params, replace(context, predictor=in_use(artifact)))
    return Chosen(folder, PredictorInfo(source=settings.predictor, data_sha256=artifact.data_sha256))
