"""SM splits, on a stand-in for driver and device: which SMs each stream has, and what runs after what."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest

from harli.compute.cuda import DECODE_PARTS, CudaPartitioner, group_counts, sm_menu
from harli.compute.green import GreenContextError, SmGroups, cuda_version
from tests.compute.gpu import Cuda, Driver

CALLS = [name for name in vars(Driver) if name.startswith("cu")]
OF_SPLITS = [name for name in CALLS if name not in ("cuDeviceGetAttribute", "cuDriverGetVersion")]
GPUS: dict[str, dict[str, Any]] = {
    "132 SMs": {"sms": 132},
    "132 SMs, the ungrouped ones stay alone": {"sms": 132, "joins_rest": False},
    "144 SMs, no ungrouped ones": {"sms": 144},
    "114 SMs in groups of 18": {"sms": 114, "group": 18},
    "20 SMs": {"sms": 20},
    "8 SMs": {"sms": 8},
}


def make(driver: Driver) -> CudaPartitioner:
    return CudaPartitioner(driver=driver, cuda=Cuda(driver.sms))


@pytest.fixture
def partitioner() -> CudaPartitioner:
    return make(Driver(132))


@pytest.fixture(params=GPUS)
def any_gpu(request: pytest.FixtureRequest) -> tuple[Driver, CudaPartitioner]:
    driver = Driver(**GPUS[request.param])
    return driver, make(driver)


def test_the_menu_of_an_h200(partitioner: CudaPartitioner) -> None:
    assert [str(share) for share in partitioner.menu.shares] == ["132/0", "112/20", "88/44", "64/68", "40/92", "0/132"]
    assert partitioner.reason == ""


def test_streams_of_both_sides_have_disjoint_sms_even_across_splits(any_gpu: tuple[Driver, CudaPartitioner]) -> None:
    driver, partitioner = any_gpu
    for decode, finetune in product(partitioner.decode_streams.items(), partitioner.finetune_streams.items()):
        if decode[0] + finetune[0] <= partitioner.units:
            assert not driver.streams[decode[1].handle][0] & driver.streams[finetune[1].handle][0]


def test_shares_say_what_the_driver_granted(any_gpu: tuple[Driver, CudaPartitioner]) -> None:
    driver, partitioner = any_gpu
    for share in partitioner.menu.splits:
        assert len(driver.streams[partitioner.decode_streams[share.decode].handle][0]) == share.decode
        assert len(driver.streams[partitioner.finetune_streams[share.finetune].handle][0]) == share.finetune
        left_out = 0 if driver.joins_rest else len(driver.rest)
        assert share.decode + share.finetune == driver.sms - left_out


def test_decode_goes_first_where_both_could_run() -> None:
    driver = Driver(132)
    partitioner = make(driver)
    share = partitioner.menu.splits[0]
    decode, finetune = partitioner.decode_streams[share.decode], partitioner.finetune_streams[share.finetune]
    assert driver.streams[decode.handle][1] < driver.streams[finetune.handle][1]


@pytest.mark.parametrize("call", OF_SPLITS)
def test_without_green_contexts_there_is_time_slicing_and_a_reason(call: str) -> None:
    partitioner = make(Driver(132, failing=call))
    assert [str(share) for share in partitioner.menu.shares] == ["132/0", "0/132"]
    assert partitioner.decode_streams.keys() == partitioner.finetune_streams.keys() == {132}
    assert call in partitioner.reason
    assert "driver 12.4 or newer" in partitioner.reason
    assert "\n" not in partitioner.reason


def test_a_driver_without_the_functions_is_named_too() -> None:
    class Old(Driver):
        @property
        def cuGreenCtxCreate(self) -> Any:  # type: ignore[override]
            raise AttributeError("no attribute")

    assert "cuGreenCtxCreate is not to be had" in make(Old(132)).reason


def test_without_the_bindings_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(GreenContextError, match="cuda-bindings is not installed"):
        SmGroups(0)


def test_the_stand_in_has_nothing_that_the_bindings_lack() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    assert all(hasattr(driver, name) for name in CALLS)
    assert driver.CUresult.CUDA_SUCCESS.name == "CUDA_SUCCESS"
    assert driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    assert driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    assert driver.CUstream_flags.CU_STREAM_NON_BLOCKING
    assert driver.CUdevResource().sm.smCount == 0
    assert int(driver.CUstream(5)) == 5


def submit_unit(partitioner: CudaPartitioner, units: int, name: str = "unit") -> frozenset[str]:
    """What a unit that finetuning's thread submits runs after."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_submit_unit, partitioner, units, name).result()


def _submit_unit(partitioner: CudaPartitioner, units: int, name: str) -> frozenset[str]:
    partitioner.adopt_finetune()
    partitioner.set_finetune(units)
    stream = partitioner._cuda.current
    assert stream is partitioner.finetune_streams[units]
    before: frozenset[str] = stream.before
    stream.submit(name)
    return before


@pytest.mark.parametrize("sizes", [(), (8,), (8, 8), (8,) * 16, (18,) * 6])
def test_every_split_leaves_both_sides_a_group(sizes: tuple[int, ...]) -> None:
    counts = group_counts(sizes, sum(sizes))
    assert counts == sorted(set(counts), reverse=True)
    assert all(0 < count < len(sizes) for count in counts)
    assert len(counts) == min(len(DECODE_PARTS), max(0, len(sizes) - 1))


def test_decode_stays_in_order_when_its_share_changes(partitioner: CudaPartitioner) -> None:
    cuda = partitioner._cuda
    cuda.current.submit("loading")
    partitioner.adopt_decode()
    for step, units in enumerate([112, 112, 40, 132, 88, 112]):
        partitioner.set_decode(units)
        assert cuda.current is partitioner.decode_streams[units]
        assert cuda.current.before >= {"loading", *(f"step {i}" for i in range(step))}
        cuda.current.submit(f"step {step}")


def test_a_split_lets_both_sides_run_at_once(partitioner: CudaPartitioner) -> None:
    partitioner.adopt_decode()
    partitioner.set_decode(112)
    partitioner._cuda.current.submit("step")
    assert "step" not in submit_unit(partitioner, 20)
    partitioner.set_decode(88)
    assert "unit" not in partitioner._cuda.current.before


def test_a_unit_on_the_whole_device_starts_after_decode(partitioner: CudaPartitioner) -> None:
    partitioner.adopt_decode()
    partitioner.set_decode(112)
    for unit in range(2):
        partitioner._cuda.current.submit(f"step {unit}")
        assert f"step {unit}" in submit_unit(partitioner, 132)


def test_a_window_is_ordered_by_the_streams(partitioner: CudaPartitioner) -> None:
    partitioner.adopt_decode()
    partitioner._cuda.current.submit("step")
    assert "step" in submit_unit(partitioner, 132)
    partitioner.decode_after_finetune()
    partitioner.set_decode(112)
    assert partitioner._cuda.current.before >= {"step", "unit"}


def test_units_stay_in_order_when_their_share_changes(partitioner: CudaPartitioner) -> None:
    for unit, units in enumerate([20, 44, 132, 44]):
        before = submit_unit(partitioner, units, f"unit {unit}")
        assert before >= {f"unit {i}" for i in range(unit)}


def work_waited_for(partitioner: CudaPartitioner, wait: Callable[[], None]) -> set[str]:
    """What ``wait`` waits for while a step and a unit are on their way."""
    partitioner.adopt_decode()
    partitioner._cuda.current.submit("step")
    submit_unit(partitioner, 20)
    wait()
    (waited,) = [event for event in partitioner._cuda.events if event.waited]
    return set(waited.after)


def test_waiting_for_a_unit_waits_for_finetuning_alone(partitioner: CudaPartitioner) -> None:
    assert work_waited_for(partitioner, partitioner.wait_finetune) == {"unit"}


def test_who_depends_on_decodes_stream_is_told_of_changes_only(partitioner: CudaPartitioner) -> None:
    told: list[tuple[int, Any]] = []
    partitioner.decode_switched = lambda units, stream: told.append((units, stream))
    for units in (132, 112, 112, 40):
        partitioner.set_decode(units)
    assert told == [(units, partitioner.decode_streams[units]) for units in (112, 40)]


def test_the_menu_is_known_without_a_context(any_gpu: tuple[Driver, CudaPartitioner]) -> None:
    driver, partitioner = any_gpu
    streams = len(driver.streams)
    assert sm_menu(driver=driver) == (partitioner.menu, partitioner.reason)
    assert len(driver.streams) == streams


def test_without_green_contexts_that_menu_has_no_splits_either() -> None:
    menu, reason = sm_menu(driver=Driver(132, failing="cuDevSmResourceSplitByCount"))
    assert [str(share) for share in menu.shares] == ["132/0", "0/132"]
    assert "cuDevSmResourceSplitByCount" in reason


def test_the_drivers_version() -> None:
    assert cuda_version(Driver(132)) == "13.1"
    with pytest.raises(GreenContextError, match="cuDriverGetVersion failed"):
        cuda_version(Driver(132, failing="cuDriverGetVersion"))


def test_a_units_time_is_the_devices(partitioner: CudaPartitioner) -> None:
    cuda = partitioner._cuda

    def unit() -> None:
        cuda.submitted_ms = cuda.reached_ms = 7.5

    assert partitioner.run_finetune(unit) == 7.5


def test_waiting_for_decode_waits_for_decode_alone(partitioner: CudaPartitioner) -> None:
    assert work_waited_for(partitioner, partitioner.wait_decode) == {"step"}


def test_a_record_is_of_the_streams_work(partitioner: CudaPartitioner) -> None:
    cuda = partitioner._cuda
    partitioner.adopt_finetune()
    partitioner.set_finetune(44)
    replay: Any = partitioner.recorder()(lambda: cuda.current.submit("unit"))
    graph = replay()
    assert graph.captured == {"unit"}
    assert graph.stream is partitioner.finetune_streams[44]


def test_graphs_share_a_memory_pool_as_long_as_there_is_one_of_them(partitioner: CudaPartitioner) -> None:
    record = partitioner.recorder()
    first, second = record(lambda: None), record(lambda: None)
    assert [replay().pool for replay in (first, second)] == [1, 1]  # type: ignore[attr-defined]
    del first, second
    assert record(lambda: None)().pool == 2  # type: ignore[attr-defined]


def test_a_capture_that_fails_is_ended(partitioner: CudaPartitioner, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = partitioner._cuda.CUDAGraph()
    monkeypatch.setattr(partitioner._cuda, "CUDAGraph", lambda: graph)
    with pytest.raises(ZeroDivisionError):
        partitioner.recorder()(lambda: 1 // 0)  # type: ignore[arg-type]
    assert graph.ended
