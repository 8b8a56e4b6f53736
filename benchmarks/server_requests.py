"""Open-loop Poisson requests through an unmodified OpenAI client, streamed and timed where a user is."""

from __future__ import annotations

import asyncio
import math
import time

import numpy as np
import openai

from harli.rows import RequestRecord
from harli.workload.base import Request
from harli.workload.client import TokenTimes

PROMPT_TOKENS = (16, 112)
OUTPUT_TOKENS = (20, 36)
"""Shortest and longest; meant to keep ``small`` on 2 cores busy for two thirds of the time at 1.2 requests/s."""
VOCABULARY = 200
"""Prompts are random token ids below, which every model has."""
WARM_UP_REQUESTS = 8


class Requests:
    """Each is sent when it is due, and recorded when it has ended; the same for the same seed."""

    def __init__(
        self, client: openai.AsyncOpenAI, model: str, *, requests_per_s: float, duration_s: float, seed: int
    ) -> None:
        self.records: list[RequestRecord] = []
        self._client = client.with_options(max_retries=0)
        self._model = model
        self._rng = np.random.default_rng(seed)
        expected = requests_per_s * duration_s
        gaps_s = self._rng.exponential(1.0 / requests_per_s, math.ceil(expected + 10.0 * math.sqrt(expected) + 10.0))
        arrivals_s = np.cumsum(gaps_s)
        self._requests = [self._request(at_s) for at_s in arrivals_s[arrivals_s < duration_s].tolist()]

    async def warm_up(self) -> None:
        """A few side by side, which are not recorded. To be called first."""
        now = time.monotonic()
        await asyncio.gather(*(self._serve(now, "warm-up", self._request(0.0)) for _ in range(WARM_UP_REQUESTS)))
        self.records.clear()

    async def run(self, began_s: float) -> None:
        """Send all and wait for their ends; those that cancelling cuts short are recorded as failed.

        ``began_s``: of ``time.monotonic()``; what arrivals count from.
        """
        async with asyncio.TaskGroup() as in_flight:
            for index, request in enumerate(self._requests):
                await asyncio.sleep(began_s + request.arrival_s - time.monotonic())
                in_flight.create_task(self._serve(began_s, f"request-{index}", request))

    async def _serve(self, began_s: float, id_: str, request: Request) -> None:
        times = TokenTimes(began_s + request.arrival_s)
        error = "cancelled"
        try:
            stream = await self._client.completions.create(
                model=self._model,
                prompt=self._rng.integers(VOCABULARY, size=request.prompt_tokens).tolist(),
                max_tokens=request.output_tokens,
                temperature=0.0,
                stream=True,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            async for part in stream:
                times.add(len(part.choices[0].model_extra["token_ids"]), time.monotonic())
            complete = times.count == request.output_tokens
            error = "" if complete else f"ended after {times.count} of {request.output_tokens} tokens"
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        finally:
            self.records.append(
                request.record(
                    id_,
                    ttft_ms=times.ttft_ms,
                    itl_ms=tuple(times.itl_ms),
                    queue_wait_ms=math.nan,  # cannot be seen from here
                    finished_s=time.monotonic() - began_s,
                    error=error,
                )
            )

    def _request(self, arrival_s: float) -> Request:
        prompt, output = (int(self._rng.integers(*ends, endpoint=True)) for ends in (PROMPT_TOKENS, OUTPUT_TOKENS))
        return Request(arrival_s, prompt, output)
