"""A burst that needs the whole KV cache while most of it is lent to a real job, on the real engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harli.config import FinetuneSettings
from harli.finetune.builtin import write_builtin_dataset
from harli.rows import StepRecord

BLOCKS = 80
"""KV blocks that the engine is left with."""


def shrink(worker: Any, blocks: int) -> tuple[int, int]:
    """Take all but the topmost ``blocks`` away from requests; the block size, and the most requests in a step."""
    scheduler = worker._session.lender._scheduler
    pool = scheduler.kv_cache_manager.block_pool
    worker.taken = pool.blocks[1:-blocks]
    pool.evict_blocks({block.block_id for block in worker.taken})
    pool.touch(worker.taken)
    worker.preemptions = []
    worker.preempt = scheduler._preempt_request

    def counted(request: Any, *args: Any, **kwargs: Any) -> None:
        worker.preemptions.append(request.request_id)
        worker.preempt(request, *args, **kwargs)

    scheduler._preempt_request = counted
    return scheduler.block_size, scheduler.max_num_running_reqs


def grow(worker: Any) -> None:
    scheduler = worker._session.lender._scheduler
    scheduler.kv_cache_manager.block_pool.free_blocks(worker.taken)
    scheduler._preempt_request = worker.preempt


def memory(worker: Any) -> dict[str, Any]:
    """How the KV cache stands."""
    session = worker._session
    scheduler = session.lender._scheduler
    return {
        "free": scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        "owned": session.lender.owned,
        "held": 0 if session.loan is None else session.loan.total - session.loan.held,
        "usage": scheduler.get_kv_cache_usage(),
        "preemptions": len(worker.preemptions),
    }


def reset_prefix_cache(worker: Any) -> bool:
    return bool(worker._session.lender._scheduler.reset_prefix_cache())


@pytest.fixture
def shrunk(host: Any) -> Iterator[tuple[int, int]]:
    """The engine with few blocks: their size, and the most requests in a step."""
    yield host.call_worker(shrink, BLOCKS)
    host.call_worker(grow)


async def burst(engine: Any, name: str, count: int, prompt_tokens: int, output_tokens: int) -> list[list[int]]:
    """Tokens of ``count`` requests that arrive at once."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True, detokenize=False)

    async def serve(index: int) -> list[int]:
        prompt = {"prompt_token_ids": [(7 * index + 11 * place) % 250 for place in range(prompt_tokens)]}
        async for output in engine.generate(prompt, params, f"{name}-{index}"):
            tokens = list(output.outputs[0].token_ids)
        return tokens

    return await asyncio.gather(*(serve(index) for index in range(count)))


def wait_until(host: Any, function: Any, condition: Any) -> dict[str, Any]:
    deadline = time.monotonic() + 60.0
    while not condition(now := host.call_worker(function)):
        assert time.monotonic() < deadline, now
        host.command("status")  # as a run and a server ask every second
        time.sleep(0.05)
    return dict(now)


def test_a_burst_gets_the_whole_cache_back(host: Any, shrunk: tuple[int, int], tmp_path: Path) -> None:
    size, count = shrunk
    each = BLOCKS // count  # blocks of a request by its end
    shape = (count, (each - 1) * size - 8, 24)
    host.command("begin", "separate", {}, {}, 0)
    expected = host.run(burst(host.engine, "alone", *shape))
    assert host.call_worker(reset_prefix_cache) is False  # blocks are taken away for the test

    write_builtin_dataset(tmp_path / "data.jsonl", limit=40)
    settings = FinetuneSettings(data=tmp_path / "data.jsonl", microbatch_tokens=64)
    host.command("finetune", settings.model_dump_json(), None, None)
    host.command("begin", "static", {"work_conserving": "true"}, {}, 0)
    before = wait_until(host, memory, lambda now: now["owned"] > BLOCKS // 3 and now["held"])
    assert before["free"] < (each - 1) * count, "the burst must need what is lent"
    assert before["free"] + before["owned"] == BLOCKS
    served = host.run(burst(host.engine, "beside", *shape))
    steps = [StepRecord(*row) for row in host.command("drain")["steps"]]
    assert served == expected
    assert host.call_worker(memory)["preemptions"] == 0
    assert sum(step.reclaim_ms == step.reclaim_ms for step in steps) > 0
    assert min(step.kv_blocks_lent for step in steps) < 8

    host.command("set_hooks", False)
    assert host.call_worker(memory)["owned"] == 0
    host.command("set_hooks", True)
    assert wait_until(host, memory, lambda now: now["owned"] > 0)["free"] < BLOCKS
    host.command("finish")
    wait_until(host, memory, lambda now: not now["held"])
    host.run(burst(host.engine, "after", 1, 8, 8))
    host.command("finetune", settings.model_copy(update={"lending": False}).model_dump_json(), None, None)
    assert host.call_worker(memory)["owned"] == 0
    host.command("finish")
