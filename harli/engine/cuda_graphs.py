"""vLLM's decode CUDA graphs, one set for every number of SMs that decode can have. Not yet run on a GPU.

A graph keeps the SMs of the stream it was captured on. So vLLM captures its graphs once more on every
split's stream, and before a step the set of the step's stream is put where vLLM looks for its graphs.
All that depends on vLLM's version (written against 0.26) is in the functions after the class.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

from harli.compute.cuda import CudaPartitioner
from harli.types import HarliError


class Slot(NamedTuple):
    """An attribute in which vLLM keeps captured graphs, as a dictionary from batch shape to graph."""

    owner: Any
    name: str


class DecodeGraphs:
    """Sets of graphs, by the SMs of the stream they were captured on."""

    def __init__(self, slots: Sequence[Slot], units: int) -> None:
        """``units``: SMs of the stream that the graphs in ``slots`` now were captured on."""
        self._slots = tuple(slots)
        self._units = units
        self._sets: dict[int, tuple[dict[Any, Any], ...]] = {units: tuple(getattr(*slot) for slot in slots)}

    def capture(self, units: int, capture: Callable[[], object]) -> None:
        """Let ``capture`` fill the slots with a new set, for ``units`` SMs, and leave the present set in use."""
        present = self._units
        self._sets[units] = tuple({} for _ in self._slots)
        self.use(units)
        try:
            capture()
        finally:
            self.use(present)

    def use(self, units: int) -> None:
        """Put a set in place, with one assignment per slot."""
        if units == self._units:
            return
        for slot, graphs in zip(self._slots, self._sets[units], strict=True):
            setattr(slot.owner, slot.name, graphs)
        self._units = units


def capture_splits(runner: Any, partitioner: CudaPartitioner) -> DecodeGraphs:
    """Capture for every split of ``partitioner``, and let the graphs follow decode's stream from then on.

    Args:
        runner: vLLM's model runner, which has captured its graphs on a stream that uses the whole GPU.
        partitioner: adopted by the calling thread, which is decode's.

    Raises HarliError if vLLM keeps its graphs in a place that is not known here.
    """
    graphs = DecodeGraphs(graph_slots(runner), partitioner.units)
    for share in partitioner.menu.splits:  # none where there is time slicing only
        partitioner.set_decode(share.decode)
        with capturing_on(partitioner.decode_streams[share.decode]):
            graphs.capture(share.decode, runner.capture_model)
    partitioner.set_decode(partitioner.units)

    def switched(units: int, stream: Any) -> None:
        graphs.use(units)
        follow_stream(runner, stream)

    partitioner.decode_switched = switched
    follow_stream(runner, partitioner.decode_streams[partitioner.units])
    return graphs


# vLLM 0.26

CAPTURING_MODULES = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.cudagraph_utils")
"""Where the two model runners, V1 and V2 (the default for dense models), look up ``graph_capture``."""


def graph_slots(runner: Any) -> list[Slot]:
    """Where ``runner`` keeps its graphs: in wrappers around the (compiled parts of the) model, or in V2's manager."""
    from vllm.compilation.cuda_graph import CUDAGraphWrapper

    slots = [Slot(wrapper, "concrete_cudagraph_entries") for wrapper in CUDAGraphWrapper._all_instances]
    manager = getattr(runner, "cudagraph_manager", None)
    if manager is not None:
        slots.append(Slot(manager, "graphs"))
    if not any(getattr(*slot) for slot in slots):
        raise HarliError("vLLM holds no CUDA graphs where Harli looks for them; use vLLM 0.26 with decode graphs on")
    return slots


@contextmanager
def capturing_on(stream: Any) -> Iterator[None]:
    """While inside, vLLM captures on ``stream`` rather than on one of its own."""
    import torch

    @contextmanager
    def graph_capture(*args: Any, **kwargs: Any) -> Iterator[None]:
        """vLLM's does this, and prepares communication between ranks, of which there is one."""
        with torch.cuda.stream(stream):
            yield

    with ExitStack() as stack:
        for name in CAPTURING_MODULES:
            stack.enter_context(patch.object(importlib.import_module(name), "graph_capture", graph_capture))
        stack.enter_context(patch.object(torch.cuda.graph, "default_capture_stream", stream))
        yield


def follow_stream(runner: Any, stream: Any) -> None:
    """Tell V2's runner which stream decode is on: it looks once and then returns to that one after every copy."""
    if hasattr(type(runner), "main_stream"):
        runner.main_stream = stream
