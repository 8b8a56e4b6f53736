"""What the parts of the spike share: the model, sizes, and clocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MICROBATCH_TOKENS = 1024
BATCHES = (8, 32, 128)
PROMPT_TOKENS = 512
STEPS = 100


def quantiles(values: Any) -> dict[str, float]:
    """Median, P99 and number of some times."""
    if not len(values):
        return {"count": 0}
    return {"median": float(np.median(values)), "p99": float(np.percentile(values, 99)), "count": len(values)}


def timed_ms(stream: Any, work: Callable[[], object], repeats: int = 20) -> list[float]:
    """Times of ``work`` on ``stream``, by events around each run, after three that are not counted."""
    import torch

    times = []
    with torch.cuda.stream(stream):
        for index in range(repeats + 3):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            work()
            ended.record()
            ended.synchronize()
            if index >= 3:
                times.append(began.elapsed_time(ended))
    return times


def make_partitioner() -> Any:
    import torch

    from harli.compute.cuda import CudaPartitioner

    torch.cuda.init()
    torch.zeros(1, device="cuda")
    return CudaPartitioner()
