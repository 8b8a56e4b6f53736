from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from harli.tracking.store import DEFAULTS, open_store, tracking_uri
from harli.types import HarliError


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What open_store sets for its process is gone after the test."""
    for name in DEFAULTS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def failure() -> str:
    with pytest.raises(HarliError) as raised:
        open_store("runs")
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_the_store_is_under_the_current_folder_unless_told(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking_uri() == f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    assert tracking_uri() == "http://mlflow.example"


def test_made_on_first_use_and_found_again(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store/mlflow.db")
    client, experiment_id = open_store("runs")
    assert open_store("runs")[1] == experiment_id
    assert open_store("models")[1] != experiment_id
    assert (tmp_path / "store" / "mlflow.db").is_file()
    assert client.get_experiment(experiment_id).artifact_location == (tmp_path / "store" / "artifacts").as_uri()
    assert "".join(capfd.readouterr()) == ""

    client.delete_experiment(experiment_id)
    assert failure().endswith(f"restore it with: mlflow experiments restore --experiment-id {experiment_id}")


def test_a_server_that_is_not_there(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
    message = failure()
    assert f"MLflow at http://127.0.0.1:{port} cannot be used" in message
    assert "Connection refused" in message
    assert "secret" not in message
    assert {name: os.environ[name] for name in DEFAULTS} == DEFAULTS


def test_a_server_that_does_not_answer_is_given_the_users_patience(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        assert "timed out" in failure()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"


@pytest.mark.parametrize("uri", ["sqlite:///{file}", "sqlite:///{file}/mlflow.db", "{file}", "carrier-pigeon://coop"])
def test_what_is_no_store(tmp_path, monkeypatch, uri):
    file: Path = tmp_path / "notes.txt"
    file.write_text("not a database\n" * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(file=file))
    assert "cannot be used (" in failure()
    assert file.read_text().startswith("not a database")
