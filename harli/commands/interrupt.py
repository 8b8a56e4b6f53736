"""Ctrl-C: the first ends a run in order, the second at once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from typing import Any

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def run_interruptibly(coroutine: Coroutine[Any, Any, Any]) -> bool:
    """Run ``coroutine``; the first SIGINT cancels it and it may clean up, a second one ends the process.

    True when it was cancelled. Ending at once loses nothing that was written: files are replaced whole, and the engine
    process dies with this one.
    """

    async def main() -> bool:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        cancel = task.cancel

        def interrupted(*_: Any) -> None:
            signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
            loop.call_soon_threadsafe(cancel)

        before = signal.signal(signal.SIGINT, interrupted)
        try:
            await coroutine
        except asyncio.CancelledError:
            return True
        finally:
            signal.signal(signal.SIGINT, before)
        return False

    return asyncio.run(main())
