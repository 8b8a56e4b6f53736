"""Layer units as CUDA graphs: submitting a unit costs one launch instead of a few hundred. Not yet run on a GPU.

Graphs read and write fixed addresses, so everything that passes from one unit to the next lies in
``StaticBuffers``; what a unit needs in between lives in the graphs' common memory pool and is gone
after it. A graph keeps the SMs of the stream it was captured on, hence one per unit and finetune share.
Layers whose activations are kept in lent memory run eagerly: their blocks are other ones every time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harli.compute.base import Recorder
from harli.finetune.model import CounterDropout

LOG = logging.getLogger("vllm.harli")  # the engine's log, whose warnings a user is shown
Work = Callable[[], None]
Run = Callable[[int, "StaticBuffers"], None]


class StaticBuffers:
    """What layer units of one micro-batch shape hand on."""

    def __init__(self, hidden: Tensor, inputs: Mapping[str, Any], layers: int) -> None:
        """``hidden``: [batch, tokens, features], as the embedding makes it. ``inputs``: keywords of every layer."""
        self.hidden = [torch.empty_like(hidden) for _ in range(layers + 1)]
        """The input of every layer; the last one is the output of the last layer."""
        self.gradient = torch.empty_like(hidden)
        """Of the loss with respect to the output of the layer whose backward is next."""
        self.inputs = _map_tensors(inputs, torch.empty_like)

    def fits(self, hidden: Tensor, inputs: Mapping[str, Any]) -> bool:
        """Whether ``load`` can take these."""
        mine, others = [self.hidden[0], *_tensors(self.inputs)], [hidden, *_tensors(inputs)]
        return [(x.shape, x.dtype) for x in mine] == [(x.shape, x.dtype) for x in others]

    def load(self, hidden: Tensor, inputs: Mapping[str, Any]) -> None:
        """Take over the values of a new micro-batch."""
        self.hidden[0].copy_(hidden)
        for mine, other in zip(_tensors(self.inputs), _tensors(inputs), strict=True):
            mine.copy_(other)


class CapturedLayers:
    """Runs forward and backward (with recompute) of layers, from graphs where it has them, else eagerly."""

    def __init__(self, layers: Sequence[nn.Module], record: Recorder) -> None:
        self.failure = ""
        """Why some unit is eager for good; empty while none is."""
        self._layers = layers
        self._record = record
        self._trainable = [[p for p in layer.parameters() if p.requires_grad] for layer in layers]
        self._gradients = [[torch.zeros_like(p) for p in parameters] for parameters in self._trainable]
        self._records: dict[tuple[Run, int, int], Work] = {}
        """By unit, layer and compute units."""
        self._warm: set[int] = set()
        """Compute units on whose streams a layer has run, which set libraries up."""
        self._buffers: StaticBuffers | None = None
        self._eager = any(isinstance(module, CounterDropout) for layer in layers for module in layer.modules())

    def begin(self, hidden: Tensor, inputs: Mapping[str, Any]) -> StaticBuffers:
        """Start a micro-batch; one of another shape than the last drops all graphs. Returns what its units work on."""
        if self._buffers is None or not self._buffers.fits(hidden, inputs):
            self._records.clear()
            self._warm.clear()
            self._buffers = StaticBuffers(hidden, inputs, len(self._layers))
        self._buffers.load(hidden, inputs)
        return self._buffers

    def forward(self, index: int, units: int) -> None:
        """From ``hidden[index]`` to the next one. ``units``: compute units of the current stream."""
        self._run(self._forward, index, units)

    def backward(self, index: int, units: int) -> None:
        """From ``gradient`` to the layer below's; gradients of the layer's own parameters add up in their ``grad``."""
        self._attach_gradients(index)
        self._run(self._backward, index, units)

    def incomplete(self, shares: Iterable[int]) -> bool:
        """Some graph for one of these finetune shares is still to be made."""
        return not self._eager and (self._buffers is None or self.next_capture(shares) is not None)

    def next_capture(self, shares: Iterable[int]) -> tuple[int, int] | None:
        """A layer without graphs for one of these finetune shares, and the share; None if there is no such one."""
        if self._buffers is None or self._eager:
            return None
        missing = (
            (index, units)
            for units in shares
            for index in range(len(self._layers))
            if any((run, index, units) not in self._records for run in (self._forward, self._backward))
        )
        return next(missing, None)

    def warm_up(self, units: int) -> None:
        """Run a layer on the current stream, of ``units``, and drop what it makes, to set libraries up for captures."""
        assert self._buffers is not None
        hidden, layer = torch.zeros_like(self._buffers.hidden[0]).requires_grad_(), self._layers[0]
        try:
            with torch.enable_grad():
                output = layer(hidden, **self._buffers.inputs)
                torch.autograd.grad(output, [hidden, *self._trainable[0]], torch.zeros_like(output))
        except RuntimeError as error:
            self._eager = True
            self._fail(error)
        self._warm.add(units)

    def warm(self, units: int) -> bool:
        """``warm_up`` has run on the stream of ``units``."""
        return units in self._warm

    def capture(self, index: int, units: int) -> None:
        """Make graphs of a layer's units on the current stream, which is ``warm``.

        Decode must not submit anything meanwhile: a capture switches torch's random generator over, and
        sampling tokens would fail. Layers with dropout stay eager: their masks are drawn on the host.
        """
        if self._eager or self._buffers is None:
            return
        self._attach_gradients(index)
        for run in (self._forward, self._backward):
            key = run, index, units
            if key not in self._records:
                work = partial(run, index, self._buffers)
                try:
                    self._records[key] = self._record(work)
                except RuntimeError as error:
                    self._records[key] = work
                    self._fail(error)

    def _run(self, run: Run, index: int, units: int) -> None:
        record = self._records.get((run, index, units))
        if record is not None:
            record()
        else:
            assert self._buffers is not None
            run(index, self._buffers)

    def _forward(self, index: int, buffers: StaticBuffers) -> None:
        with torch.no_grad():
            buffers.hidden[index + 1].copy_(self._layers[index](buffers.hidden[index], **buffers.inputs))

    def _backward(self, index: int, buffers: StaticBuffers) -> None:
        hidden = buffers.hidden[index].detach().requires_grad_(index > 0)
        with torch.enable_grad():
            self._layers[index](hidden, **buffers.inputs).backward(buffers.gradient)
        if hidden.grad is not None:
            buffers.gradient.copy_(hidden.grad)

    def _fail(self, error: RuntimeError) -> None:
        if not self.failure:
            self.failure = f"units of finetuning run without CUDA graphs: {error}".splitlines()[0]
            LOG.warning(self.failure)

    def _attach_gradients(self, index: int) -> None:
        """A graph adds to the addresses that it knows. The optimizer may have dropped the gradients, and the backward
        of a layer that was kept, the first of an update, makes new ones."""
        for parameter, gradient in zip(self._trainable[index], self._gradients[index], strict=True):
            if parameter.grad is None:
                gradient.zero_()
            elif parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient


def _tensors(inputs: Any) -> list[Tensor]:
    """All tensors of nested mappings and tuples, in order."""
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, Mapping):
        inputs = tuple(inputs.values())
    return [tensor for part in inputs for tensor in _tensors(part)] if isinstance(inputs, tuple) else []


def _map_tensors(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {key: _map_tensors(value, change) for key, value in inputs.items()}
    return tuple(_map_tensors(part, change) for part in inputs) if isinstance(inputs, tuple) else inputs
