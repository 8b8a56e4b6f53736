"""Uploads: how many files there may be, how many come at once, and what is left of one that is refused."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from harli.serve import files as files_module
from harli.serve import files_api
from harli.serve.files import FileFolder
from harli.serve.store import Store
from tests.serve.routes import Client, kept
from tests.serve.server_process import sums

FORM = {"Content-Type": "multipart/form-data; boundary=b"}
BEGINNING = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'


def upload_at_once(client: Client, count: int) -> list[httpx.Response]:
    async def all_at_once() -> list[httpx.Response]:
        what: dict[str, Any] = {"files": {"file": ("data.jsonl", sums(10))}, "data": {"purpose": "fine-tune"}}
        return await asyncio.gather(*(client.ask("POST", "/v1/files", **what) for _ in range(count)))

    return asyncio.run(all_at_once())


def test_where_there_is_no_room_no_body_is_read(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    async def body() -> AsyncIterator[bytes]:
        read.append(BEGINNING)
        yield BEGINNING

    monkeypatch.setattr(files_module, "MAX_FILES", 0)
    answer = client("POST", "/v1/files", content=body(), headers=FORM)
    assert (answer.status_code, read) == (400, [])
    assert "delete some first" in answer.json()["detail"]


def test_uploads_that_come_together_do_not_pass_the_limit(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "MAX_FILES", 1)
    answers = upload_at_once(client, 4)
    assert sorted(answer.status_code for answer in answers) == [200, 400, 400, 400]
    assert len(kept(tmp_path)) == 1


def test_only_so_many_are_taken_at_once(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    present, most = 0, 0
    write = FileFolder._write

    def counted(folder: FileFolder, source: IO[bytes], id_: str, name: str) -> int:
        nonlocal present, most
        present += 1
        most = max(most, present)
        time.sleep(0.05)
        size = write(folder, source, id_, name)
        present -= 1
        return size

    monkeypatch.setattr(FileFolder, "_write", counted)
    assert {answer.status_code for answer in upload_at_once(client, 6)} == {200}
    assert most == files_api.UPLOADS


def test_an_upload_that_stalls_gives_its_place_up(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stalled() -> AsyncIterator[bytes]:
        yield BEGINNING
        await asyncio.sleep(60.0)

    monkeypatch.setattr(files_api, "STALL_S", 0.05)
    for _ in range(files_api.UPLOADS):
        assert client("POST", "/v1/files", content=stalled(), headers=FORM).status_code == 408
    assert client.upload(sums(10)).status_code == 200


def test_a_file_whose_row_is_refused_is_not_kept(
    client: Client, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(store, "add_file", refuse)
    with pytest.raises(sqlite3.OperationalError):
        client.upload(sums(10))
    assert kept(tmp_path) == []
