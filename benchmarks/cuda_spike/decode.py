"""vLLM with a set of decode graphs per split, chosen before every step; then decode and units, alone and together."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from basics import BATCHES, LLAMA_3_8B, PROMPT_TOKENS, STEPS, quantiles


def measure(result: dict[str, Any]) -> Iterator[None]:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA_3_8B))
        engine = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            worker_cls="worker.SpikeWorker",
            async_scheduling=True,
            max_model_len=2048,
            max_num_seqs=max(BATCHES),
            gpu_memory_utilization=0.5,
            enable_prefix_caching=False,
            compilation_config={
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": list(BATCHES),
            },
        )

    def call(method: str, *args: Any) -> Any:
        return engine.collective_rpc(method, args=args)[0]

    def decode(batch: int, shares: list[int]) -> tuple[list[Any], list[Any]]:
        """Rows of the pure decode steps of ``batch`` requests at ``shares`` in turn, and the tokens made."""
        call("spike_shares", shares)
        params = SamplingParams(max_tokens=STEPS, ignore_eos=True, temperature=0.0, detokenize=False)
        prompts = [{"prompt_token_ids": [7 + index] * PROMPT_TOKENS} for index in range(batch)]
        outputs = engine.generate(prompts, params, use_tqdm=False)
        rows = [row for row in call("spike_take") if row[1] == batch]
        return rows, [list(output.outputs[0].token_ids) for output in outputs]

    about = result["engine"] = call("spike_about")
    yield
    alone, splits = about["units"], [tuple(map(int, share.split("/"))) for share in about["splits"]]
    latencies = result["latency_ms"] = {}
    tokens = {}
    for batch in BATCHES:
        for units in (alone, *(share[0] for share in splits)):
            rows, tokens[units] = decode(batch, [units])
            latencies[f"batch {batch}, {units} SMs"] = quantiles([row[2] for row in rows])
        every = [alone, *(share[0] for share in splits)]
        rows, mixed = decode(batch, every)
        for units in every:
            latencies[f"batch {batch}, {units} SMs, another share every step"] = quantiles(
                [row[2] for row in rows if row[0] == units]
            )
        result[f"requests with equal tokens, batch {batch}"] = {
            str(units): float(np.mean([a == b for a, b in zip(tokens[units], tokens[alone], strict=True)]))
            for units in tokens
        } | {"mixed": float(np.mean([a == b for a, b in zip(mixed, tokens[alone], strict=True)]))}
        yield
    together = result["together"] = {}
    for decode_units, finetune_units in splits[:3]:
        call("spike_finetune", finetune_units)
        time.sleep(1.0)
        row = together[f"{decode_units}/{finetune_units}"] = {"unit_ms alone": quantiles(call("spike_units"))}
        for batch in BATCHES:
            rows, _ = decode(batch, [decode_units])
            row[f"latency_ms, batch {batch}"] = quantiles([times[2] for times in rows])
            row[f"unit_ms, batch {batch}"] = quantiles(call("spike_units"))
            yield
        row["failure"] = call("spike_finetune", 0)
