"""Finished adapters in the running engine, each under a model name of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from vllm.v1.engine.exceptions import EngineDeadError

from harli.engine.launch import answer
from harli.finetune.checkpoint import WEIGHTS
from harli.serve.jobs import Job
from harli.serve.vllm_server import LoadLoRAAdapterRequest, LoRARequest, PEFTHelper, UnloadLoRAAdapterRequest
from harli.types import HarliError, one_line

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

LOG = logging.getLogger(__name__)
UNUSED_POLL_S = 1.0
"""Also how long a request may take from its name being looked up until the engine's client has it."""


class Adapters:
    """Loads and unloads through vLLM's list of models, which ``GET /v1/models`` shows."""

    def __init__(self, models: Any) -> None:
        """``models``: vLLM's ``OpenAIServingModels``."""
        self._models = models
        self._engine: AsyncLLM = models.engine_client
        self._leaving: set[asyncio.Task[None]] = set()

    async def load(self, name: str, folder: Path) -> None:
        """Serve the adapter in ``folder`` as ``name``; what is served already goes on.

        Raises HarliError if that cannot be, and EngineDeadError.
        """
        request = LoadLoRAAdapterRequest(lora_name=name, lora_path=str(folder))
        result = await answer(self._engine, self._models.load_lora_adapter(request))
        if not isinstance(result, str):
            if self._engine.errored:
                raise EngineDeadError
            raise HarliError(f"the adapter cannot be served: {result.error.message}")

    async def serve_again(self, folders: Mapping[str, Path]) -> None:
        """Serve adapters that were served before, by their names, the oldest first.

        The newest are loaded, as many as the engine keeps in memory; it reads another when a request asks for it.
        What cannot be served is left out, with a warning.
        """
        config = self._engine.vllm_config.lora_config
        names = list(folders)
        listed, loaded = names[: -config.max_cpu_loras], names[-config.max_cpu_loras :]
        problems = await asyncio.to_thread(lambda: {name: _problem(folders[name], config) for name in listed})
        for name, problem in problems.items():
            if not problem:
                self._list(name, folders[name])
        for name in loaded:
            try:
                await self.load(name, folders[name])
            except HarliError as error:
                problems[name] = str(error)
        for name, problem in problems.items():
            if problem:
                LOG.warning("%s is not served: %s", name, problem)

    def serves(self, name: str) -> bool:
        """Whether ``name`` has been loaded; not after a start at which that failed."""
        return name in self._models.lora_requests

    async def unload(self, name: str) -> None:
        """Serve ``name`` no more; requests that run end as they began. Raises HarliError if it is not served."""
        served = self._models.lora_requests.get(name)
        result = await self._models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name))
        if not isinstance(result, str):
            raise HarliError(result.error.message)
        if served is not None:  # vLLM takes it from its list only
            task = asyncio.create_task(self._remove_unused(served.lora_int_id))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    def _list(self, name: str, folder: Path) -> None:
        """What vLLM does after it has loaded an adapter."""
        number = self._models.lora_id_counter.inc(1)
        self._models.lora_requests[name] = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(folder))

    async def _remove_unused(self, number: int) -> None:
        """Take an adapter out of the engine's memory when no request uses it any more.

        A request that still ran would have the engine read it from disk again, in a step, and an error there ends
        the engine.
        """
        await asyncio.sleep(UNUSED_POLL_S)
        while self._used(number):
            await asyncio.sleep(UNUSED_POLL_S)
        try:
            await self._engine.remove_lora(number)
        except Exception as error:  # it goes when others need its place
            LOG.warning("an adapter that is served no more stays in memory: %s", one_line(error))

    def _used(self, number: int) -> bool:
        """Whether a request that waits or runs is for the adapter of this number."""
        requests = (state.lora_request for state in self._engine.output_processor.request_states.values())
        return any(request is not None and request.lora_int_id == number for request in requests)


def model_name(job: Job) -> str:
    """``ft:BASE:SUFFIX:ID``, in the manner of OpenAI; every job's is another, so no version replaces one in use."""
    return f"ft:{job.request.model}:{job.request.suffix or ''}:{job.id.removeprefix('ftjob-')}"


def _problem(folder: Path, config: Any) -> str:
    """Why vLLM could not read the adapter in ``folder`` later; empty if it can. ``config``: vLLM's ``LoRAConfig``."""
    try:
        PEFTHelper.from_local_dir(str(folder), None).validate_legal(config)
        with safe_open(folder / WEIGHTS, framework="numpy"):  # reads the header, which must fit the file's length
            return ""
    except Exception as error:
        return one_line(error)
