"""A GPU to test against without one: its driver's green contexts, and streams that know what runs before what."""

from __future__ import annotations

import threading
from enum import Enum
from types import SimpleNamespace
from typing import Any


class CUresult(Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION = 914
    CUDA_ERROR_NOT_SUPPORTED = 801


def resource(sms: frozenset[int]) -> Any:
    return SimpleNamespace(sm=SimpleNamespace(smCount=len(sms)), sms=sms)


class Driver:
    """The functions of ``cuda.bindings.driver`` that Harli calls; a context is the set of its SMs."""

    CUresult = CUresult
    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM="sm")
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT="sms")

    def __init__(self, sms: int, *, group: int = 8, joins_rest: bool = True, failing: str = "") -> None:
        """``group``: SMs per group at least. ``joins_rest``: ungrouped SMs can be joined to groups."""
        self.sms = sms
        self.group = group
        self.joins_rest = joins_rest
        self.failing = failing
        self.rest: frozenset[int] = frozenset()
        self.streams: dict[int, tuple[frozenset[int], int]] = {}
        """SMs and priority of every stream."""

    def __getattribute__(self, name: str) -> Any:
        if name == object.__getattribute__(self, "__dict__").get("failing"):
            return lambda *arguments: (CUresult.CUDA_ERROR_NOT_SUPPORTED, *[None] * 3)
        return object.__getattribute__(self, name)

    def cuInit(self, flags: int) -> Any:
        return (CUresult.CUDA_SUCCESS,)

    def cuDeviceGet(self, ordinal: int) -> Any:
        return CUresult.CUDA_SUCCESS, ordinal

    def cuDeviceGetAttribute(self, kind: str, device: int) -> Any:
        return CUresult.CUDA_SUCCESS, self.sms

    def cuDriverGetVersion(self) -> Any:
        return CUresult.CUDA_SUCCESS, 13010

    def cuDeviceGetDevResource(self, device: int, kind: str) -> Any:
        return CUresult.CUDA_SUCCESS, resource(frozenset(range(self.sms)))

    def cuDevSmResourceSplitByCount(self, count: int, whole: Any, flags: int, least: int) -> Any:
        size = max(least, self.group)
        made = min(count, len(whole.sms) // size)
        groups = [resource(frozenset(range(i * size, (i + 1) * size))) for i in range(made)]
        self.rest = whole.sms - frozenset(range(made * size))
        unused = [resource(frozenset())] * (count - made)
        return CUresult.CUDA_SUCCESS, [*groups, *unused], made, resource(self.rest)

    def cuDevResourceGenerateDesc(self, resources: list[Any], count: int) -> Any:
        joined = frozenset().union(*(part.sms for part in resources))
        if count != len(resources) or not joined or (count > 1 and joined & self.rest and not self.joins_rest):
            return CUresult.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION, None
        return CUresult.CUDA_SUCCESS, joined

    def cuGreenCtxCreate(self, description: frozenset[int], device: int, flags: int) -> Any:
        return CUresult.CUDA_SUCCESS, description

    def cuGreenCtxGetDevResource(self, context: frozenset[int], kind: str) -> Any:
        return CUresult.CUDA_SUCCESS, resource(context)

    def cuGreenCtxStreamCreate(self, context: frozenset[int], flags: int, priority: int) -> Any:
        handle = len(self.streams) + 1
        self.streams[handle] = context, priority
        return CUresult.CUDA_SUCCESS, handle


class Stream:
    """Everything submitted to it runs after what is in ``before``."""

    def __init__(self, handle: int = 0) -> None:
        self.handle = handle
        self.before: frozenset[str] = frozenset()

    def submit(self, work: str) -> None:
        self.before |= {work}

    def wait_event(self, event: Event) -> None:
        self.before |= event.after


class Event:
    """Happens after what its stream held when it was recorded, at ``ms`` on the device's clock."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.after: frozenset[str] = frozenset()
        self.ms = 0.0
        self.waited = 0

    def record(self, stream: Stream | None = None) -> None:
        self.after = (stream or self._cuda.current).before
        self.ms = self._cuda.submitted_ms

    def query(self) -> bool:
        return self.ms <= self._cuda.reached_ms

    def synchronize(self) -> None:
        self.waited += 1

    def elapsed_time(self, other: Event) -> float:
        assert self.query()
        assert other.query()
        return other.ms - self.ms


class Graph:
    """Knows which work was submitted between begin and end of its capture, and on which stream."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.stream: Stream | None = None
        self.pool = 0
        self.captured: frozenset[str] = frozenset()
        self.ended = False

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        self.pool = pool
        self.stream = self._cuda.current
        self.captured = self.stream.before

    def capture_end(self) -> None:
        assert self.stream is self._cuda.current
        self.captured = self.stream.before - self.captured
        self.ended = True

    def replay(self) -> Graph:
        return self


class Cuda:
    """What is used of ``torch.cuda``. Submitted work ends at ``submitted_ms``; the device is at ``reached_ms``."""

    def __init__(self, sms: int) -> None:
        self.sms = sms
        self._default = Stream()
        self._threads = threading.local()
        self.events: list[Event] = []
        self.pools = 0
        self.submitted_ms = self.reached_ms = 0.0

    @property
    def current(self) -> Stream:
        """The calling thread's stream."""
        stream: Stream = getattr(self._threads, "stream", self._default)
        return stream

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    def CUDAGraph(self) -> Graph:
        return Graph(self)

    def get_device_properties(self, device: int) -> Any:
        return SimpleNamespace(multi_processor_count=self.sms)

    def Stream(self, device: int, priority: int) -> Stream:
        return Stream()

    def ExternalStream(self, handle: int, device: int) -> Stream:
        return Stream(handle)

    def Event(self, **options: bool) -> Event:
        self.events.append(Event(self))
        return self.events[-1]

    def current_stream(self) -> Stream:
        return self.current

    def set_stream(self, stream: Stream) -> None:
        self._threads.stream = stream
