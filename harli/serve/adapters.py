"""Finished adapters in the running engine, each under a model name of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from harli.serve.jobs import Job
from harli.serve.vllm_server import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from harli.types import HarliError

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


class Adapters:
    """Loads and unloads through vLLM's list of models, which ``GET /v1/models`` shows."""

    def __init__(self, models: Any) -> None:
        """``models``: vLLM's ``OpenAIServingModels``."""
        self._models = models
        self._engine: AsyncLLM = models.engine_client

    async def load(self, name: str, folder: Path) -> None:
        """Serve the adapter in ``folder`` as ``name``; what is served already goes on. Raises HarliError."""
        result = await self._models.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=name, lora_path=str(folder)))
        if not isinstance(result, str):
            raise HarliError(f"the adapter cannot be served: {result.error.message}")

    def serves(self, name: str) -> bool:
        """Whether ``name`` has been loaded; not after a start at which that failed."""
        return name in self._models.lora_requests

    async def unload(self, name: str) -> None:
        """Serve ``name`` no more; requests that run end as they began. Raises HarliError if it is not served."""
        served = self._models.lora_requests.get(name)
        result = await self._models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name))
        if not isinstance(result, str):
            raise HarliError(result.error.message)
        if served is not None:  # vLLM takes it from its list only; requests that run read it again from its folder
            await self._engine.remove_lora(served.lora_int_id)


def model_name(job: Job) -> str:
    """``ft:BASE:SUFFIX:ID``, in the manner of OpenAI; every job's is another, so no version replaces one in use."""
    return f"ft:{job.request.model}:{job.request.suffix or ''}:{job.id.removeprefix('ftjob-')[:8]}"
