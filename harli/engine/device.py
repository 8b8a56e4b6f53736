"""What this machine offers: kind, cores or SMs, the menu of shares, and versions of the libraries that matter."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from pathlib import Path
from typing import Any

from harli.types import HarliError, Menu

LIBRARIES = ("harli", "vllm", "torch", "transformers", "peft", "lightgbm", "mlflow")


def describe() -> dict[str, Any]:
    """Kind and size of the device; plain JSON values."""
    from vllm.platforms import current_platform

    from harli.compute import openmp
    from harli.compute.cores import cpu_quota, usable_cores

    if not current_platform.is_cpu():
        return _gpu(current_platform.device_type, current_platform.get_device_name())
    quota = cpu_quota()
    return {
        "kind": "cpu",
        "name": _processor(),
        "cores": len(usable_cores()),
        "quota_cpus": None if math.isinf(quota) else quota,
        "openmp": "libiomp5" if openmp.environment() else "libgomp",
    }


def menu() -> Menu:
    """The shares that the engine process will offer. Raises HarliError where there is no partitioner."""
    from vllm.platforms import current_platform

    from harli.compute import openmp
    from harli.compute.cores import usable_cores
    from harli.compute.cpu import core_menu

    if not current_platform.is_cpu():
        from harli.compute.cuda import sm_menu
        from harli.compute.green import GreenContextError

        try:
            return sm_menu()[0]
        except GreenContextError as error:
            raise HarliError(f"cannot ask the GPU's driver: {error}; install the cuda extra") from error
    return core_menu(len(usable_cores()), splits=bool(openmp.environment()))


def versions() -> dict[str, str]:
    """Versions of the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        for distribution in (name, f"{name}-cpu"):
            try:
                found[name] = importlib.metadata.version(distribution)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def _gpu(kind: str, name: str) -> dict[str, Any]:
    """What a driver says without a context on its device. Not yet run on a GPU."""
    from harli.compute.cuda import sm_menu
    from harli.compute.green import GreenContextError, bindings, cuda_version

    try:
        menu, reason = sm_menu()
        return {
            "kind": kind,
            "name": name,
            "sms": menu.decode_alone.decode,
            "driver": f"CUDA {cuda_version(bindings())}",
            "splits": reason or "green contexts",
        }
    except GreenContextError as error:
        return {"kind": kind, "name": name, "splits": f"none: {error}"}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
