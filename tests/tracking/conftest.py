from __future__ import annotations

import pytest

from tests.records.builders import small_run


@pytest.fixture
def record(tmp_path):
    return small_run(tmp_path / "run one")


@pytest.fixture(scope="package")
def store_folder(tmp_path_factory):
    """Where the tests' MLflow lives; one for all of them, since making one takes a second."""
    return tmp_path_factory.mktemp("mlruns")


@pytest.fixture
def sqlite_uri(store_folder, monkeypatch):
    uri = f"sqlite:///{store_folder / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri
