"""vLLM's weights under Hugging Face's names, as views: the finetuning side holds no copy of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Dense decoder-only models whose layers vLLM fuses in the way that ``weight_views`` undoes."""


def weight_views(model: nn.Module, config: Any) -> dict[str, Tensor]:
    """Every weight of vLLM's ``model`` under its Hugging Face name, aliasing vLLM's memory.

    Args:
        model: a model of one of ``ARCHITECTURES``, on one rank, unquantised.
        config: its Hugging Face config.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query, key_value = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    fused = {
        "qkv_proj": (("q_proj", query), ("k_proj", key_value), ("v_proj", key_value)),
        "gate_up_proj": (("gate_proj", config.intermediate_size), ("up_proj", config.intermediate_size)),
    }
    views: dict[str, Tensor] = {}
    for full_name, parameter in model.named_parameters():
        if "lora_" in full_name:
            continue
        name = full_name.replace(".base_layer", "")
        module, _, kind = name.rpartition(".")
        prefix, _, leaf = module.rpartition(".")
        alias = from_dlpack(parameter.detach())
        if leaf in fused:
            offset = 0
            for part, rows in fused[leaf]:
                views[f"{prefix}.{part}.{kind}"] = alias[offset : offset + rows]
                offset += rows
        elif leaf in ("embed_tokens", "lm_head"):
            views[name] = alias[: config.vocab_size]  # vLLM pads the vocabulary
        else:
            views[name] = alias
    if config.tie_word_embeddings:
        views.pop("lm_head.weight", None)
    return views


def shared_bytes(model: nn.Module, engine_model: nn.Module) -> tuple[int, int]:
    """Bytes of ``model``'s frozen weights that lie in ``engine_model``'s memory, and bytes of all of them."""
    storages = {parameter.untyped_storage().data_ptr() for parameter in engine_model.parameters()}
    frozen = {p.data_ptr(): p for p in model.parameters() if not p.requires_grad}.values()
    shared = sum(p.nbytes for p in frozen if p.untyped_storage().data_ptr() in storages)
    return shared, sum(p.nbytes for p in frozen)
