"""Where MLflow lives, and reaching it.

``MLFLOW_TRACKING_URI`` says where. Without it, a SQLite file ``mlruns/mlflow.db`` under the current
folder, made on first use. A SQLite store has its artifacts beside the file, under ``artifacts``;
any other store decides that itself.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from harli.types import HarliError

if TYPE_CHECKING:
    from mlflow import MlflowClient

# For this process, where the user has set nothing. MLflow's own defaults wait for minutes, print, and report home.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

# They tell of every table that a new store gets.
CHATTY_LOGGERS = ("alembic", "mlflow.store.db.utils")


def tracking_uri() -> str:
    """``MLFLOW_TRACKING_URI``, or the SQLite file under the current folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlruns' / 'mlflow.db'}"


def open_store(experiment: str) -> tuple[MlflowClient, str]:
    """A client of MLflow and the id of ``experiment``; both the store and the experiment are made on first use.

    Raises HarliError when MLflow does not answer within seconds.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri()
    with reporting_failures():
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return client, client.create_experiment(experiment, artifact_location=_artifact_location(uri))
    if found.lifecycle_stage == "deleted":
        raise HarliError(
            f"MLflow's experiment {experiment!r} is deleted; restore it with: "
            f"mlflow experiments restore --experiment-id {found.experiment_id}"
        )
    return client, found.experiment_id


@contextmanager
def reporting_failures() -> Iterator[None]:
    """Turns whatever MLflow raises into a HarliError of one line."""
    try:
        yield
    except Exception as error:  # MLflow lets through what its databases and transports raise
        uri = _without_password(tracking_uri())
        raise HarliError(f"MLflow at {uri} cannot be used ({_reason(error)})") from error


def _artifact_location(uri: str) -> str | None:
    from sqlalchemy.engine import make_url

    if not uri.startswith("sqlite:"):
        return None
    database = make_url(uri).database
    return (Path(database).resolve().parent / "artifacts").as_uri() if database else None


def _reason(error: BaseException) -> str:
    """The system's own words where a system call failed ("Connection refused"), else the first line of the message."""
    root = error
    while (cause := root.__cause__ or root.__context__) is not None:
        root = cause
    message = str((root.strerror or root) if isinstance(root, OSError) else error).strip().splitlines()
    return _without_password(message[0]) if message else type(error).__name__


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]+@", "//", text)
