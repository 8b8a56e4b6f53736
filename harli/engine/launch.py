"""Starts vLLM with Harli's hooks inside."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from harli.compute import openmp
from harli.config import BATCHED_TOKENS, EngineSettings
from harli.engine.log import output_to
from harli.engine.support import why_refused
from harli.models import resolve_model
from harli.types import HarliError

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

Answer = TypeVar("Answer")
WORKER = "harli.engine.worker.HarliWorker"
GIB = 1 << 30
HEALTH_CHECK_S = 0.5
SAVE_POLL_S = 0.05
SAVE_TIMEOUT_S = 60.0


def prepare_environment() -> None:
    """Set what the engine process inherits and must have before it starts; call it before vLLM is imported."""
    os.environ |= openmp.environment()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker lives in the engine's process
    if torch.version.cuda is not None:  # a fork cannot use a GPU that was looked at
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is for results


def engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    """Arguments of vLLM's ``EngineArgs``. Raises HarliError for what cannot be co-located."""
    from transformers import AutoConfig
    from vllm.platforms import current_platform

    model = str(resolve_model(settings.model))
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise HarliError(f"cannot load model {settings.model!r}: {str(error).splitlines()[0]}") from error
    if reason := why_refused(config):
        raise HarliError(f"model {settings.model!r} is not supported: {reason}")
    cpu = current_platform.is_cpu()
    max_model_len = min(settings.max_model_len, config.max_position_embeddings)
    if cpu:
        _check_memory(settings, config, max_model_len)
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": settings.dtype,
        "seed": settings.seed,
        "max_model_len": max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": max(settings.max_num_seqs, BATCHED_TOKENS),
        "kv_cache_memory_bytes": int(settings.kv_cache_gib * GIB),
        "worker_cls": WORKER,
        "scheduler_cls": f"harli.engine.scheduler.{'HarliScheduler' if cpu else 'HarliAsyncScheduler'}",
        "enforce_eager": cpu,  # torch.compile takes a minute on CPU and hardly speeds up decode
        "disable_log_stats": False,  # request timestamps come with the statistics
    }
    if not cpu:
        # Compiling takes a minute at every start, and every set of graphs is captured once per split.
        arguments["compilation_config"] = {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": capture_sizes(settings.max_num_seqs),
        }
    if settings.role == "decode":
        from vllm.config import KVTransferConfig

        arguments["kv_transfer_config"] = KVTransferConfig(
            kv_connector="DecodeBenchConnector",
            kv_role="kv_both",
            kv_connector_extra_config={"startup_fill": True},
        )
    return arguments


def capture_sizes(most: int) -> list[int]:
    """Batch sizes up to ``most`` to capture decode graphs for; others are padded to the next of them."""
    return sorted({size for size in (1, 2, 4, 8, *range(16, most, 16)) if size < most} | {most})


def _check_memory(settings: EngineSettings, config: Any, max_model_len: int) -> None:
    """Raises HarliError if the KV cache does not fit into memory, or a request not into the KV cache."""
    import psutil

    available_gib = psutil.virtual_memory().available / GIB
    if settings.kv_cache_gib > available_gib:
        raise HarliError(
            f"a KV cache of {settings.kv_cache_gib:g} GiB does not fit into the {available_gib:.1f} GiB of memory "
            "that are free; make it smaller with --kv-cache-gib"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_value = 4 if settings.dtype == "float32" else 2
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * bytes_per_value
    needed_gib = per_token * max_model_len / GIB
    if settings.kv_cache_gib < needed_gib:
        raise HarliError(
            f"a request of {max_model_len} tokens needs a KV cache of {needed_gib:.3g} GiB, more than the "
            f"{settings.kv_cache_gib:g} GiB given; raise --kv-cache-gib or lower --max-model-len"
        )


@asynccontextmanager
async def launched(settings: EngineSettings, log: Path | None = None, **overrides: Any) -> AsyncIterator[AsyncLLM]:
    """A running engine.

    Args:
        settings: the decode instance.
        log: file for the engine's own output; the terminal without one.
        overrides: further arguments of vLLM's ``AsyncEngineArgs``.

    Raises HarliError if the engine does not start.
    """
    prepare_environment()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(**(engine_arguments(settings) | overrides))
    try:
        with output_to(log) if log else nullcontext():
            engine = AsyncLLM.from_engine_args(arguments)
    except (RuntimeError, ValueError) as error:
        await asyncio.sleep(0)  # Ctrl-C reaches the engine's process, too, which then fails: the run is cancelled here
        where = f"; {log} has the details" if log else ""
        raise HarliError(f"the engine did not start: {_cause(log) or str(error).splitlines()[0]}{where}") from error
    try:
        yield engine
    finally:
        engine.shutdown()
        engine.shutdown = lambda timeout=None: None  # its finalizer would call it again while Python exits


def _cause(log: Path | None) -> str:
    """The last error that the engine process wrote down; empty if there is none."""
    lines = log.read_text(errors="replace").splitlines() if log else []
    errors = [match[0] for line in lines if (match := re.search(r"\w+Error: .+", line))]
    return next((error for error in reversed(errors) if "core initialization failed" not in error), "")


async def command(engine: AsyncLLM, name: str, *args: Any) -> Any:
    """Run one of ``harli.engine.control.Control``'s commands.

    An ``error`` in its result becomes a HarliError. Raises vLLM's EngineDeadError when the engine is dead,
    or dies while the answer is awaited.
    """
    (result,) = await answer(engine, engine.collective_rpc("harli", args=(name, *args)))
    if isinstance(result, dict) and "error" in result:
        raise HarliError(result["error"])
    return result


async def answer(engine: AsyncLLM, asked: Coroutine[Any, Any, Answer]) -> Answer:
    """What the engine answers. Raises EngineDeadError when it is dead or dies meanwhile: vLLM would wait for ever."""
    from vllm.v1.engine.exceptions import EngineDeadError

    call = asyncio.ensure_future(asked)
    try:
        while not call.done():
            await asyncio.wait({call}, timeout=HEALTH_CHECK_S)
            if engine.errored and not call.done():
                raise EngineDeadError
    finally:
        call.cancel()
    return call.result()


async def finish(engine: AsyncLLM) -> dict[str, Any]:
    """End the job after its running unit, and wait until it is saved. Returns the last ``status``."""
    await command(engine, "finish")
    deadline = time.monotonic() + SAVE_TIMEOUT_S
    while True:
        status: dict[str, Any] = await command(engine, "status")
        if status["ended"] or time.monotonic() > deadline:
            return status
        await asyncio.sleep(SAVE_POLL_S)
