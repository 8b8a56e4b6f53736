"""Does decode say the same with finetuning beside it, and does finetuning learn what plain PEFT would?

Not yet run on a GPU. Prints one JSON object: the largest difference of a prompt's teacher-forced log-probability
between two runs without finetuning and between runs without and with it; bytes of the base weights that
finetuning shares with decode; the largest relative difference of a LoRA gradient from a plain pass through PEFT,
on the model's first two layers and in its own precision.

    python benchmarks/gpu_correctness.py --model tiny
"""

from __future__ import annotations

import asyncio
import copy
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from harli.config import EngineSettings, FinetuneSettings, LoraSettings
from harli.engine.launch import command, launched, prepare_environment
from harli.finetune.builtin import write_builtin_dataset
from harli.models import resolve_model

PROMPTS = 8
PROMPT_TOKENS = 200
OUTPUT_TOKENS = 32
LAYERS = 2
TOKENS = 128


async def compare_outputs(model: str) -> dict[str, Any]:
    """Log-probabilities of the same prompts without finetuning, again without, and with it."""
    settings = EngineSettings(model=model, role="mixed", max_num_seqs=PROMPTS, max_model_len=512, kv_cache_gib=1.0)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data.jsonl")
        write_builtin_dataset(data, limit=200)
        async with launched(settings, enable_prefix_caching=False) as engine:
            await command(engine, "begin", "separate", {}, {}, 0)
            first, again = await logprobs(engine), await logprobs(engine)
            job = FinetuneSettings(data=data, microbatch_tokens=TOKENS)
            started = await command(engine, "finetune", job.model_dump_json(), None, None)
            await command(engine, "begin", "static", {}, {}, 0)
            beside = await logprobs(engine)
            steps = (await command(engine, "drain"))["steps"]
            status = await command(engine, "status")
    return {
        "difference_without": float(np.abs(first - again).max()),
        "difference_with": float(np.abs(first - beside).max()),
        "steps_beside_finetuning": len(steps),
        "finetune_failure": status["finetune_failure"],
        "shared_bytes": started["shared_bytes"],
        "base_bytes": started["base_bytes"],
    }


async def logprobs(engine: Any) -> np.ndarray[Any, Any]:
    """[prompts, tokens - 1], each prompt with some decode steps after it."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    async def one(index: int) -> list[float]:
        tokens = np.random.default_rng(index).integers(3, 250, size=PROMPT_TOKENS).tolist()
        params = SamplingParams(
            max_tokens=OUTPUT_TOKENS,
            temperature=0.0,
            ignore_eos=True,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async for output in engine.generate({"prompt_token_ids": tokens}, params, f"{index}-{id(params)}"):
            found = output.prompt_logprobs
        return [entry[token].logprob for token, entry in zip(tokens[1:], found[1:], strict=True)]

    return np.array([await one(index) for index in range(PROMPTS)])


def compare_gradients(model: str) -> float:
    """Largest difference of a gradient from plain PEFT's, relative to the largest gradient."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from harli.finetune.dataset import Sample
    from harli.finetune.model import build_model
    from harli.finetune.packing import pack
    from harli.finetune.units import LayerwiseUpdate

    config = copy.deepcopy(AutoConfig.from_pretrained(str(resolve_model(model))))
    config.num_hidden_layers = LAYERS
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        weights = AutoModelForCausalLM.from_config(config, dtype=dtype).state_dict()
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    peft = build_model(config, weights, LoraSettings(), name=model, seed=0)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    tokens = tuple(np.random.default_rng(0).integers(3, 250, size=TOKENS).tolist())
    (batch,) = pack([Sample(tokens, (True,) * TOKENS)], microbatch_tokens=TOKENS, seed=0, epoch=0)
    update = LayerwiseUpdate(peft, learning_rate=1e-4, weight_decay=0.0, seed=0)
    for unit in update.units([batch], 1e-4):
        if unit.name == "optimizer":
            break
        unit.run()
    found = _gradients(peft)
    ids = batch.input_ids.to(device)
    logits = peft(input_ids=ids).logits[0, :-1].float()
    torch.nn.functional.cross_entropy(logits, ids[0, 1:]).backward()  # type: ignore[no-untyped-call]
    expected = _gradients(peft)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    return max(float((found[name] - expected[name]).abs().max()) for name in expected) / scale


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the gradients, which it drops."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def main(model: Annotated[str, typer.Option()] = "tiny") -> None:
    """Measure and print."""
    prepare_environment()
    result = asyncio.run(compare_outputs(model))
    print(json.dumps(result | {"gradients_differ_by": compare_gradients(model)}))  # noqa: T201


if __name__ == "__main__":
    typer.run(main)
