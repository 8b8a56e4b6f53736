"""Work in threads that nobody waits for."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from harli.serve.threads import in_daemon_thread


def test_it_gives_what_the_work_returns_and_raises() -> None:
    assert asyncio.run(in_daemon_thread(lambda: 3)) == 3
    with pytest.raises(ZeroDivisionError):
        asyncio.run(in_daemon_thread(lambda: 1 // 0))


def test_the_process_does_not_wait_for_work_that_hangs() -> None:
    code = """
import asyncio, time
from harli.serve.threads import in_daemon_thread

async def cancelled():
    task = asyncio.create_task(in_daemon_thread(lambda: time.sleep(3600)))
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()

asyncio.run(cancelled())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
