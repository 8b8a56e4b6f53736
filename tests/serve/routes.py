"""The routes of files and jobs in the tests' own process, without an engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from harli.serve.files import FileFolder
from harli.serve.files_api import files_router
from harli.serve.jobs_api import jobs_router
from harli.serve.store import Store
from tests.serve.server_process import sums

MAX_BYTES = 64 << 10


class Client:
    """Calls the routes in this thread, which the store belongs to."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def __call__(self, method: str, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self.ask(method, path, **options))

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self._app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path, **options)

    def upload(self, content: bytes, name: str = "data.jsonl", purpose: str = "fine-tune") -> httpx.Response:
        return self("POST", "/v1/files", files={"file": (name, content)}, data={"purpose": purpose})

    def create(self, **change: Any) -> httpx.Response:
        body = {"model": "tiny", "training_file": self.upload(sums(10)).json()["id"]} | change
        return self("POST", "/v1/fine_tuning/jobs", json=body)


def routes(store: Store, folder: Path) -> FastAPI:
    """``folder``: of files and jobs."""
    app = FastAPI()
    app.include_router(files_router(FileFolder(folder / "files", store), store, MAX_BYTES))
    app.include_router(jobs_router(store, folder / "jobs", "tiny", 16))
    return app


def kept(folder: Path) -> list[str]:
    """Names of what lies in the folder of files."""
    return sorted(path.name for path in (folder / "files").iterdir())
