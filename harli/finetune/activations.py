"""Activations kept for the backward pass in lent memory, which may be recalled at any time.

What a layer's forward pass saves is copied into the arena, so that its backward pass need not compute it
again. Layers are kept as a stack: the last one's backward pass comes first, so it is held shortest, and it
lies in the blocks that are recalled first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from harli.memory.arena import Arena, Mark


class KeptActivations:
    """The layers whose activations are kept at present. For the finetuning thread alone."""

    def __init__(self, arena: Arena, resident: Iterable[Tensor]) -> None:
        """``resident``: what lives as long as the job, such as weights: saved as it is."""
        self.arena = arena
        self.layers = 0
        """Layers of the latest micro-batch that are kept, those that have had their backward pass included."""
        self.wanted = True
        """Layers are kept at all."""
        self._kept = self._revoked = 0
        self._resident = _addresses(resident)
        self._shared: set[int] = set()
        self._stack: list[_Layer] = []
        self._tokens = 0
        self._layer_bytes = 0

    @property
    def recalled(self) -> bool:
        """Memory in use is wanted back: ``vacate`` it soon."""
        return not self.arena.loan.vacated

    def begin(self, tokens: int, shared: Iterable[Tensor]) -> None:
        """A micro-batch of ``tokens`` begins. ``shared``: what all its layers save and nobody has to copy."""
        self.drop()
        self._shared = self._resident | _addresses(shared)
        if not self.room(1):
            self.layers = 0
        if tokens != self._tokens:
            self._tokens, self._layer_bytes = tokens, 0

    def room(self, layers: int) -> bool:
        """So many layers more would fit, as far as is known."""
        return self.wanted and self.arena.free_bytes > layers * self._layer_bytes

    def forward(self, index: int, layers: int, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The layer's output, its activations kept if they fit.

        ``layers``: how many there are from this one to the last, which are better to keep.
        """
        arena = self.arena
        mark, free = arena.mark(), arena.free_bytes
        x = x.detach().requires_grad_(index > 0)
        saver = _Saver(arena, self._shared | _addresses([x]))
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(saver.pack, _unpack):
            output = layer(x)
        if saver.full:
            arena.release(mark)
            self._layer_bytes = max(self._layer_bytes, free // layers + 1)
        else:
            self._layer_bytes = sum(mark) - sum(arena.mark())
            self._stack.append(_Layer(index, mark, x, output, _stream(x)))
            self._kept += 1
        return output.detach()

    def count(self) -> None:
        """The micro-batch's forward passes are over."""
        self.layers = len(self._stack)

    def holds(self, index: int) -> bool:
        """The layer's backward pass is the next and needs no recomputation.

        Autograd runs it on the forward pass's stream, which has the compute units of then: on another one the layer has
        to be recomputed.
        """
        if not self._on_top(index):
            return False
        layer = self._stack[-1]
        return layer.stream == _stream(layer.x)

    def skip(self, index: int) -> None:
        """The layer's backward pass is recomputed; what is kept of it, if anything, is dropped."""
        if self._on_top(index):
            self.arena.release(self._stack.pop().mark)

    def backward(self, gradient: Tensor) -> Tensor | None:
        """The backward pass of the layer on top, which is dropped; the gradient of its input."""
        layer = self._stack.pop()
        layer.output.backward(gradient)  # type: ignore[no-untyped-call]
        self.arena.release(layer.mark)
        return layer.x.grad

    def vacate(self) -> None:
        """Drop the layers whose memory is recalled."""
        while self.recalled and self._stack:
            self.arena.release(self._stack.pop().mark)
            self._revoked += 1
            self.layers = max(0, self.layers - 1)
        if not self._stack:
            self.arena.release()

    def figures(self) -> dict[str, int]:
        """Bytes in use and at most; layers kept at present; how often one was kept, and dropped by a recall."""
        return {
            "used_bytes": self.arena.used_bytes,
            "peak_bytes": self.arena.peak_bytes,
            "kept_layers": self.layers,
            "kept": self._kept,
            "revoked": self._revoked,
        }

    def drop(self) -> None:
        """Drop all layers."""
        self._stack.clear()
        self.arena.release()

    def _on_top(self, index: int) -> bool:
        return bool(self._stack) and self._stack[-1].number == index


class _Layer(NamedTuple):
    number: int
    mark: Mark
    """The arena before it."""
    x: Tensor
    output: Tensor
    """With the graph that leads back to ``x``."""
    stream: torch.cuda.Stream | None
    """On which it ran; None on a CPU."""


class _Saved(NamedTuple):
    """A tensor of the graph, over a copy of its storage."""

    storage: Tensor
    dtype: torch.dtype
    offset: int | torch.SymInt
    size: torch.Size
    stride: tuple[int, ...]


class _Saver:
    """Copies the storage of each saved tensor once, so that views of one storage share its copy."""

    def __init__(self, arena: Arena, uncopied: set[int]) -> None:
        self.full = False
        """Something did not fit: the layer cannot be kept."""
        self._arena = arena
        self._uncopied = uncopied
        self._copies: dict[tuple[StorageWeakRef, int], Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor | _Saved | None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._uncopied:
            return tensor
        if self.full:
            return None
        # The weak reference keeps a later storage from being taken for this one.
        key = StorageWeakRef(storage), tensor._version  # type: ignore[no-untyped-call]
        copy = self._copies.get(key)
        if copy is None:
            copy = self._arena.allocate(storage.nbytes())
            if copy is None:
                self.full = True
                return None
            copy.copy_(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
            self._copies[key] = copy
        return _Saved(copy, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())


def _stream(tensor: Tensor) -> torch.cuda.Stream | None:
    """The stream that work on ``tensor`` is submitted to from here; None on a CPU."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


def _unpack(saved: Tensor | _Saved) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    copy = saved.storage
    offset = copy.storage_offset() // saved.dtype.itemsize + saved.offset
    empty = torch.empty(0, dtype=saved.dtype, device=copy.device)
    return empty.set_(copy.untyped_storage(), offset, saved.size, saved.stride)


def _addresses(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}
