"""One server for all faults; a test that ends it leaves the next one to start it again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.server_process import Server

INJECT = Path(__file__).with_name("inject")


@pytest.fixture(scope="session")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("chaos")
    faults = folder / "faults"
    faults.mkdir()
    server = Server(folder, environment={"PYTHONPATH": str(INJECT), "HARLI_FAULTS": str(faults)})
    yield server
    if server.process.poll() is None:
        server.end()


@pytest.fixture
def server(process: Server) -> Server:
    if process.process.poll() is not None:
        process.start()
    return process
