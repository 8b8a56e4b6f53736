"""Publishing a training: its run with a nested one per trial, its figures and card, and the new version."""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harli
from harli.tracking.predictor_card import card
from harli.tracking.predictor_figures import figures
from harli.tracking.registry import ARTIFACT, MODEL, Registry
from harli.tracking.store import reporting_failures
from harli.types import HarliError
from predictor.artifact import Artifact
from predictor.contest import Champion, Verdict
from predictor.training import Rival, Trained

if TYPE_CHECKING:
    from mlflow import MlflowClient

FOLDER = "model"
"""Where the run's artifacts have the version's folder."""
GROUPS = "groups.json"
"""Ids of the groups that the version was fitted on, beside its artifact."""


def load_champion(registry: Registry) -> Champion | None:
    """The champion, if there is one. Raises HarliError when it is damaged."""
    champion = registry.champion()
    if champion is None:
        return None
    folder = registry.folder(champion.number)
    try:
        seen = json.loads((folder / GROUPS).read_text(encoding="utf-8"))
        return Champion(champion.number, Artifact.load(folder / ARTIFACT), frozenset(seen))
    except (HarliError, OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0].split(";")[0]
        raise HarliError(
            f"the champion, version {champion.number} of {MODEL}, cannot be read ({reason}); "
            "choose another with `harli predictors --promote N`, or delete the version in MLflow"
        ) from error


def metrics(trained: Trained, predict_p99_us: float) -> dict[str, float | None]:
    """The winner's numbers as ``predictor/...``; None where there is no data."""
    found = {f"predictor/{name}": value for name, value in trained.artifact.scores.items()}
    return {**found, "predictor/predict_p99_us": predict_p99_us}


def rival_metrics(rival: Rival) -> dict[str, Any]:
    """One row of the rivals' table, nested; None where there is no data."""
    values = asdict(rival.scores) | {
        "corun_difference": asdict(rival.corun_difference),
        "difference": asdict(rival.difference),
    }
    return {"model": rival.name, **_without_nan(values)}


def publish_training(
    client: MlflowClient,
    experiment_id: str,
    trained: Trained,
    verdict: Verdict,
    *,
    sources: Sequence[str],
    seed: int,
    predict_p99_us: float,
    began_ms: int,
) -> int:
    """Log the training, register what it made, and return the version's number.

    Raises HarliError when MLflow cannot be used; then neither run nor version is left.
    """
    facts = _facts(trained, sources, seed)
    drawn = figures(trained)
    run_ids: list[str] = []
    try:
        with reporting_failures():
            run = client.create_run(experiment_id, began_ms, run_name=f"{trained.artifact.model.name} {_utc(began_ms)}")
            run_ids.append(run.info.run_id)
            _log_trials(client, experiment_id, run_ids, trained)
            summary = metrics(trained, predict_p99_us)
            for rival in trained.rivals:
                summary[f"{rival.name}/solo_mape"] = rival.scores.solo.mape
                summary[f"{rival.name}/corun_mape"] = rival.scores.corun.mape
            params = {**facts, **{name: f"{value:.6g}" for name, value in trained.params.items()}}
            _log(client, run_ids[0], params, summary)
            for name, figure in drawn.items():
                client.log_figure(run_ids[0], figure, f"figures/{name}")
            client.log_text(run_ids[0], card(trained, verdict, sources, seed), "card.md")
            client.log_dict(run_ids[0], {"rivals": [rival_metrics(rival) for rival in trained.rivals]}, "rivals.json")
            with tempfile.TemporaryDirectory() as temporary:
                _write_model(Path(temporary), run_ids[0], trained)
                client.log_artifacts(run_ids[0], temporary, FOLDER)
            client.set_terminated(run_ids[0], "FINISHED")
        scores = {name: f"{value:.5g}" for name, value in trained.artifact.scores.items() if value is not None}
        tags = {**facts, **scores, "predict_p99_us": f"{predict_p99_us:.3g}", "reason": verdict.reason}
        return Registry(client).add(run_ids[0], f"{run.info.artifact_uri}/{FOLDER}", tags, champion=verdict.champion)
    except BaseException:
        with suppress(Exception):  # should MLflow be gone, runs without a version harm nobody
            for run_id in run_ids:
                client.delete_run(run_id)
        raise


def _facts(trained: Trained, sources: Sequence[str], seed: int) -> dict[str, str]:
    """What the predictor is for and where it comes from: parameters of the run, tags of the version."""
    artifact = trained.artifact
    identity = artifact.identity
    facts = {
        "kind": artifact.model.name,
        "model": identity["model"],
        "role": identity["role"],
        "menu": " ".join(identity["menu"]),
        "data": " ".join(sources),
        "data_sha256": artifact.data_sha256,
        "groups": len(trained.seen),
        "held_out": trained.held_out,
        "coverage": artifact.bounds.coverage,
        "seed": seed,
        "trials": len(trained.trials),
        "harli_revision": _revision(),
        **{f"device.{name}": value for name, value in identity["device"].items()},
        **{f"version.{name}": value for name, value in identity["versions"].items()},
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _write_model(folder: Path, run_id: str, trained: Trained) -> None:
    """An MLflow model folder whose one flavour is our own: text files, nothing pickled, no code."""
    from mlflow.models import Model

    trained.artifact.save(folder / ARTIFACT)
    (folder / GROUPS).write_text(json.dumps(sorted(trained.seen)) + "\n", encoding="utf-8")
    flavour = {"data": ARTIFACT, "loader": "predictor.artifact.Artifact.load"}
    Model(artifact_path=FOLDER, run_id=run_id, flavors={"harli": flavour}).save(str(folder / "MLmodel"))


def _log_trials(client: MlflowClient, experiment_id: str, run_ids: list[str], trained: Trained) -> None:
    for trial in trained.trials:
        tags = {"mlflow.parentRunId": run_ids[0], "pruned": str(trial.pruned).lower()}
        child = client.create_run(experiment_id, trial.began_ms, tags, run_name=f"trial {trial.number}")
        run_ids.append(child.info.run_id)
        params = {name: f"{value:.6g}" for name, value in trial.params.items()}
        _log(client, child.info.run_id, params, {"mape": trial.mape, "folds": trial.folds})
        client.set_terminated(child.info.run_id, "FINISHED", trial.ended_ms)


def _log(client: MlflowClient, run_id: str, params: Mapping[str, str], values: Mapping[str, float | None]) -> None:
    from mlflow.entities import Metric, Param

    now_ms = int(time.time() * 1000)
    found = [Metric(name, value, now_ms, 0) for name, value in values.items() if value is not None]
    client.log_batch(
        run_id, [metric for metric in found if math.isfinite(metric.value)], [Param(*pair) for pair in params.items()]
    )


def _revision() -> str:
    """The revision of Harli's source, with "-dirty" when it was changed; empty without a repository."""
    command = [
        "git",
        "-C",
        str(Path(harli.__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5.0).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _utc(time_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(time_ms / 1000))


def _without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_nan(value) if isinstance(value, Mapping) else None if math.isnan(value) else value
        for name, value in values.items()
    }
