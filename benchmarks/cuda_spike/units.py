"""A layer's forward and backward on each finetune share, eager and captured, with equal gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from basics import LLAMA_3_8B, MICROBATCH_TOKENS, make_partitioner, quantiles


class UnitLoop:
    """Two layers of the model with LoRA, run unit by unit as finetuning would; on the calling thread."""

    def __init__(self, partitioner: Any, tokens: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        from harli.config import LoraSettings
        from harli.finetune.captured import CapturedLayers
        from harli.finetune.model import build_model

        self.partitioner = partitioner
        config = LlamaConfig(**{**LLAMA_3_8B, "num_hidden_layers": 2, "vocab_size": 1024})
        with torch.device("cuda"):
            weights = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
        self.model = build_model(config, weights, LoraSettings(rank=16), name="spike", seed=0)
        decoder = self.model.get_base_model().model
        self.layers = list(decoder.layers)
        self.captured = CapturedLayers(self.layers, partitioner.recorder())
        self.hidden = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16, device="cuda")
        self.inputs = {
            "attention_mask": torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device="cuda").tril(),
            "position_embeddings": decoder.rotary_emb(self.hidden, torch.arange(tokens, device="cuda")[None]),
        }

    def run_pass(self, units: int) -> dict[str, list[tuple[float, float]]]:
        """Milliseconds of device and of host (submitting alone) of every unit, by kind, on ``units`` SMs."""
        times: dict[str, list[tuple[float, float]]] = {"forward": [], "backward": []}
        self.partitioner.set_finetune(units)
        buffers = self.captured.begin(self.hidden, self.inputs)
        for index in range(len(self.layers)):
            times["forward"].append(self._timed(lambda i=index: self.captured.forward(i, units)))
        buffers.gradient.copy_(self.hidden)
        for index in reversed(range(len(self.layers))):
            times["backward"].append(self._timed(lambda i=index: self.captured.backward(i, units)))
        return times

    def capture(self, units: int) -> None:
        """Let passes on ``units`` SMs, of which there has been one, run from graphs."""
        self.partitioner.set_finetune(units)
        for index in range(len(self.layers)):
            self.captured.capture(index, units)

    def gradients(self) -> list[Any]:
        """A copy of the gradients, which it drops."""
        found = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad()
        return found

    def _timed(self, unit: Callable[[], None]) -> tuple[float, float]:
        import torch

        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        submitting = time.perf_counter()
        unit()
        host_ms = (time.perf_counter() - submitting) * 1e3
        ended.record()
        self.partitioner.wait_finetune()
        return began.elapsed_time(ended), host_ms


def measure(result: dict[str, Any]) -> Iterator[None]:
    partitioner = make_partitioner()
    partitioner.adopt_finetune()
    loop = UnitLoop(partitioner, MICROBATCH_TOKENS)
    for units in partitioner.finetune_streams:
        eager = loop.run_pass(units)  # sets libraries up
        expected = loop.gradients()
        loop.capture(units)
        loop.run_pass(units)
        found = loop.gradients()
        passes = [loop.run_pass(units) for _ in range(10)]
        loop.gradients()
        result[str(units)] = {
            "gradients_differ_by": max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)),
            "eager_host_ms": {kind: times[-1][1] for kind, times in eager.items()},
            "failure": loop.captured.failure,
        } | {
            f"{kind}_{what}_ms": quantiles([times[side] for one in passes for times in one[kind]])
            for kind in ("forward", "backward")
            for side, what in enumerate(("device", "host"))
        }
        yield
