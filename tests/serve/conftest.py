"""One server process for all tests of the package; the routes and their store without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harli.serve.store import Store
from tests.serve.routes import Client, routes
from tests.serve.server_process import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    if server.process.poll() is None:
        server.end()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "jobs.sqlite")
    yield store
    store.close()


@pytest.fixture
def client(tmp_path: Path, store: Store) -> Client:
    return Client(routes(store, tmp_path))
