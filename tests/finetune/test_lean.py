"""The lean modules against those that they replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from harli.finetune import model as models
from tests.finetune.builders import make_job

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}
CONFIGS = [kind(**SIZES) for kind in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)]
TOKENS = 32
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


@pytest.fixture(params=CONFIGS, ids=lambda config: config.model_type)
def build(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def layer(dtype: torch.dtype, *, lean: bool) -> Any:
        """The first layer of a model, its LoRA weights far from zero, called with positions and mask."""
        with monkeypatch.context() as patched:
            if not lean:
                patched.setattr(models, "make_lean", lambda model: None)
            update = make_job(tmp_path / "data.jsonl", config=request.param, dtype=dtype).update
        generator = torch.Generator().manual_seed(1)
        for parameter in update._layers[0].parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        for dropout in update._dropouts:
            dropout.draw = (0, 1)
        rotary = update._rotary(torch.zeros((), dtype=dtype), torch.arange(TOKENS)[None])
        return partial(update._layers[0], attention_mask=None, position_embeddings=rotary)

    return layer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs(dtype: torch.dtype) -> Tensor:
    return torch.randn(1, TOKENS, SIZES["hidden_size"], generator=torch.Generator().manual_seed(0)).to(dtype)


def results(layer: Any, dtype: torch.dtype) -> list[Tensor]:
    """Output, gradient of the input, gradients of the LoRA weights."""
    x = inputs(dtype).requires_grad_()
    output = layer(x)
    output.backward(inputs(dtype).flip(1))
    return [output, x.grad, *(p.grad for p in layer.func.parameters() if p.requires_grad)]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients_are_the_same(build: Callable[..., Any], dtype: torch.dtype) -> None:
    plain, lean = (results(build(dtype, lean=lean), dtype) for lean in (False, True))
    assert torch.equal(plain[0], lean[0])
    assert len(plain) == 2 + 14
    for ours, theirs in zip(lean, plain, strict=True):
        assert theirs.any()
        assert (ours - theirs).norm() <= TOLERANCE[dtype] * theirs.norm()


def test_no_float32_copy_of_an_activation_is_kept(build: Callable[..., Any]) -> None:
    def widest(layer: Any) -> int:
        """Elements of the largest float32 tensor kept, weights aside."""
        weights = {p.untyped_storage().data_ptr() for p in layer.func.parameters()}
        sizes = [0]

        def pack(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.float32 and tensor.untyped_storage().data_ptr() not in weights:
                sizes.append(tensor.numel())
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(inputs(torch.bfloat16).requires_grad_())
        return max(sizes)

    assert widest(build(torch.bfloat16, lean=False)) == TOKENS * SIZES["intermediate_size"]
    assert widest(build(torch.bfloat16, lean=True)) <= TOKENS * SIZES["num_attention_heads"]
