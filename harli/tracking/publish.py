"""Publishing a run's record to MLflow."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

from harli.records.reader import Record
from harli.records.schema import RECORD_FILES, RunInfo
from harli.tracking.course import Course, course
from harli.tracking.figures import timeline
from harli.tracking.store import open_store, reporting_failures
from harli.types import HarliError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

EXPERIMENT = "harli policy runs"

# Tags: a run that has the first but not the second was not published to its end.
RUN_ID = "harli.run_id"
STATUS = "harli.status"
PARENT = "mlflow.parentRunId"

MLFLOW_STATUS = {"running": "RUNNING", "finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}

# MLflow's limits for one call of log_batch.
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100


def publish(record: Record) -> str:
    """``publish_run`` of a record by itself; an error also says how to publish it later."""
    try:
        return publish_run(record)
    except HarliError as error:
        folder = shlex.quote(str(record.folder))
        raise HarliError(f"{error}; the record is kept, publish it later with: harli publish {folder}") from error


def publish_run(record: Record, parent: str | None = None) -> str:
    """Publish ``record`` as an MLflow run, nested in the run ``parent`` if there is one, and return the run's id.

    A record that was published before keeps its run, unless it has ended since; it then gets a new
    one in place of the old. Raises HarliError when MLflow cannot be used; no half run is left.
    """
    client, experiment_id = open_store(EXPERIMENT)
    return _published(client, experiment_id, record.info) or _new_run(client, experiment_id, record, parent)


@reporting_failures()
def _published(client: MlflowClient, experiment_id: str, info: RunInfo) -> str | None:
    """The run that holds this record as it is now; one that does not is deleted."""
    for run in client.search_runs([experiment_id], filter_string=f"tags.`{RUN_ID}` = '{info.run_id}'"):
        if run.data.tags.get(STATUS) == info.status:
            return str(run.info.run_id)
        client.delete_run(run.info.run_id)
    return None


def _new_run(client: MlflowClient, experiment_id: str, record: Record, parent: str | None) -> str:
    info = record.info
    start_ms = int(datetime.fromisoformat(info.started_at).timestamp() * 1000)
    end_ms = start_ms + int(info.duration_s * 1000)
    tags = {RUN_ID: info.run_id, "simulated": str(info.simulated).lower()}
    tags |= {f"version.{name}": version for name, version in info.versions.items()}
    tags |= {PARENT: parent} if parent else {}
    metrics = [*_summary(info, end_ms), *_series(course(record), start_ms)]
    figure = timeline(record)
    name = info.name if parent else info.policy
    name += " (simulated)" if info.simulated else ""
    with reporting_failures():
        run_id: str = client.create_run(experiment_id, start_ms, tags, run_name=name).info.run_id
        try:
            _log(client, run_id, _params(info), metrics)
            client.log_figure(run_id, figure, "timeline.png")
            for name in RECORD_FILES:
                client.log_artifact(run_id, str(record.folder / name), "record")
            client.set_tag(run_id, STATUS, info.status)
            client.set_terminated(run_id, MLFLOW_STATUS[info.status], end_ms)
        except BaseException:
            with suppress(Exception):  # should MLflow be gone, a later publish deletes it
                client.delete_run(run_id)
            raise
    return run_id


def _log(client: MlflowClient, run_id: str, params: dict[str, str], metrics: list[Metric]) -> None:
    from mlflow.entities import Param

    all_params = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(all_params), PARAMS_PER_BATCH):
        client.log_batch(run_id, params=all_params[start : start + PARAMS_PER_BATCH])
    for start in range(0, len(metrics), METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_BATCH])


def _params(info: RunInfo) -> dict[str, str]:
    """What the run was given, flat: its settings, and what came of them."""
    settings = {name: value for name, value in info.settings.items() if name != "params"}
    resolved = {
        "policy": info.policy_params,
        "model": info.model,
        "role": info.role,
        "slo": asdict(info.slo),
        "menu": info.menu,
        "device": info.device,
        "finetune.state": info.finetune.state,
    }
    return {**dict(_flat(settings)), **dict(_flat(resolved)), "policy": info.policy}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as ``outer.inner`` and text; what is None or empty is left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield from _flat({name: " ".join(map(str, value))}, prefix)
        elif value is not None and value != "":
            yield f"{prefix}{name}", str(value)


def _summary(info: RunInfo, time_ms: int) -> list[Metric]:
    from mlflow.entities import Metric

    memory = {f"memory/borrowed_{name}": float(count) for name, count in info.finetune.memory.items()}
    values = info.summary | memory
    return [Metric(name, value, time_ms, step=0) for name, value in values.items() if value is not None]


def _series(run: Course, start_ms: int) -> list[Metric]:
    """One series per chart, over milliseconds since the run began."""
    from mlflow.entities import Metric

    steps = [int(time_s * 1000) for time_s in run.time_s]
    return [
        Metric(f"series/{field.name}", float(value), start_ms + step, step)
        for field in fields(run)
        if field.name != "time_s"
        for step, value in zip(steps, getattr(run, field.name), strict=True)
        if math.isfinite(value)
    ]
