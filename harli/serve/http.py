"""What the routes share: errors as HTTP statuses, pages, bodies of limited size."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from http import HTTPStatus
from typing import Any, Protocol

from fastapi import HTTPException, Request
from starlette.datastructures import FormData
from starlette.types import Message

from harli.types import HarliError

MAX_FIELDS = 8


class Described(Protocol):
    """Something that OpenAI's API has an object for."""

    @property
    def id(self) -> str: ...

    def describe(self) -> dict[str, Any]: ...


@contextmanager
def bad_request() -> Iterator[None]:
    """Inside, a HarliError becomes status 400 with its line."""
    try:
        yield
    except HarliError as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from error


def page(items: Sequence[Described], limit: int) -> dict[str, Any]:
    """A page of OpenAI's lists; ``items`` has one more than ``limit`` where more follow."""
    shown = [item.describe() for item in items[:limit]]
    ids = [item.id for item in items[:limit]]
    return {
        "object": "list",
        "data": shown,
        "has_more": len(items) > limit,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
    }


@asynccontextmanager
async def limited_form(request: Request, max_bytes: int) -> AsyncIterator[FormData]:
    """The form of a request with at most one file; status 413 as soon as the body is longer than ``max_bytes``."""
    seen = 0

    async def receive() -> Message:
        nonlocal seen
        message = await request.receive()
        seen += len(message.get("body", b""))
        if seen > max_bytes:
            raise HTTPException(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the file is larger than {max_bytes >> 20} MiB; split it"
            )
        return message

    async with Request(request.scope, receive).form(max_files=1, max_fields=MAX_FIELDS) as form:
        yield form
