"""Held-out loss as units: forward passes only, first without the adapter, then with it."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from harli.finetune.packing import MicroBatch, attention_mask
from harli.finetune.units import Unit


class HeldOutLoss(NamedTuple):
    """Mean loss per held-out target, in nats."""

    base: float
    adapter: float


class Evaluation:
    """Takes both losses once; a trainer runs its units one by one. ``loss`` is there when all have run."""

    def __init__(self, model: Any, batches: Sequence[MicroBatch]) -> None:
        """``model``: a PeftModel as ``LayerwiseUpdate`` takes one. It is not for training any more."""
        self._model = model.eval()
        self._batches = batches
        self.loss: HeldOutLoss | None = None

    def units(self) -> Iterator[Unit]:
        """A layer of a micro-batch each; they stand for no training tokens."""
        self._model.base_model.disable_adapter_layers()
        base = yield from self._mean_loss()
        self._model.base_model.enable_adapter_layers()
        adapter = yield from self._mean_loss()
        self.loss = HeldOutLoss(base, adapter)

    def _mean_loss(self) -> Generator[Unit, None, float]:
        """The units of one pass over all batches; then returns the mean loss."""
        causal_lm = self._model.get_base_model()
        passes = [_Pass(causal_lm, batch) for batch in self._batches]
        for one in passes:
            yield Unit("embed", one.embed, 0.0)
            for index in range(len(causal_lm.model.layers)):
                yield Unit("forward", partial(one.forward, index), 0.0)
            yield Unit("held-out loss", one.head, 0.0)
        return sum(one.loss for one in passes) / sum(batch.targets for batch in self._batches)


class _Pass:
    """One micro-batch on its way through the model."""

    def __init__(self, causal_lm: Any, batch: MicroBatch) -> None:
        self.loss = 0.0
        """Summed over the targets."""
        self._causal_lm, self._decoder = causal_lm, causal_lm.model
        self._batch = batch
        self._hidden: Tensor | None = None
        self._kwargs: dict[str, Any] = {}

    @torch.no_grad()
    def embed(self) -> None:
        decoder = self._decoder
        self._batch = batch = self._batch.to(decoder.embed_tokens.weight.device)
        self._hidden = decoder.embed_tokens(batch.input_ids)
        self._kwargs = {
            "attention_mask": attention_mask(batch),
            "position_embeddings": decoder.rotary_emb(self._hidden, batch.position_ids),
        }

    @torch.no_grad()
    def forward(self, index: int) -> None:
        self._hidden = self._decoder.layers[index](self._hidden, **self._kwargs)

    @torch.no_grad()
    def head(self) -> None:
        labels = self._batch.labels[0]
        targets = (labels >= 0).nonzero()[:, 0]
        logits = self._causal_lm.lm_head(self._decoder.norm(self._hidden)[0, targets])
        self.loss = functional.cross_entropy(logits.float(), labels[targets], reduction="sum").item()
        self._hidden, self._kwargs = None, {}
