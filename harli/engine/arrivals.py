"""Whether a request has reached the engine process but not its scheduler: what ends an exclusive window."""

from __future__ import annotations

import gc
import queue
from typing import Any


class Arrivals:
    """Looks into the queue between vLLM's input thread and its engine loop.

    vLLM has no public way to it, so the queue is found once, through the engine that holds the
    scheduler. Where there is none (an engine driven in the caller's process) nothing is pending.
    """

    def __init__(self) -> None:
        self._queue: queue.Queue[Any] | None = None

    def find(self, scheduler: object) -> None:
        """Find the engine that ``scheduler`` belongs to."""
        for owner in gc.get_referrers(scheduler):  # the engine, or the dictionary of its attributes
            attributes = owner if isinstance(owner, dict) else getattr(owner, "__dict__", {})
            found = attributes.get("input_queue")
            if attributes.get("scheduler") is scheduler and isinstance(found, queue.Queue):
                self._queue = found

    def pending(self) -> bool:
        return self._queue is not None and not self._queue.empty()


ARRIVALS = Arrivals()
"""This process's; the scheduler's hook finds the queue, the worker's session asks."""
