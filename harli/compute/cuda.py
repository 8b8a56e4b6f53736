"""SM splits: decode on some streaming multiprocessors of a GPU, finetuning on the others.

Each side has one stream per share it can have. Kernels of a split's streams stay on the split's SMs
(``harli.compute.green``); those of the two "alone" streams use the whole GPU. A CUDA graph keeps the SMs
of the stream it was captured on, so every share needs graphs of its own. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any
from weakref import WeakSet

import torch

from harli.compute.base import Partitioner, Recorder
from harli.compute.cuda_timing import EventTimer
from harli.compute.green import GreenContextError, SmGroups, bindings, sm_count
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
        sms = cuda.get_device_properties(device).multi_processor_count
        self.decode_streams: dict[int, Stream] = {sms: cuda.Stream(device, priority=DECODE_PRIORITY)}
        """Decode's stream for each number of SMs that it can have."""
        self.finetune_streams: dict[int, Stream] = {sms: cuda.Stream(device, priority=FINETUNE_PRIORITY)}
        splits: dict[Share, tuple[Stream, Stream]] = {}
        self.reason = ""
        """Why there are no splits; empty when there are some."""
        try:
            splits = _make_splits(SmGroups(device, driver), device, cuda)
        except GreenContextError as error:
            self.reason = _why(error)
        for share, (decode, finetune) in splits.items():
            self.decode_streams[share.decode] = decode
            self.finetune_streams[share.finetune] = finetune
        self.menu = Menu((Share(sms, 0), *splits, Share(0, sms)))
        self.decode_switched: Callable[[int, Stream], None] = _ignore
        """Called on decode's thread with its SMs and stream when they have changed."""
        self._decode = self.decode_streams[sms]
        self._finetune = self.finetune_streams[sms]
        self._decode_event, self._finetune_event = cuda.Event(), cuda.Event()
        # These are waited for: asleep rather than spinning, and without the interpreter's lock.
        self._drained, self._unit_began, self._unit_ended = (
            cuda.Event(blocking=True, enable_timing=timed) for timed in (False, True, True)
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

    def recorder(self) -> Recorder:
        """All graphs share a memory pool, so they must run in turn. The device is not synchronised."""
        pool: Any = None
        graphs: WeakSet[Any] = WeakSet()

        def record(work: Callable[[], None]) -> Callable[[], None]:
            nonlocal pool
            if not graphs:  # a pool ends with its last graph, and then takes no other
                pool = self._cuda.graph_pool_handle()
            graph = self._cuda.CUDAGraph()
            graphs.add(graph)
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
            replay: Callable[[], None] = graph.replay
            return replay

        return record

    def timer(self) -> EventTimer:
        return EventTimer(self._cuda)

    def wait_decode(self) -> None:
        self._drained.record(self._decode)
        self._drained.synchronize()

    def wait_finetune(self) -> None:
        self._unit_ended.record(self._finetune)
        self._unit_ended.synchronize()

    def run_finetune(self, work: Callable[[], None]) -> float:
        self._unit_began.record(self._finetune)
        work()
        self.wait_finetune()
        milliseconds: float = self._unit_began.elapsed_time(self._unit_ended)
        return milliseconds

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


def sm_menu(device: int = 0, driver: Any = None) -> tuple[Menu, str]:
    """The menu that a ``CudaPartitioner`` would have and its ``reason``, without a context on the device.

    Raises GreenContextError when there is no driver to ask.
    """
    driver = bindings() if driver is None else driver
    sms = sm_count(device, driver)
    splits: list[Share] = []
    reason = ""
    try:
        groups = SmGroups(device, driver)
        splits = [Share(*groups.parts(count)) for count in group_counts(groups.sizes, groups.sms)]
    except GreenContextError as error:
        reason = _why(error)
    return Menu((Share(sms, 0), *splits, Share(0, sms))), reason


def _why(error: GreenContextError) -> str:
    return f"SM splits need green contexts (driver 12.4 or newer, cuda-bindings): {error}"


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
