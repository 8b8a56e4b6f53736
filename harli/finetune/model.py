"""The trainable model: Hugging Face's modules over tensors that belong to the engine, with LoRA layers added."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harli.finetune.lean import make_lean

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
        if not self.training:
            return x
        if self._generator.device != x.device:
            self._generator = torch.Generator(x.device)
        self._generator.manual_seed(hash((*self.draw, self._index)) & MAX_SEED)
        keep = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return x * keep.bernoulli_(1.0 - self.p, generator=self._generator) / (1.0 - self.p)


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

    config = copy.deepcopy(config)  # the caller's is the engine's
    dtype = torch.get_default_dtype()  # which from_config sets, for the engine's thread too
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.load_state_dict(dict(tensors), strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    if missing := [key for key, value in model.named_parameters() if value.is_meta]:
        raise KeyError(f"the engine holds no weights for {', '.join(missing)}")
    rotary = type(model.model.rotary_emb)(config=config)  # its buffers are not weights
    model.model.rotary_emb = rotary.to(model.model.embed_tokens.weight.device)
    model.config.name_or_path = name
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
        low_cpu_mem_usage=True,
    )
    initialise_lora(peft_model, seed)
    replace_dropout(peft_model)
    make_lean(peft_model)
    return peft_model.train()


def initialise_lora(model: nn.Module, seed: int) -> None:
    """Give LoRA's empty weights their first values as PEFT does: A uniform (Kaiming, a = sqrt 5), B zero.

    From a generator of its own, since vLLM samples tokens with torch's while a job is made ready.
    """
    from peft.tuners.lora import LoraLayer

    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            device = module.get_base_layer().weight.device
            for a, b in zip(module.lora_A.values(), module.lora_B.values(), strict=True):
                a.to_empty(device=device)
                b.to_empty(device=device)
                values = nn.init.kaiming_uniform_(torch.empty(a.weight.shape), a=math.sqrt(5), generator=generator)
                a.weight.data.copy_(values)
                nn.init.zeros_(b.weight)


def replace_dropout(model: nn.Module) -> None:
    """Put ``CounterDropout`` in the place of LoRA's dropouts."""
    index = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Dropout) and child.p > 0:
                setattr(module, name, CounterDropout(child.p, index))
                index += 1
