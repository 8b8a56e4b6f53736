"""The trainable model: Hugging Face's modules over tensors that belong to the engine, with LoRA layers added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from harli.config import LoraSettings


MAX_SEED = (1 << 63) - 1


class CounterDropout(nn.Module):
    """Dropout whose mask depends on ``draw`` alone.

    A recomputed layer so draws the mask of its first pass, and torch's own random state, which vLLM
    samples tokens with, is left alone.
    """

    def __init__(self, p: float, index: int) -> None:
        super().__init__()
        self.p = p
        self.draw = (0, 0)
        """Seed of the job and number of the pass."""
        self._index = index
        self._generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        self._generator.manual_seed(hash((*self.draw, self._index)) & MAX_SEED)
        keep = torch.empty(x.shape, dtype=x.dtype).bernoulli_(1.0 - self.p, generator=self._generator)
        return x * keep.to(x.device) / (1.0 - self.p)


def build_model(config: Any, tensors: Mapping[str, Tensor], lora: LoraSettings, *, name: str, seed: int) -> Any:
    """A ``peft.PeftModel`` whose base weights are ``tensors`` themselves, not copies of them.

    Args:
        config: the model's Hugging Face config.
        tensors: base weights under Hugging Face's names; tied ones once.
        lora: rank, alpha, dropout and target modules.
        name: the base model's name or folder, noted in the adapter.
        seed: of LoRA's initial weights.

    The LoRA weights are float32 whatever the base's type is. Raises KeyError if a weight is missing.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = next(iter(tensors.values())).dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.load_state_dict(dict(tensors), strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    if missing := [key for key, value in model.named_parameters() if value.is_meta]:
        raise KeyError(f"the engine holds no weights for {', '.join(missing)}")
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # its buffers are not weights
    model.config.name_or_path = name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft_model = get_peft_model(
            model,
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=list(lora.targets),
                bias="none",
                task_type="CAUSAL_LM",
            ),
        )
    replace_dropout(peft_model)
    return peft_model.train()


def replace_dropout(model: nn.Module) -> None:
    """Put ``CounterDropout`` in the place of LoRA's dropouts."""
    index = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Dropout) and child.p > 0:
                setattr(module, name, CounterDropout(child.p, index))
                index += 1
