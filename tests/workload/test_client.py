"""The open-loop client against an engine of a few lines whose timing is known."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from harli.workload.base import Request, Workload
from harli.workload.client import OpenLoopClient, TokenTimes

pytest.importorskip("vllm")
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.metrics.stats import RequestStateStats

HANG_S = 20.0
VOCAB = 100


def counts(client: OpenLoopClient) -> tuple[int, int, int]:
    """Requests that run, that finished, and that failed."""
    failed = sum(bool(record.error) for record in client.records)
    return client.running, len(client.records) - failed, failed


class Engine:
    """Streams the tokens asked for, in deltas of ``delta``; ``before_token(request, n)`` decides when and whether."""

    def __init__(self, before_token: Callable[[int, int], Awaitable[None]], *, delta: int = 1, stats: bool = True):
        self.before_token = before_token
        self.delta = delta
        self.stats = stats
        self.prompts: dict[str, list[int]] = {}
        self.scheduled_s: list[float] = []
        self.finished: list[str] = []
        self.aborted: list[str] = []

    async def generate(self, prompt: dict[str, list[int]], params: Any, request_id: str) -> AsyncIterator[Any]:
        self.prompts[request_id] = prompt["prompt_token_ids"]
        number = len(self.scheduled_s)
        self.scheduled_s.append(time.monotonic())
        metrics = RequestStateStats(scheduled_ts=self.scheduled_s[-1]) if self.stats else None
        try:
            for first in range(0, params.max_tokens, self.delta):
                await self.before_token(number, first)
                count = min(self.delta, params.max_tokens - first)
                last = first + count == params.max_tokens
                completion = CompletionOutput(0, "", [7] * count, None, None, finish_reason="length" if last else None)
                yield RequestOutput(request_id, None, None, None, [completion], last, metrics)
        except asyncio.CancelledError:
            self.aborted.append(request_id)
            raise
        self.finished.append(request_id)


async def at_once(request: int, token: int) -> None:
    await asyncio.sleep(0)


def workload(*requests: tuple[float, int, int]) -> Workload:
    return Workload("w", tuple(Request(*request) for request in requests))


def client(engine: Engine, load: Workload, seed: int = 0) -> OpenLoopClient:
    return OpenLoopClient(engine, load, vocab_size=VOCAB, seed=seed)


def finish(client: OpenLoopClient, clock_zero: float | None = None) -> None:
    async def run() -> None:
        await asyncio.wait_for(client.run(clock_zero), HANG_S)

    asyncio.run(run())


def test_a_slow_request_does_not_delay_the_next() -> None:
    second_done = asyncio.Event()

    async def first_waits_for_the_second(request: int, token: int) -> None:
        if request == 0:
            await second_done.wait()
        elif token == 2:
            second_done.set()

    loop = client(Engine(first_waits_for_the_second), workload((0.0, 4, 3), (0.01, 4, 3)))
    finish(loop)
    assert [record.request_id for record in loop.records] == ["w-1", "w-0"]
    assert not any(record.error for record in loop.records)
    assert counts(loop) == (0, 2, 0)


def test_requests_are_not_sent_before_they_are_due() -> None:
    engine = Engine(at_once)
    zero = time.monotonic()
    finish(client(engine, workload((0.0, 4, 1), (0.05, 4, 1), (0.1, 4, 1))), zero)
    assert all(sent >= zero + due for sent, due in zip(engine.scheduled_s, (0.0, 0.05, 0.1), strict=True))


def test_latencies_of_a_request() -> None:
    async def slow_tokens(request: int, token: int) -> None:
        await asyncio.sleep(0.03 if token == 0 else 0.01)

    engine = Engine(slow_tokens)
    loop = client(engine, workload((0.02, 4, 3)))
    zero = time.monotonic()
    finish(loop, zero)
    (record,) = loop.records
    assert record.queue_wait_ms == pytest.approx((engine.scheduled_s[0] - zero - 0.02) * 1e3)
    assert record.ttft_ms >= record.queue_wait_ms + 29.9
    assert len(record.itl_ms) == 2
    assert min(record.itl_ms) >= 9.9
    assert record.tpot_ms == pytest.approx(sum(record.itl_ms) / 2)
    assert record.finished_s * 1e3 >= 20.0 + record.ttft_ms + sum(record.itl_ms)
    assert (record.arrival_s, record.prompt_tokens, record.output_tokens, record.error) == (0.02, 4, 3, "")


def test_the_clients_own_lag_counts() -> None:
    loop = client(Engine(at_once), workload((1.0, 4, 2)))
    finish(loop, time.monotonic() - 6.0)
    (record,) = loop.records
    assert min(record.ttft_ms, record.queue_wait_ms) >= 5000.0
    assert max(record.itl_ms) < 5000.0
    assert record.finished_s >= 6.0


def test_several_tokens_at_once_have_one_gap() -> None:
    times = TokenTimes(10.0)
    for tokens, now in ((2, 10.5), (0, 10.6), (3, 10.75), (1, 11.0)):
        times.add(tokens, now)
    assert times.count == 6
    assert times.ttft_ms == pytest.approx(500.0)
    assert times.itl_ms == pytest.approx([0.0, 250.0, 0.0, 0.0, 250.0])


def test_deltas_of_several_tokens_are_counted() -> None:
    loop = client(Engine(at_once, delta=4), workload((0.0, 4, 10)))
    finish(loop)
    (record,) = loop.records
    assert record.error == ""
    assert len(record.itl_ms) == 9
    assert [gap == 0.0 for gap in record.itl_ms[:3]] == [True] * 3


def test_one_token_has_no_gap_and_no_statistics_no_queue_wait() -> None:
    loop = client(Engine(at_once, stats=False), workload((0.0, 4, 1)))
    finish(loop)
    (record,) = loop.records
    assert record.itl_ms == ()
    assert math.isnan(record.tpot_ms)
    assert math.isnan(record.queue_wait_ms)
    assert record.ttft_ms >= 0.0


def test_a_request_that_raises_stops_no_other() -> None:
    async def first_breaks(request: int, token: int) -> None:
        await asyncio.sleep(0)
        if request == 0 and token == 2:
            raise RuntimeError("KV cache\nis gone") from None
        if request == 1 and token == 0:
            raise RuntimeError from OSError("socket closed")

    loop = client(Engine(first_breaks), workload((0.0, 4, 5), (0.0, 4, 5), (0.01, 4, 5)))
    finish(loop)
    broken, wrapped, fine = sorted(loop.records)
    assert broken.error == "RuntimeError: KV cache is gone"
    assert len(broken.itl_ms) == 1
    assert wrapped.error == "OSError: socket closed"
    assert math.isnan(wrapped.ttft_ms)
    assert (fine.error, len(fine.itl_ms)) == ("", 4)
    assert counts(loop) == (0, 1, 2)


def test_a_request_that_ends_early_has_failed() -> None:
    class Aborting(Engine):
        async def generate(self, prompt: dict[str, list[int]], params: Any, request_id: str) -> AsyncIterator[Any]:
            yield RequestOutput(request_id, None, None, None, [CompletionOutput(0, "", [7, 7], None, None)], False)
            end = CompletionOutput(0, "", [], None, None, finish_reason="abort")
            yield RequestOutput(request_id, None, None, None, [end], True)

    loop = client(Aborting(at_once), workload((0.0, 4, 5)))
    finish(loop)
    assert loop.records[0].error == "ended after 2 of 5 tokens (abort)"
    assert counts(loop)[2] == 1


def test_cancelling_aborts_what_is_in_flight() -> None:
    stuck = asyncio.Event()

    async def second_hangs(request: int, token: int) -> None:
        await asyncio.sleep(0)
        if request == 1 and token == 2:
            stuck.set()
            await asyncio.Event().wait()

    engine = Engine(second_hangs)
    loop = client(engine, workload((0.0, 4, 2), (0.01, 4, 5), (3600.0, 4, 2)))

    async def interrupt() -> None:
        task = asyncio.create_task(loop.run())
        await asyncio.wait_for(stuck.wait(), HANG_S)
        assert counts(loop) == (1, 1, 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(interrupt())
    assert (engine.finished, engine.aborted) == (["w-0"], ["w-1"])
    assert [(record.request_id, record.error) for record in loop.records] == [("w-0", ""), ("w-1", "cancelled")]
    assert len(loop.records[1].itl_ms) == 1
    assert counts(loop) == (0, 1, 1)


def test_every_run_with_a_seed_sees_the_same_prompts() -> None:
    load = workload((0.0, 50, 1), (0.0, 50, 1))
    prompts = []
    for seed in (5, 5, 6):
        engine = Engine(at_once)
        finish(client(engine, load, seed))
        prompts.append(engine.prompts)
    assert prompts[0] == prompts[1] != prompts[2]
    first, second = prompts[0].values()
    assert first != second
    assert len(first) == 50
    assert all(0 <= token < VOCAB for token in first + second)
    assert type(first[0]) is int
