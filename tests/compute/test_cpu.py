"""Core splits: the menu, and where the threads of both teams really run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from harli.compute import openmp
from harli.compute.cores import usable_cores
from harli.compute.cpu import MAX_SPLITS, CpuPartitioner, core_menu


def names(cores: int, **options: bool) -> list[str]:
    return [str(share) for share in core_menu(cores, **options).shares]


@pytest.mark.parametrize(
    ("cores", "shares"),
    [
        (1, "1/0 0/1"),
        (2, "2/0 1/1 0/2"),
        (3, "3/0 2/1 1/2 0/3"),
        (8, "8/0 7/1 6/2 5/3 4/4 3/5 2/6 1/7 0/8"),
        (64, "64/0 56/8 48/16 40/24 32/32 24/40 16/48 8/56 0/64"),
    ],
)
def test_menu(cores: int, shares: str) -> None:
    assert names(cores) == shares.split()


@pytest.mark.parametrize("cores", [1, 2, 7, 8, 9, 10, 13, 27, 100, 129])
def test_splits_use_every_core_and_are_about_even(cores: int) -> None:
    menu = core_menu(cores)
    assert len(menu.splits) == min(cores - 1, MAX_SPLITS)
    assert {share.decode + share.finetune for share in menu.shares} == {cores}
    finetune = [share.finetune for share in menu.shares]
    steps = [after - before for before, after in pairwise(finetune)]
    assert max(steps) - min(steps) <= 1


def test_without_splits_there_is_time_slicing() -> None:
    assert names(8, splits=False) == ["8/0", "0/8"]


SCRIPT = """
import json, os, threading, time, torch
from harli.compute.cores import usable_cores
from harli.compute.cpu import CpuPartitioner

def masks(threads):
    return {thread: sorted(os.sched_getaffinity(thread)) for thread in threads}

def cpu_ns():
    used = {}
    for tid in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{tid}/schedstat") as file:
            used[int(tid)] = int(file.read().split()[0])
    return used

def work():
    torch.ones(len(cores) << 20).add_(1.0)

def workers(others):
    "The calling thread and its team: those that get work done."
    before, until = cpu_ns(), time.thread_time() + 0.15
    while time.thread_time() < until:
        work()
    after = cpu_ns()
    return [tid for tid in after if tid not in others and after[tid] - before.get(tid, 0) > 2e7]

def switch(set_units):
    for _ in range(50):
        for units in (1, len(cores)):
            set_units(units)
            work()

def describe(adopt, set_units, others):
    adopt()
    before = masks(workers(others))
    switch(set_units)
    return {"first": threading.get_native_id(), "masks": before, "again": masks(workers(others))}

partitioner = CpuPartitioner(usable_cores()[:4])
cores = partitioner.cores
work()  # an engine has had its team for long when a run begins
found = {"cores": cores, "shares": [str(share) for share in partitioner.menu.shares]}
found["decode"] = describe(partitioner.adopt_decode, partitioner.set_decode, set())
of_decode = set(found["decode"]["masks"])

def finetuning():
    found["finetune"] = describe(partitioner.adopt_finetune, partitioner.set_finetune, of_decode)

thread = threading.Thread(target=finetuning)
thread.start()
thread.join()
found["decode_later"] = masks(of_decode)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> Any:
    """What the partitioner does in a process with the runtime that keeps workers."""
    environment = os.environ | openmp.environment()
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


needs_splits = pytest.mark.skipif(
    not openmp.environment() or len(usable_cores()) < 2, reason="no OpenMP runtime that keeps workers, or one core"
)


@needs_splits
@pytest.mark.parametrize("side", ["decode", "finetune"])
def test_each_thread_of_a_team_sits_on_its_core(found: Any, side: str) -> None:
    cores = found["cores"] if side == "decode" else found["cores"][::-1]
    team = found[side]
    assert sorted(team["masks"].values()) == [[core] for core in sorted(cores)]
    assert team["masks"][str(team["first"])] == [cores[0]]


@needs_splits
@pytest.mark.parametrize("side", ["decode", "finetune"])
def test_switching_shares_keeps_threads_and_pins(found: Any, side: str) -> None:
    team = found[side]
    assert team["again"] == team["masks"]


@needs_splits
def test_the_teams_are_apart(found: Any) -> None:
    assert not set(found["decode"]["masks"]) & set(found["finetune"]["masks"])
    assert found["decode_later"] == found["decode"]["masks"]


@needs_splits
def test_with_the_runtime_there_are_splits(found: Any) -> None:
    assert found["shares"] == names(len(found["cores"]))


def test_without_it_there_are_none_and_nothing_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KMP_HOT_TEAMS_MODE", raising=False)
    partitioner = CpuPartitioner((0, 1, 2))
    assert [str(share) for share in partitioner.menu.shares] == ["3/0", "0/3"]
    allowed, team = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        partitioner.adopt_decode()
        assert torch.get_num_threads() == 3
        assert os.sched_getaffinity(0) == allowed
    finally:
        openmp.set_team_size(team)


def test_the_environment_keeps_what_is_preloaded_already(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "lib" / "libiomp5.so"
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert openmp.environment() == {}
    library.parent.mkdir()
    library.touch()
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert openmp.environment()["LD_PRELOAD"] == str(library)
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc.so.4")
    assert openmp.environment()["LD_PRELOAD"] == f"{library}:libtcmalloc.so.4"
    monkeypatch.setenv("LD_PRELOAD", "other/libiomp5.so")
    assert openmp.environment()["LD_PRELOAD"] == "other/libiomp5.so"
