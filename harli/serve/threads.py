"""Work that may hang, such as on a disk, in threads that nobody has to wait for when the server ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


async def in_daemon_thread(work: Callable[[], Result]) -> Result:
    """What ``work`` returns or raises. Cancelling does not end it, but the process does not wait for its end either."""
    future: Future[Result] = Future()
    future.set_running_or_notify_cancel()  # its result may come after whoever waited has been cancelled

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)
