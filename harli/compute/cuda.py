"""SM splits: decode on some streaming multiprocessors of a GPU, finetuning on the others.

Each side has one stream per share it can have. Kernels of a split's streams stay on the split's SMs
(``harli.compute.green``); those of the two "alone" streams use the whole GPU. A CUDA graph keeps the SMs
of the stream it was captured on, so every share needs graphs of its own. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch

from harli.compute.base import Partitioner
from harli.compute.cuda_timing import EventTimer
from harli.compute.green import GreenContextError, SmGroups
from harli.types import Menu, Share

DECODE_PARTS = (5 / 6, 2 / 3, 1 / 2, 1 / 3)
"""Decode's fraction of the SMs in each split. Every one costs memory for a set of decode graphs."""

DECODE_PRIORITY = -1
FINETUNE_PRIORITY = 0

Stream = Any
"""``torch.cuda.Stream`` or ``ExternalStream``."""


class CudaPartitioner(Partitioner):
    """Splits a GPU's SMs; where the driver or the device cannot, there is time slicing only, and ``reason`` says why.

    A side's work stays in order when it changes streams: the new stream waits, on the device, for what
    the side has submitted to the old one. The host waits for nothing.
    """

    def __init__(self, device: int = 0, *, driver: Any = None, cuda: Any = torch.cuda) -> None:
        """``device``: index of a GPU that torch has initialised. ``driver``, ``cuda``: as the libraries, for tests."""
        self._cuda = cuda
        self.reason = ""
        """Why there are no splits; empty when there are some."""
        sms = cuda.get_device_properties(device).multi_processor_count
        self.decode_streams: dict[int, Stream] = {sms: cuda.Stream(device, priority=DECODE_PRIORITY)}
        """Decode's stream for each number of SMs that it can have."""
        self.finetune_streams: dict[int, Stream] = {sms: cuda.Stream(device, priority=FINETUNE_PRIORITY)}
        splits: dict[Share, tuple[Stream, Stream]] = {}
        try:
            splits = _make_splits(SmGroups(device, driver), device, cuda)
        except GreenContextError as error:
            self.reason = f"SM splits need green contexts (driver 12.4 or newer, cuda-bindings): {error}"
        for share, (decode, finetune) in splits.items():
            self.decode_streams[share.decode] = decode
            self.finetune_streams[share.finetune] = finetune
        self.menu = Menu((Share(sms, 0), *splits, Share(0, sms)))
        self.decode_switched: Callable[[int, Stream], None] = _ignore
        """Called on decode's thread with its SMs and stream when they have changed."""
        self._decode = self.decode_streams[sms]
        self._finetune = self.finetune_streams[sms]
        self._decode_event, self._finetune_event, self._unit_event = (
            cuda.Event(),
            cuda.Event(),
            cuda.Event(blocking=True),  # sleeps rather than spins, and without the interpreter's lock
        )

    def adopt_decode(self) -> None:
        """Make decode's stream the calling thread's, after whatever it has submitted so far."""
        _follow(self._decode_event, self._cuda.current_stream(), self._decode)
        self._cuda.set_stream(self._decode)

    def adopt_finetune(self) -> None:
        _follow(self._finetune_event, self._cuda.current_stream(), self._finetune)
        self._cuda.set_stream(self._finetune)

    def set_decode(self, units: int) -> None:
        stream = self.decode_streams[units]
        if stream is self._decode:
            return
        _follow(self._decode_event, self._decode, stream)
        self._cuda.set_stream(stream)
        self._decode = stream
        self.decode_switched(units, stream)

    def set_finetune(self, units: int) -> None:
        """A unit on the whole device starts, on the device, after the decode work that has been submitted."""
        stream = self.finetune_streams[units]
        if stream is not self._finetune:
            _follow(self._finetune_event, self._finetune, stream)
            self._cuda.set_stream(stream)
            self._finetune = stream
        if units == self.units:
            _follow(self._finetune_event, self._decode, stream)

    def timer(self) -> EventTimer:
        return EventTimer(self._cuda)

    def wait_finetune(self) -> None:
        self._unit_event.record(self._finetune)
        self._unit_event.synchronize()

    def decode_after_finetune(self) -> None:
        """What decode submits from here on starts, on the device, after the units submitted so far.

        With ``set_finetune(units)`` before, this makes a window in which finetuning has the whole device,
        ordered by the streams alone.
        """
        _follow(self._decode_event, self._finetune, self._decode)


def group_counts(sizes: tuple[int, ...], sms: int, parts: tuple[float, ...] = DECODE_PARTS) -> list[int]:
    """How many of the first groups decode has in each split, largest first; no split leaves a side without a group.

    Args:
        sizes: SMs of every group.
        sms: SMs of the device.
        parts: decode's fractions of the device.
    """
    reached = list(accumulate(sizes))
    counts = {1 + min(range(len(sizes)), key=lambda i: abs(reached[i] - part * sms)) for part in parts if sizes}
    return sorted((count for count in counts if count < len(sizes)), reverse=True)


def _make_splits(groups: SmGroups, device: int, cuda: Any) -> dict[Share, tuple[Stream, Stream]]:
    """Decode's and finetuning's stream of each split, largest decode part first. Raises GreenContextError."""
    splits = {}
    for count in group_counts(groups.sizes, groups.sms):
        decode, finetune = groups.first(count), groups.after(count)
        splits[Share(decode.sms, finetune.sms)] = (
            cuda.ExternalStream(decode.stream(DECODE_PRIORITY), device=device),
            cuda.ExternalStream(finetune.stream(FINETUNE_PRIORITY), device=device),
        )
    return splits


def _follow(event: Any, first: Stream, then: Stream) -> None:
    """Let ``then`` wait, on the device, for what has been submitted to ``first``."""
    event.record(first)
    then.wait_event(event)


def _ignore(units: int, stream: Stream) -> None:
    """Nothing depends on decode's stream yet."""
