"""What can be co-located: one place for what is refused, and why."""

from __future__ import annotations

from typing import Any

from harli.engine.weights import ARCHITECTURES

REFUSED = {
    "tensor, pipeline or data parallel size above 1": "every rank would have to take the same decisions",
    "quantised weights (FP8, AWQ, GPTQ)": "finetuning reads the plain weights",
    "quantised KV cache": "its blocks cannot be lent yet",
    "mixture of experts": "vLLM fuses experts in ways that weight_views does not undo",
    "speculative decoding": "a step yields more than one token",
    "hybrid or sliding-window attention": "not every layer's KV cache is laid out alike",
    "a base model other than the served one": "base weights are shared with decode",
}
"""Not supported, with the reason."""


def why_refused(config: Any) -> str:
    """Why a model with this Hugging Face config cannot be finetuned inside decode; empty if it can."""
    architecture = (getattr(config, "architectures", None) or ["unknown"])[0]
    if getattr(config, "quantization_config", None):
        return "its weights are quantised, and finetuning reads the plain weights"
    if architecture not in ARCHITECTURES:
        return f"architecture {architecture} is not among {', '.join(ARCHITECTURES)}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "it uses sliding-window attention, whose KV cache is laid out differently"
    return ""


def why_not_lent(config: Any) -> str:
    """Why the blocks of a KV cache with this vLLM ``KVCacheConfig`` cannot be lent; empty if they can."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    groups = config.kv_cache_groups
    if len(groups) != 1:
        return f"it has {len(groups)} groups of layers with blocks of their own"
    if type(groups[0].kv_cache_spec) is not FullAttentionSpec:
        return f"its blocks are those of {type(groups[0].kv_cache_spec).__name__}"
    return ""
