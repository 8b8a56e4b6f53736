"""The same layers with less kept for the backward pass.

Autograd keeps a float32 copy of a bfloat16 activation wherever one is made: in every norm, and in front
of every LoRA weight. These modules keep the activation itself and make the copy again. Values and
gradients are those of the modules that they replace.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def make_lean(model: nn.Module) -> None:
    """Replace the norms and the LoRA inputs of a PeftModel over one of ``harli.engine.weights.ARCHITECTURES``."""
    from peft.tuners.lora import Linear

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm: Any = child
                setattr(module, name, LeanRMSNorm(norm.weight, norm.variance_epsilon))
        if isinstance(module, Linear):
            for adapter, matrix in list(module.lora_A.items()):
                module.lora_A[adapter] = LeanLoraInput(matrix.weight, module.lora_dropout[adapter])
                module.lora_dropout[adapter] = nn.Identity()
            module.cast_input_dtype_enabled = False


class LeanRMSNorm(nn.Module):
    """RMSNorm (Zhang and Sennrich, 2019) with a frozen weight, computed in float32."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Over the last dimension."""
        output: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return output


class LeanLoraInput(nn.Module):
    """Cast to LoRA's type, dropout and the A matrix: [..., in] -> [..., rank]."""

    def __init__(self, weight: nn.Parameter, dropout: nn.Module) -> None:
        """``weight``: [rank, in]. ``dropout`` drops the same elements of an input and of its gradient."""
        super().__init__()
        self.weight = weight
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = _LoraInput.apply(x, self.weight, self.dropout)  # type: ignore[no-untyped-call]
        return output


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        wide = x.float()
        return weight * (wide * _inverse_rms(wide, eps)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        wide = x.float()
        inverse = _inverse_rms(wide, ctx.eps)
        normed = wide * inverse
        gradient = (gradients[0] * weight).float()
        along = (gradient * normed).mean(-1, keepdim=True)
        return (inverse * (gradient - normed * along)).to(x.dtype), None, None


class _LoraInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dropout: nn.Module) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dropout = dropout
        return functional.linear(dropout(x.to(weight.dtype)), weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0]
        inputs = ctx.dropout(x.to(weight.dtype))
        of_weight = gradient.flatten(0, -2).T @ inputs.flatten(0, -2)
        of_x = ctx.dropout(gradient @ weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        return of_x, of_weight, None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
