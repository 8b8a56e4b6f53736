"""Work that may hang, such as on a disk, in threads that nobody has to wait for when the server ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

Result = TypeVar("Result")


async def in_daemon_thread(work: Callable[[], Result]) -> Result:
    """What ``work`` returns or raises. Cancelling does not end it, but the process does not wait for its end either."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(with_: Callable[[Any], None], outcome: Any) -> None:
        if not future.done():
            with_(outcome)

    def run() -> None:
        try:
            with_, outcome = future.set_result, work()
        except Exception as error:
            with_, outcome = future.set_exception, error  # type: ignore[assignment]
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, with_, outcome)

    threading.Thread(target=run, daemon=True).start()
    return await future
