"""vLLM's worker with SM splits, for ``decode.py``: a share for every step, and units beside it. Not yet run."""

from __future__ import annotations

import threading
from collections import deque
from itertools import cycle
from typing import Any

import torch
from basics import MICROBATCH_TOKENS
from units import UnitLoop
from vllm.v1.worker.gpu_worker import Worker

from harli.compute.cuda import CudaPartitioner
from harli.engine.cuda_graphs import capture_splits


class SpikeWorker(Worker):
    """Its ``spike_`` methods are called through ``collective_rpc``."""

    def init_device(self) -> None:
        super().init_device()
        self._shares: Any = None
        self._rows: list[tuple[int, int, float, float]] = []
        self._submitted: deque[tuple[int, int]] = deque()
        self._units: deque[float] = deque()
        self._finetuning: threading.Thread | None = None
        self._finetuning_goes_on = False
        self._warm = threading.Event()
        self._failure = ""
        self._partitioner = CudaPartitioner(self.device.index or 0)
        self._partitioner.adopt_decode()
        self._timer = self._partitioner.timer()

    def compile_or_warm_up_model(self) -> Any:
        result = super().compile_or_warm_up_model()
        free = torch.cuda.mem_get_info()[0]
        capture_splits(self.model_runner, self._partitioner)
        self._graph_bytes = free - torch.cuda.mem_get_info()[0]
        return result

    def execute_model(self, scheduler_output: Any) -> Any:
        if self._shares is not None and scheduler_output.total_num_scheduled_tokens:
            units, scheduled = next(self._shares), scheduler_output.num_scheduled_tokens
            decoding = len(scheduled) if scheduler_output.total_num_scheduled_tokens == len(scheduled) else 0
            self._partitioner.set_decode(units)
            self._submitted.append((units, decoding))
            self._timer.begin()
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        if self._shares is not None:
            self._timer.end()
            self._harvest()
        return output

    def spike_about(self) -> dict[str, Any]:
        menu = self._partitioner.menu
        return {
            "units": self._partitioner.units,
            "splits": [str(share) for share in menu.splits],
            "reason": self._partitioner.reason,
            "runner": type(self.model_runner).__module__,
            "async_scheduling": self.scheduler_config.async_scheduling,
            "graphs_of_the_splits_mib": self._graph_bytes / 2**20,
        }

    def spike_shares(self, shares: list[int]) -> None:
        """Decode's SMs in the steps from here on, in turn."""
        self._shares = cycle(shares)
        self._timer.interrupt()

    def spike_take(self) -> list[tuple[int, int, float, float]]:
        """SMs, requests (0 with a prompt), latency and gap in milliseconds of the steps since the last call."""
        torch.cuda.synchronize()
        self._harvest()
        rows, self._rows = self._rows, []
        return rows

    def spike_finetune(self, units: int) -> str:
        """Run units on ``units`` SMs in a thread, from its return on until called with 0; what has gone wrong."""
        if self._finetuning is not None:
            self._finetuning_goes_on = False
            self._finetuning.join()
            self._finetuning = None
        if units:
            self._failure, self._finetuning_goes_on = "", True
            self._warm.clear()
            self._finetuning = threading.Thread(target=self._finetune, args=(units,), daemon=True)
            self._finetuning.start()
            self._warm.wait()
        return self._failure

    def spike_units(self) -> list[float]:
        """Milliseconds of the units since the last call."""
        return [self._units.popleft() for _ in range(len(self._units))]

    def _finetune(self, units: int) -> None:
        try:
            self._partitioner.adopt_finetune()
            loop = UnitLoop(self._partitioner, MICROBATCH_TOKENS)
            loop.run_pass(units)
            loop.capture(units)
            self._warm.set()
            while self._finetuning_goes_on:
                times = loop.run_pass(units)
                self._units.extend(device_ms for kind in times.values() for device_ms, _ in kind)
            self._failure = loop.captured.failure
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"
        finally:
            self._warm.set()

    def _harvest(self) -> None:
        while (time := self._timer.take()) is not None:
            self._rows.append((*self._submitted.popleft(), *time))
