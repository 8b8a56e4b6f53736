"""Publishing a profile to MLflow: a run whose input is a dataset."""

from __future__ import annotations

import hashlib
import json
import shlex
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING

from harli.records.profile import PROFILE_FILE, PROFILE_STEPS, SEGMENTS, UNITS, Profile
from harli.tracking.store import open_store, reporting_failures
from harli.types import HarliError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

EXPERIMENT = "harli profiles"
PROFILE_ID = "harli.profile_id"
FILES = (PROFILE_FILE, PROFILE_STEPS.file, SEGMENTS.file, UNITS.file)


def publish_profile(profile: Profile, figure: Figure) -> str:
    """Publish ``profile`` and return the id of its MLflow run; one published before is replaced.

    Raises HarliError when MLflow cannot be used; no half run is left.
    """
    try:
        client, experiment_id = open_store(EXPERIMENT)
        with reporting_failures():
            for run in client.search_runs([experiment_id], f"tags.`{PROFILE_ID}` = '{profile.info.profile_id}'"):
                client.delete_run(run.info.run_id)
            return _publish(client, experiment_id, profile, figure)
    except HarliError as error:
        folder = shlex.quote(str(profile.folder))
        raise HarliError(f"{error}; the profile is kept in {folder}") from error


def _publish(client: MlflowClient, experiment_id: str, profile: Profile, figure: Figure) -> str:
    from mlflow.entities import Metric, Param

    info = profile.info
    start_ms = int(datetime.fromisoformat(info.started_at).timestamp() * 1000)
    tags = {PROFILE_ID: info.profile_id} | {f"version.{name}": version for name, version in info.versions.items()}
    params = {
        "model": info.model,
        "role": info.role,
        "menu": " ".join(info.menu),
        "seed": info.plan["seed"],
        "budget_s": info.plan["budget_s"],
        **{f"device.{name}": value for name, value in info.device.items()},
    }
    run_id: str = client.create_run(experiment_id, start_ms, tags, run_name=profile.folder.resolve().name).info.run_id
    try:
        metrics = [Metric(name, value, start_ms, 0) for name, value in info.summary.items() if value is not None]
        client.log_batch(run_id, metrics, [Param(name, str(value)) for name, value in params.items()])
        client.log_inputs(run_id, [_dataset(profile)])
        client.log_figure(run_id, figure, "profile.png")
        for name in FILES:
            client.log_artifact(run_id, str(profile.folder / name), "profile")
        client.set_terminated(run_id, end_time=start_ms + int(info.duration_s * 1000))
    except BaseException:
        with suppress(Exception):
            client.delete_run(run_id)
        raise
    return run_id


def _dataset(profile: Profile) -> object:
    """The steps as MLflow knows datasets: name, digest, schema and size."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    digest = hashlib.sha256((profile.folder / PROFILE_STEPS.file).read_bytes()).hexdigest()[:16]
    columns = [{"name": field.name, "type": str(field.type)} for field in profile.steps.schema]
    source = {"uri": str(profile.folder.resolve() / PROFILE_STEPS.file)}
    dataset = Dataset(
        name=profile.folder.resolve().name,
        digest=digest,
        source_type="local",
        source=json.dumps(source),
        schema=json.dumps({"mlflow_colspec": columns}),
        profile=json.dumps({"num_rows": len(profile.steps)}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "profile")])
