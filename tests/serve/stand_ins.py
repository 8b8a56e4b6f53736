"""An engine and vLLM's list of models without a model, for tests of what the server does around them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels

from harli.finetune.checkpoint import WEIGHTS
from harli.serve.adapters import Adapters

MAX_RANK = 16


class LoraEngine:
    """Loads and removes adapters, of which it keeps two in memory."""

    model_config = renderer = input_processor = None
    errored = False

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(lora_config=SimpleNamespace(max_lora_rank=MAX_RANK, max_cpu_loras=2))
        self.output_processor = SimpleNamespace(request_states={})
        self.loaded: list[str] = []
        self.removed: list[int] = []

    async def add_lora(self, request: Any) -> bool:
        self.loaded.append(request.lora_name)
        return True

    async def remove_lora(self, number: int) -> bool:
        self.removed.append(number)
        return True


def adapters_of(engine: LoraEngine) -> tuple[Adapters, dict[str, Any]]:
    """The adapters of an engine, and vLLM's list of what is served."""
    models = OpenAIServingModels(engine, [BaseModelPath("tiny", "tiny")])
    return Adapters(models), models.lora_requests


def write_adapter(folder: Path, rank: int = 4) -> Path:
    """What vLLM looks at before it reads an adapter's weights."""
    folder.mkdir(parents=True)
    config = {"r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(rank, 8)}, folder / WEIGHTS)
    return folder
