"""CUDA green contexts: parts of one GPU's SMs, and streams whose kernels run on one part only.

All driver calls of Harli are here. The SMs are split once into small groups, and every part is a union
of groups, so that parts of different splits nest: the k-th group belongs either to decode or to
finetuning, whichever split each of them follows at the moment. Not yet run on a GPU.

CUDA driver API, "Green contexts" (driver 12.4 or newer): the remainder of a split has fewer guarantees
than its groups, above all about thread block clusters.
"""

from __future__ import annotations

import importlib
from typing import Any

GROUP_SMS = 8
"""SMs of a group: the fewest that Hopper (compute capability 9.0) grants; the driver rounds up where it must."""


class GreenContextError(RuntimeError):
    """The driver or the device cannot do what was asked; the message names the call."""


class SmGroups:
    """The SMs of one GPU, in groups of about ``GROUP_SMS``."""

    def __init__(self, device: int, driver: Any = None) -> None:
        """Split the SMs of the GPU with index ``device``.

        ``driver``: ``cuda.bindings.driver``, or a module with the same functions. Raises GreenContextError.
        """
        self._driver = bindings() if driver is None else driver
        self._call("cuInit", 0)
        (self._device,) = self._call("cuDeviceGet", device)
        kind = self._driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        (whole,) = self._call("cuDeviceGetDevResource", self._device, kind)
        self.sms: int = whole.sm.smCount
        """SMs of the whole GPU."""
        groups, count, rest = self._call(
            "cuDevSmResourceSplitByCount", self.sms // GROUP_SMS, whole, 0, min(GROUP_SMS, self.sms)
        )
        self._groups: list[Any] = list(groups)[:count]
        self._rest = rest if rest.sm.smCount and self._joins(rest) else None

    @property
    def sizes(self) -> tuple[int, ...]:
        """SMs of every group, in order; what could not be grouped is not among them."""
        return tuple(group.sm.smCount for group in self._groups)

    def parts(self, count: int) -> tuple[int, int]:
        """SMs of ``first(count)`` and of ``after(count)``; making no context takes no memory of the device."""
        rest = 0 if self._rest is None else self._rest.sm.smCount
        return sum(self.sizes[:count]), sum(self.sizes[count:]) + rest

    def first(self, count: int) -> GreenContext:
        """A context of the first ``count`` groups. Raises GreenContextError."""
        return self._context(self._groups[:count])

    def after(self, count: int) -> GreenContext:
        """A context of all other SMs; without the ungrouped ones if the driver does not join them to groups.

        Raises GreenContextError.
        """
        return self._context([*self._groups[count:], *([] if self._rest is None else [self._rest])])

    def _joins(self, rest: Any) -> bool:
        try:
            self._call("cuDevResourceGenerateDesc", [*self._groups[-1:], rest], len(self._groups[-1:]) + 1)
        except GreenContextError:
            return False
        return True

    def _context(self, resources: list[Any]) -> GreenContext:
        (description,) = self._call("cuDevResourceGenerateDesc", resources, len(resources))
        flags = self._driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        (handle,) = self._call("cuGreenCtxCreate", description, self._device, flags)
        kind = self._driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        (granted,) = self._call("cuGreenCtxGetDevResource", handle, kind)
        return GreenContext(granted.sm.smCount, handle, self)

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        return call(self._driver, name, *arguments)


class GreenContext:
    """A part of the SMs. It lasts as long as the process."""

    def __init__(self, sms: int, handle: Any, groups: SmGroups) -> None:
        self.sms = sms
        """SMs that the driver says it has."""
        self._handle = handle
        self._groups = groups

    def stream(self, priority: int) -> int:
        """A new stream, as the number that ``torch.cuda.ExternalStream`` takes.

        ``priority``: lower runs first; the driver clamps it to its range. Raises GreenContextError.
        """
        flags = self._groups._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        (stream,) = self._groups._call("cuGreenCtxStreamCreate", self._handle, flags, priority)
        return int(stream)


def call(driver: Any, name: str, *arguments: Any) -> tuple[Any, ...]:
    """The results of a driver call, without its status. Raises GreenContextError."""
    try:
        status, *results = getattr(driver, name)(*arguments)
    except (AttributeError, RuntimeError) as error:  # bindings or driver too old, or no driver at all
        raise GreenContextError(f"{name} is not to be had: {error}".splitlines()[0]) from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise GreenContextError(f"{name} failed with {status.name}")
    return tuple(results)


def cuda_version(driver: Any) -> str:
    """The newest CUDA version that the driver can do, as in "13.0". Raises GreenContextError."""
    (number,) = call(driver, "cuDriverGetVersion")
    return f"{number // 1000}.{number % 1000 // 10}"


def sm_count(device: int, driver: Any) -> int:
    """SMs of a GPU, without making a context on it. Raises GreenContextError."""
    kind = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    call(driver, "cuInit", 0)
    (handle,) = call(driver, "cuDeviceGet", device)
    (count,) = call(driver, "cuDeviceGetAttribute", kind, handle)
    return int(count)


def bindings() -> Any:
    """The module of the driver's functions. Raises GreenContextError."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise GreenContextError("the package cuda-bindings is not installed") from error
