"""``/v1/files``, after OpenAI's API."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import FileResponse
from starlette.datastructures import UploadFile

from harli.serve.files import FileFolder
from harli.serve.http import bad_request, limited_form, page
from harli.serve.rows import File
from harli.serve.store import Store

PURPOSE = "fine-tune"


def files_router(files: FileFolder, store: Store, max_bytes: int) -> APIRouter:
    """``max_bytes``: the longest body of an upload."""
    router = APIRouter(prefix="/v1/files")

    def known(id_: str) -> File:
        if (file := store.file(id_)) is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, f"no file {id_!r}")
        return file

    @router.post("")
    async def upload(request: Request) -> dict[str, Any]:
        async with limited_form(request, max_bytes) as form:
            sent, purpose = form.get("file"), form.get("purpose")
            if purpose != PURPOSE:
                raise HTTPException(HTTPStatus.BAD_REQUEST, f"purpose must be {PURPOSE!r}, not {purpose!r}")
            if not isinstance(sent, UploadFile):
                raise HTTPException(HTTPStatus.BAD_REQUEST, "the form has no file called 'file'")
            with bad_request():
                return (await files.add(sent)).describe()

    @router.get("")
    async def list_files(
        after: str | None = None, limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000
    ) -> dict[str, Any]:
        return page(store.files(after, limit + 1), limit)

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
