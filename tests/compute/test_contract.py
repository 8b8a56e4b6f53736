"""What every partitioner keeps to, whatever its device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from harli.compute import cpu, openmp
from harli.compute.base import Partitioner
from harli.compute.cuda import CudaPartitioner
from tests.compute.gpu import Cuda, Driver


@pytest.fixture(params=["cpu", "cuda", "cuda without green contexts"])
def partitioner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Partitioner:
    if request.param == "cpu":
        monkeypatch.setattr(openmp, "keeps_workers", lambda: False)
        monkeypatch.setattr(openmp, "set_team_size", lambda size: None)
        return cpu.CpuPartitioner(tuple(sorted(os.sched_getaffinity(0))))
    failing = "cuGreenCtxCreate" if request.param.endswith("contexts") else ""
    return CudaPartitioner(driver=Driver(132, failing=failing), cuda=Cuda(132))


@pytest.fixture
def finetuning() -> Iterator[ThreadPoolExecutor]:
    """Finetuning's thread."""
    with ThreadPoolExecutor(1) as thread:
        yield thread


def test_every_share_of_the_menu_can_be_set(partitioner: Partitioner, finetuning: ThreadPoolExecutor) -> None:
    partitioner.adopt_decode()
    finetuning.submit(partitioner.adopt_finetune).result()
    for share in (*partitioner.menu.shares, *reversed(partitioner.menu.shares)):
        if share.decode:
            partitioner.set_decode(share.decode)
        if share.finetune:
            finetuning.submit(partitioner.set_finetune, share.finetune).result()
    assert partitioner.units == partitioner.menu.decode_alone.decode == partitioner.menu.finetune_alone.finetune


def test_a_units_work_is_done_when_its_time_is_known(partitioner: Partitioner, finetuning: ThreadPoolExecutor) -> None:
    finetuning.submit(partitioner.adopt_finetune).result()
    done: list[bool] = []
    assert finetuning.submit(partitioner.run_finetune, lambda: done.append(True)).result() >= 0.0
    assert done == [True]


def test_what_a_unit_raises_reaches_the_trainer(partitioner: Partitioner, finetuning: ThreadPoolExecutor) -> None:
    finetuning.submit(partitioner.adopt_finetune).result()
    with pytest.raises(ZeroDivisionError):
        finetuning.submit(partitioner.run_finetune, lambda: 1 // 0).result()  # type: ignore[arg-type]


def test_nothing_to_wait_for_is_not_waited_for(partitioner: Partitioner, finetuning: ThreadPoolExecutor) -> None:
    partitioner.adopt_decode()
    finetuning.submit(partitioner.adopt_finetune).result()
    partitioner.wait_decode()
    finetuning.submit(partitioner.wait_finetune).result()
