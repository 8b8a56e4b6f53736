"""How many processor cores this process may use: affinity, and a container's CPU quota."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def cpu_quota(root: Path = CGROUP_ROOT, own: Path = OWN_CGROUP) -> float:
    """CPUs that the cgroups (v2 or v1) of this process let it use; infinite without a limit."""
    try:
        relative = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        relative = "/"
    group = Path(root, relative.lstrip("/"))
    limits = [_v2_limit(folder) for folder in (group, *group.parents) if folder.is_relative_to(root)]
    limits.append(_v2_limit(root))  # in a container the path may be the host's, which is not visible
    return min(limit if limit is not None else _v1_limit(root) for limit in limits)


def _v2_limit(folder: Path) -> float | None:
    """The limit of one group; None where there is no such file."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _v1_limit(root: Path) -> float:
    try:
        quota_us = int((root / "cpu/cpu.cfs_quota_us").read_text())
        period_us = int((root / "cpu/cpu.cfs_period_us").read_text())
        return quota_us / period_us if quota_us > 0 else math.inf
    except (OSError, ValueError):
        return math.inf


def usable_cores(quota: float | None = None) -> tuple[int, ...]:
    """Ids of the cores to run on: those of the affinity mask, no more of them than whole CPUs in the quota.

    A quota is time, not cores: using more cores than it covers gets all of them throttled together.
    """
    allowed = sorted(os.sched_getaffinity(0))
    limit = cpu_quota() if quota is None else quota
    return tuple(allowed[: max(1, int(min(limit, len(allowed))))])
