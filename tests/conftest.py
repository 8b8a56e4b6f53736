"""One real engine for the whole session, driven from a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import cloudpickle
import pytest

from harli.config import EngineSettings


class EngineHost:
    """A running engine whose coroutines plain tests can call."""

    def __init__(self, settings: EngineSettings, **overrides: Any) -> None:
        self.settings = settings
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.run(self._start(overrides))

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """The result of a coroutine that uses the engine."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def command(self, name: str, *args: Any) -> Any:
        """One of ``harli.engine.control.Control``'s commands."""
        from harli.engine.launch import command

        return self.run(command(self.engine, name, *args))

    def call_worker(self, function: Any, *args: Any) -> Any:
        """Run ``function(worker, *args)`` in the engine process, which cannot import the tests."""
        cloudpickle.register_pickle_by_value(sys.modules[function.__module__])
        return self.run(self.engine.collective_rpc(function, args=args))[0]

    async def _start(self, overrides: dict[str, Any]) -> None:
        from harli.engine.launch import launched

        self._context = launched(self.settings, **overrides)
        self.engine = await self._context.__aenter__()

    def close(self) -> None:
        self.run(self._context.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="session")
def host() -> Iterator[EngineHost]:
    """``tiny`` in float32, mixed role, with LoRA serving on."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for ``call_worker``
    settings = EngineSettings(model="tiny", role="mixed", dtype="float32", max_num_seqs=16, kv_cache_gib=0.5)
    host = EngineHost(settings, enable_lora=True, max_lora_rank=8, max_loras=1)
    yield host
    host.close()
