"""The worker hook: applies the decision of a step, times the step, and takes our commands."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
from typing import Any

from vllm.platforms import current_platform

from harli.compute import openmp
from harli.compute.base import Partitioner
from harli.compute.cores import usable_cores
from harli.config import PolicySettings
from harli.engine import cpu_linear
from harli.engine.arrivals import ARRIVALS
from harli.engine.control import Control
from harli.engine.scheduler import DECISION
from harli.runtime import session
from harli.types import HarliError

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as BaseWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as BaseWorker

LOG = logging.getLogger("vllm.harli")
PR_SET_PDEATHSIG = 1


class HarliWorker(BaseWorker):  # type: ignore[misc]
    """vLLM's worker, unchanged but for what it does around a step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if multiprocessing.parent_process() is not None:
            os.setpgid(0, 0)  # a terminal's Ctrl-C is for the client, which still needs the engine to save
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # and no engine outlives its client

    def init_device(self) -> None:
        super().init_device()
        self._partitioner = _partitioner()
        self._session = session.Session(self._partitioner, ARRIVALS.pending)
        session.install(self._session)  # vLLM warms up on CUDA by calling our hooks

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        config = self.vllm_config.scheduler_config
        if not current_platform.is_cpu():
            super().load_model(*args, **kwargs)
            return
        openmp.set_team_size(len(usable_cores()))
        current_platform.get_punica_wrapper = lambda: "harli.engine.cpu_lora.LoraByAdapter"
        with cpu_linear.patched_linears(config.max_num_seqs, config.max_num_batched_tokens) as linears:
            super().load_model(*args, **kwargs)
        cpu_linear.warm_up(linears, config.max_num_seqs)

    def compile_or_warm_up_model(self) -> Any:
        result = super().compile_or_warm_up_model()
        if not current_platform.is_cpu():
            from harli.compute.cuda import CudaPartitioner
            from harli.engine.cuda_graphs import capture_splits

            assert isinstance(self._partitioner, CudaPartitioner)
            capture_splits(self.model_runner, self._partitioner)
        self._session.idle()
        self._control = Control(
            self._session,
            self.get_model(),
            self.model_config,
            self.scheduler_config.max_num_seqs,
            self.model_runner.kv_caches,
        )
        if (given := self.vllm_config.additional_config.get("harli")) is not None:
            begun = self._control.begin(**PolicySettings.model_validate(given).model_dump(mode="json"))
            if "error" in begun:
                raise HarliError(begun["error"])
        return result

    def execute_model(self, scheduler_output: Any) -> Any:
        if scheduler_output.total_num_scheduled_tokens:
            self._session.begin_step(getattr(scheduler_output, DECISION, None))
        output = super().execute_model(scheduler_output)
        if output is not None:
            self._session.end_step()
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        self._session.end_step()
        return output

    def shutdown(self) -> None:
        if hasattr(self, "_session"):
            self._session.close()
        super().shutdown()

    def harli(self, command: str, *args: Any) -> Any:
        """Run one of ``Control``'s commands (through vLLM's ``collective_rpc``)."""
        return getattr(self._control, command)(*args)


def _partitioner() -> Partitioner:
    if current_platform.is_cpu():
        from harli.compute.cpu import CpuPartitioner

        return CpuPartitioner()
    import torch

    from harli.compute.cuda import CudaPartitioner

    partitioner = CudaPartitioner(torch.cuda.current_device())
    if partitioner.reason:
        LOG.warning("time slicing only: %s", partitioner.reason)
    partitioner.adopt_decode()  # the model is loaded and its graphs are captured on decode's stream
    return partitioner
