"""Which cores to run on: affinity, and a container's quota."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from harli.compute.cores import cpu_quota, usable_cores


def v1(root: Path, quota_us: str, period_us: str) -> None:
    (root / "cpu").mkdir()
    (root / "cpu/cpu.cfs_quota_us").write_text(quota_us)
    (root / "cpu/cpu.cfs_period_us").write_text(period_us)


@pytest.mark.parametrize(
    ("content", "cpus"),
    [("200000 100000\n", 2.0), ("150000 100000\n", 1.5), ("max 100000\n", math.inf), ("50000 100000\n", 0.5)],
)
def test_cgroup_v2(tmp_path: Path, content: str, cpus: float) -> None:
    (tmp_path / "cpu.max").write_text(content)
    assert cpu_quota(tmp_path) == cpus


@pytest.mark.parametrize(("quota_us", "cpus"), [("400000\n", 4.0), ("250000\n", 2.5), ("-1\n", math.inf)])
def test_cgroup_v1(tmp_path: Path, quota_us: str, cpus: float) -> None:
    v1(tmp_path, quota_us, "100000\n")
    assert cpu_quota(tmp_path) == cpus


def test_the_tightest_group_on_the_way_counts(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("0::/user.slice/job\n")
    (root / "user.slice" / "job").mkdir(parents=True)
    (root / "user.slice" / "cpu.max").write_text("150000 100000")
    (root / "user.slice" / "job" / "cpu.max").write_text("max 100000")
    assert cpu_quota(root, own) == 1.5
    own.write_text("0::/not/visible/from/here\n")
    assert cpu_quota(root, own) == math.inf


def test_v2_goes_before_v1(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000")
    v1(tmp_path, "400000", "100000")
    assert cpu_quota(tmp_path) == 1.0


def test_without_a_readable_file_there_is_no_limit(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) == math.inf
    (tmp_path / "cpu.max").write_text("what\n")
    assert cpu_quota(tmp_path) == math.inf
    v1(tmp_path, "", "")
    assert cpu_quota(tmp_path) == math.inf


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        (math.inf, (1, 3, 5, 8)),
        (64.0, (1, 3, 5, 8)),
        (4.0, (1, 3, 5, 8)),
        (3.9, (1, 3, 5)),
        (1.0, (1,)),
        (0.3, (1,)),
    ],
)
def test_cores_of_the_mask_no_more_than_the_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float, cores: tuple[int, ...]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {8, 3, 1, 5})
    assert usable_cores(quota) == cores


def test_cores_follow_the_affinity_of_the_process() -> None:
    before = os.sched_getaffinity(0)
    last = max(before)
    try:
        os.sched_setaffinity(0, {last})
        assert usable_cores(math.inf) == (last,)
    finally:
        os.sched_setaffinity(0, before)
