"""The open-loop client: it sends each request when it is due, whether or not earlier ones have finished."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from typing import TYPE_CHECKING

import numpy as np

from harli.rows import RequestRecord
from harli.workload.base import Request, Workload

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


class TokenTimes:
    """Latencies of one request, counted from ``due_s`` on a monotonic clock.

    Tokens that reach the client together have the measured gap once and gaps of 0 after it: so the
    gaps always add up to the time from the first token to the last.
    """

    def __init__(self, due_s: float) -> None:
        self.due_s = due_s
        self.count = 0
        self.ttft_ms = math.nan
        self.itl_ms: list[float] = []
        self._last_s = math.nan

    def add(self, tokens: int, now_s: float) -> None:
        """Note that ``tokens`` more output tokens arrived at ``now_s``."""
        if not tokens:
            return
        if self.count:
            self.itl_ms.append((now_s - self._last_s) * 1e3)
        else:
            self.ttft_ms = (now_s - self.due_s) * 1e3
        self.itl_ms.extend([0.0] * (tokens - 1))
        self.count += tokens
        self._last_s = now_s


class OpenLoopClient:
    """Drives an engine with a workload and measures each request's latencies where a user would.

    Latencies count from the time a request was due, so that a client that lags counts against the
    result. Prompts are random token ids below ``vocab_size``, which depend on the seed and on the
    request's place in the workload only: every policy sees the same ones. ``records`` has the requests
    that completed or failed so far, in that order, and may be read at any time.
    """

    def __init__(self, engine: AsyncLLM, workload: Workload, *, vocab_size: int, seed: int) -> None:
        self.records: list[RequestRecord] = []
        self._engine = engine
        self._workload = workload
        # Arrays, since a list of Python integers takes nine times the memory.
        self._prompts = [
            np.random.default_rng((seed, index)).integers(vocab_size, size=request.prompt_tokens, dtype=np.int32)
            for index, request in enumerate(workload.requests)
        ]
        self._cache_salt = uuid.uuid4().hex  # the same prompts in another run shall not find this one's prefixes
        self._clock_zero = math.nan
        self._engine_is_up = asyncio.Event()
        self._engine_is_up.set()
        self._sent = 0

    def pause(self) -> None:
        """Hold requests that are due back: the engine has died."""
        self._engine_is_up.clear()

    def use(self, engine: AsyncLLM) -> None:
        """Send the requests held back, and all later ones, to another engine."""
        self._engine = engine
        self._engine_is_up.set()

    @property
    def running(self) -> int:
        """Requests that have been sent and have not ended."""
        return self._sent - len(self.records)

    async def run(self, clock_zero: float | None = None) -> None:
        """Send every request and wait until the last has ended; to be called once.

        ``clock_zero`` is the ``time.monotonic()`` at which the run began, now by default. A request
        that raises is recorded with its error and stops no other. Cancelling this coroutine aborts
        the requests in flight in the engine and records them as failed, with the error "cancelled".
        """
        self._clock_zero = time.monotonic() if clock_zero is None else clock_zero
        async with asyncio.TaskGroup() as in_flight:
            for index, request in enumerate(self._workload.requests):
                await asyncio.sleep(self._clock_zero + request.arrival_s - time.monotonic())
                in_flight.create_task(self._serve(index, request))

    async def _serve(self, index: int, request: Request) -> None:
        """Send one request, follow it to its end and record it."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self._sent += 1
        request_id = f"{self._workload.name}-{index}"
        prompt = {"prompt_token_ids": self._prompts[index].tolist(), "cache_salt": self._cache_salt}
        params = SamplingParams(
            max_tokens=request.output_tokens,
            ignore_eos=True,
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        times = TokenTimes(self._clock_zero + request.arrival_s)
        queue_wait_ms, reason, error = math.nan, None, "cancelled"
        try:
            await self._engine_is_up.wait()
            async for output in self._engine.generate(prompt, params, request_id):
                completion = output.outputs[0]
                times.add(len(completion.token_ids), time.monotonic())
                reason = completion.finish_reason
                # The engine's clock is this host's monotonic clock too; 0 stands for "not yet".
                if output.metrics is not None and output.metrics.scheduled_ts:
                    queue_wait_ms = (output.metrics.scheduled_ts - times.due_s) * 1e3
            complete = times.count == request.output_tokens
            error = "" if complete else f"ended after {times.count} of {request.output_tokens} tokens ({reason})"
        except Exception as raised:
            # The engine wraps what went wrong in an exception without a message.
            cause = raised.__cause__ or raised
            error = " ".join(f"{type(cause).__name__}: {cause}".split())
        finally:
            self.records.append(
                request.record(
                    request_id,
                    ttft_ms=times.ttft_ms,
                    itl_ms=tuple(times.itl_ms),
                    queue_wait_ms=queue_wait_ms,
                    finished_s=time.monotonic() - self._clock_zero,
                    error=error,
                )
            )
