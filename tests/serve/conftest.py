"""One server process for all tests of the package."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.server_process import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    if server.process.poll() is None:
        server.end()
