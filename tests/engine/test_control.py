"""Commands to the engine process, without an engine."""

from __future__ import annotations

import os
import threading
from typing import Any

from harli.compute.cpu import CpuPartitioner
from harli.engine.control import Control
from harli.runtime.session import Session


def test_a_job_is_made_ready_on_any_core_though_decodes_thread_is_pinned() -> None:
    nothing: Any = None
    found: list[set[int]] = []

    def engine_thread() -> None:
        control = Control(Session(CpuPartitioner((0,)), lambda: False), nothing, nothing, 1, [])
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # as the first run does
        found.append(control._preparations.submit(os.sched_getaffinity, 0).result())

    thread = threading.Thread(target=engine_thread)
    thread.start()
    thread.join()
    assert found == [os.sched_getaffinity(0)]
