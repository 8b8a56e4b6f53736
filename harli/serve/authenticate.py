"""API keys: every route but those that probe the server wants one, if there are any."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

OPEN = frozenset({"/harli/health", "/health", "/metrics", "/ping"})
"""What monitoring asks for. Of users, vLLM's metrics name the adapters that are in use."""


class RequireKey:
    """ASGI middleware: 401 without ``Authorization: Bearer KEY``.

    vLLM's own guards only some paths (not ``/invocations``, which generates too). Digests of equal length
    are compared, in constant time, with every key.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asks = scope["type"] == "http" and scope["method"] == "OPTIONS"  # browsers' preflights carry no key
        if scope["type"] == "lifespan" or scope["path"] in OPEN or asks or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        from starlette.responses import JSONResponse

        error = {"message": "no valid API key", "type": "invalid_request_error", "param": None, "code": 401}
        await JSONResponse({"error": error}, 401)(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches) and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
