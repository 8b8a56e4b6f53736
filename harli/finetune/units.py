"""A LoRA update cut into units short enough to run between and beside decode steps.

A micro-batch is: embed; every layer forward without gradients, keeping its input; loss; every layer
backward, recomputed from its input. With borrowed memory a layer's forward keeps its activations, and
backward need not recompute them. An update is its micro-batches, then the optimizer, layer by layer.
Gradients equal those of a plain pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from harli.compute.base import Recorder
from harli.finetune.activations import KeptActivations
from harli.finetune.captured import CapturedLayers, StaticBuffers
from harli.finetune.model import CounterDropout
from harli.finetune.packing import MicroBatch, attention_mask


class Unit(NamedTuple):
    """One gated piece of work."""

    name: str
    run: Callable[[], None]
    tokens: float
    """Training tokens that this unit stands for; a micro-batch's add up to its unpadded tokens."""
    keeps: Callable[[], bool] = lambda: False
    """Whether it would run, now, with activations that are kept."""

    @property
    def kind(self) -> str:
        """Units of a kind take about the same time."""
        return f"{self.name}_kept" if self.keeps() else self.name


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite; the update it belongs to is not applied."""


class LayerwiseUpdate:
    """Runs updates of one model; a trainer takes its units one by one."""

    def __init__(self, model: Any, *, learning_rate: float, weight_decay: float, seed: int) -> None:
        """``model``: a PeftModel over a decoder-only transformer with ``embed_tokens``, ``layers`` and ``norm``."""
        self._causal_lm = model.get_base_model()
        decoder = self._causal_lm.model
        self._embed, self._norm, self._rotary = decoder.embed_tokens, decoder.norm, decoder.rotary_emb
        self._layers: list[nn.Module] = list(decoder.layers)
        self._dropouts = [module for module in model.modules() if isinstance(module, CounterDropout)]
        self._seed = seed
        self.kept: KeptActivations | None = None
        """Set while there is memory to borrow."""
        self.captured: CapturedLayers | None = None
        """Set where units run from graphs."""
        self.compute_units = 0
        """What the unit that runs has of the device."""
        self.passes = 0
        """Micro-batches begun; dropout's masks follow from it."""
        per_layer = [[p for p in layer.parameters() if p.requires_grad] for layer in self._layers]
        self.optimizers = [
            torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
            for parameters in per_layer
            if parameters
        ]
        self.loss = math.nan

    @property
    def layers(self) -> int:
        return len(self._layers)

    def use_graphs(self, record: Recorder) -> None:
        """Run units from graphs once they have been captured."""
        self.captured = CapturedLayers(self._layers, record)

    def units(self, batches: Sequence[MicroBatch], learning_rate: float) -> Iterator[Unit]:
        """The units of one update over ``batches``; ``loss`` holds the mean loss per target once they have run."""
        self.loss = 0.0
        targets = sum(batch.targets for batch in batches)
        for batch in batches:
            yield from self._pass_units(batch, targets)
        for optimizer in self.optimizers:
            yield Unit("optimizer", partial(_step, optimizer, learning_rate), 0.0)

    def _pass_units(self, batch: MicroBatch, targets: int) -> Iterator[Unit]:
        share = batch.tokens / (2 * self.layers + 2)
        passing = _Pass(self, batch, targets)
        yield Unit("embed", passing.embed, share)
        for index in range(self.layers):
            yield Unit("forward", partial(passing.forward, index), share, partial(passing.may_keep, index))
        yield Unit("loss", passing.head, share)
        for index in reversed(range(self.layers)):
            yield Unit("backward", partial(passing.backward, index), share, partial(passing.has_kept, index))


class _Pass:
    """One micro-batch on its way through the model."""

    def __init__(self, update: LayerwiseUpdate, batch: MicroBatch, targets: int) -> None:
        self._update = update
        self._batch = batch
        self._targets = targets
        self._inputs: list[Tensor] = []
        self._hidden = self._gradient = torch.empty(0)
        self._kwargs: dict[str, Any] = {}
        self._buffers: StaticBuffers | None = None

    def embed(self) -> None:
        update = self._update
        self._batch = batch = self._batch.to(update._embed.weight.device)
        update.passes += 1
        for dropout in update._dropouts:
            dropout.draw = (update._seed, update.passes)
        with torch.no_grad():
            self._hidden = update._embed(batch.input_ids)
            mask = attention_mask(batch)
            bias = torch.zeros_like(mask, dtype=self._hidden.dtype).masked_fill_(~mask, -math.inf)
            rotary = update._rotary(self._hidden, batch.position_ids)
            self._kwargs = {"attention_mask": bias, "position_embeddings": rotary}
        if update.kept is not None:
            update.kept.begin(batch.input_ids.shape[1], (bias, *rotary))
        if update.captured is not None:
            self._buffers = update.captured.begin(self._hidden, self._kwargs)

    def forward(self, index: int) -> None:
        update = self._update
        self._inputs.append(self._hidden)
        layer = partial(update._layers[index], **self._kwargs)
        if update.kept is not None and self.may_keep(index):
            self._hidden = update.kept.forward(index, update.layers - index, layer, self._hidden)
            return
        if update.captured is not None and self._buffers is not None:
            _put(self._hidden, self._buffers.hidden[index])
            update.captured.forward(index, update.compute_units)
            self._hidden = self._buffers.hidden[index + 1]
            return
        with torch.no_grad():
            self._hidden = layer(self._hidden)

    def may_keep(self, index: int) -> bool:
        kept = self._update.kept
        return kept is not None and kept.room(self._update.layers - index)

    def has_kept(self, index: int) -> bool:
        kept = self._update.kept
        return kept is not None and kept.holds(index)

    def head(self) -> None:
        """Loss of the micro-batch and its gradient with respect to the last layer's output."""
        update = self._update
        if update.kept is not None:
            update.kept.count()
        hidden = self._hidden.detach().requires_grad_()
        with torch.enable_grad():
            labels = self._batch.labels[0]
            targets = (labels >= 0).nonzero()[:, 0]
            logits = update._causal_lm.lm_head(update._norm(hidden)[0, targets])
            loss = functional.cross_entropy(logits.float(), labels[targets], reduction="sum") / self._targets
            loss.backward()  # type: ignore[no-untyped-call]
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteLoss(f"the loss became {value}")
        update.loss += value
        assert hidden.grad is not None
        self._gradient = hidden.grad

    def backward(self, index: int) -> None:
        update, hidden = self._update, self._inputs.pop()
        if update.kept is not None and self.has_kept(index):
            gradient = update.kept.backward(self._gradient)
        else:
            if update.kept is not None:
                update.kept.skip(index)
            gradient = self._recomputed(hidden, index)
        if index:
            assert gradient is not None
            self._gradient = gradient

    def _recomputed(self, hidden: Tensor, index: int) -> Tensor | None:
        """The backward pass of a layer, from its input."""
        update = self._update
        if update.captured is not None and self._buffers is not None:
            _put(hidden, self._buffers.hidden[index])
            _put(self._gradient, self._buffers.gradient)
            update.captured.backward(index, update.compute_units)
            return self._buffers.gradient
        hidden.requires_grad_(index > 0)
        with torch.enable_grad():
            update._layers[index](hidden, **self._kwargs).backward(self._gradient)
        return hidden.grad


def _put(value: Tensor, place: Tensor) -> None:
    if value is not place:
        place.copy_(value)


def _step(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
