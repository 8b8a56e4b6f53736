"""``/v1/files``, after OpenAI's API."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import FileResponse
from starlette.datastructures import UploadFile
from starlette.types import Message

from harli.serve.files import FileFolder
from harli.serve.http import bad_request, limited_form, page
from harli.serve.objects import File
from harli.serve.store import Store

PURPOSE = "fine-tune"
UPLOADS = 2
"""At once: each lies on disk twice meanwhile. Others wait before their bodies are read."""
STALL_S = 60.0
"""An upload of which nothing more arrives for this long gives its place up."""


def files_router(files: FileFolder, store: Store, max_bytes: int) -> APIRouter:
    """``max_bytes``: the longest body of an upload."""
    router = APIRouter(prefix="/v1/files")
    places = asyncio.Semaphore(UPLOADS)

    def known(id_: str) -> File:
        if (file := store.file(id_)) is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, f"no file {id_!r}")
        return file

    @router.post("")
    async def upload(request: Request) -> dict[str, Any]:
        with bad_request():
            files.check_room()
        async with places, limited_form(_steady(request), max_bytes) as form:
            sent, purpose = form.get("file"), form.get("purpose")
            if purpose != PURPOSE:
                raise HTTPException(HTTPStatus.BAD_REQUEST, f"purpose must be {PURPOSE!r}, not {purpose!r}")
            if not isinstance(sent, UploadFile):
                raise HTTPException(HTTPStatus.BAD_REQUEST, "the form has no file called 'file'")
            with bad_request():
                return (await files.add(sent)).describe()

    @router.get("")
    async def list_files(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str = PURPOSE,
    ) -> dict[str, Any]:
        if purpose != PURPOSE:
            return page([], limit)
        try:
            return page(store.files(after, limit + 1, oldest_first=order == "asc"), limit)
        except KeyError:
            raise HTTPException(HTTPStatus.NOT_FOUND, f"no file {after!r}") from None

    @router.get("/{id_}")
    async def retrieve(id_: str) -> dict[str, Any]:
        return known(id_).describe()

    @router.get("/{id_}/content")
    async def content(id_: str) -> FileResponse:
        return FileResponse(files.path(known(id_).id), media_type="application/jsonl")

    @router.delete("/{id_}")
    async def delete(id_: str) -> dict[str, Any]:
        files.delete(known(id_).id)
        return {"id": id_, "object": "file", "deleted": True}

    return router


def _steady(request: Request) -> Request:
    """The same request; status 408 when nothing of its body arrives for ``STALL_S``."""

    async def receive() -> Message:
        try:
            async with asyncio.timeout(STALL_S):
                return await request.receive()
        except TimeoutError:
            raise HTTPException(
                HTTPStatus.REQUEST_TIMEOUT, f"nothing of the file arrived for {STALL_S:.0f} s"
            ) from None

    return Request(request.scope, receive)
