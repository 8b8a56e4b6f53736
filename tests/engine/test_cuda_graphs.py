"""Which graphs vLLM finds before a step, with plain objects for the model runner and its graphs."""

from __future__ import annotations

import importlib
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harli.compute.cuda import CudaPartitioner
from harli.engine import cuda_graphs
from harli.engine.cuda_graphs import DecodeGraphs, Slot, capture_splits, capturing_on, follow_stream, graph_slots
from harli.engine.launch import capture_sizes
from harli.types import HarliError
from tests.compute.gpu import Cuda, Driver


class Runner:
    """Captures as vLLM's V2 runner does: it refuses a batch size that it holds a graph for."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.cudagraph_manager = SimpleNamespace(graphs={})
        self.capture_model()

    def capture_model(self) -> None:
        for batch in (8, 1):
            assert batch not in self.cudagraph_manager.graphs
            self.cudagraph_manager.graphs[batch] = f"{batch} on {id(self._cuda.current)}"

    def replayed(self, batch: int) -> Any:
        return self.cudagraph_manager.graphs[batch]

    @cached_property
    def main_stream(self) -> Any:
        return self._cuda.current


@pytest.fixture
def cuda() -> Cuda:
    return Cuda(132)


@pytest.fixture
def partitioner(cuda: Cuda) -> CudaPartitioner:
    partitioner = CudaPartitioner(driver=Driver(132), cuda=cuda)
    partitioner.adopt_decode()
    return partitioner


@pytest.fixture
def runner(cuda: Cuda, partitioner: CudaPartitioner, monkeypatch: pytest.MonkeyPatch) -> Runner:
    runner = Runner(cuda)
    monkeypatch.setattr(cuda_graphs, "graph_slots", lambda runner: [Slot(runner.cudagraph_manager, "graphs")])
    monkeypatch.setattr(cuda_graphs, "CAPTURING_MODULES", ())
    return runner


def test_every_share_replays_graphs_of_its_own_stream(runner: Runner, partitioner: CudaPartitioner) -> None:
    capture_splits(runner, partitioner)
    for units in (132, 112, 40, 132, 64, 64, 88):
        partitioner.set_decode(units)
        for batch in (1, 8):
            assert runner.replayed(batch) == f"{batch} on {id(partitioner.decode_streams[units])}"


def test_vllm_returns_to_the_stream_that_decode_is_on(runner: Runner, partitioner: CudaPartitioner) -> None:
    first = runner.main_stream
    capture_splits(runner, partitioner)
    assert runner.main_stream is first is partitioner.decode_streams[132]
    partitioner.set_decode(112)
    assert runner.main_stream is partitioner.decode_streams[112]


def test_a_runner_that_asks_for_the_stream_each_time_is_left_alone() -> None:
    runner = SimpleNamespace()
    follow_stream(runner, "stream")
    assert vars(runner) == {}


def test_a_failed_capture_leaves_the_graphs_that_were_there() -> None:
    owner = SimpleNamespace(graphs={1: "alone"})
    graphs = DecodeGraphs([Slot(owner, "graphs")], 132)

    def fail() -> None:
        owner.graphs[1] = "half"
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        graphs.capture(112, fail)
    assert owner.graphs == {1: "alone"}


def test_all_slots_change_together() -> None:
    owners = [SimpleNamespace(graphs={1: f"alone {i}"}) for i in range(3)]
    graphs = DecodeGraphs([Slot(owner, "graphs") for owner in owners], 132)
    graphs.capture(112, lambda: [owner.graphs.update({1: f"split {i}"}) for i, owner in enumerate(owners)])
    for units, name in ((132, "alone"), (112, "split"), (132, "alone")):
        graphs.use(units)
        assert [owner.graphs[1] for owner in owners] == [f"{name} {i}" for i in range(3)]


def test_an_engine_without_graphs_is_refused() -> None:
    with pytest.raises(HarliError, match="no CUDA graphs"):
        graph_slots(SimpleNamespace(cudagraph_manager=SimpleNamespace(graphs={})))


def test_v2s_manager_is_found() -> None:
    manager = SimpleNamespace(graphs={1: "graph"})
    assert Slot(manager, "graphs") in graph_slots(SimpleNamespace(cudagraph_manager=manager))


def test_vllm_captures_on_the_stream_given_and_on_its_own_again_later() -> None:
    modules = [importlib.import_module(name) for name in cuda_graphs.CAPTURING_MODULES]
    own = [module.graph_capture for module in modules]
    stream = object()
    with capturing_on(stream):
        assert torch.cuda.graph.default_capture_stream is stream
        for module in modules:
            with module.graph_capture(device=torch.device("cpu")):
                pass
    assert [module.graph_capture for module in modules] == own
    assert torch.cuda.graph.default_capture_stream is not stream


@pytest.mark.parametrize("most", [1, 4, 20, 32, 256])
def test_every_batch_has_a_graph_to_be_padded_to(most: int) -> None:
    sizes = capture_sizes(most)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, most)
    assert len(sizes) < 24
