"""The batch equals one that a loop over all requests gives, and no KV block is lost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harli.engine import decode_state
from harli.engine.decode_state import DecodeTracker
from harli.simulate.scheduler import BatchScheduler
from harli.simulate.served import blocks
from harli.types import HarliError
from harli.workload.base import Request

SLO_MS = 50.0


@dataclass
class Looped:
    """A request as vLLM keeps it."""

    request_id: str
    prompt: int
    output: int
    filled: bool
    """Its prompt's KV cache is still to come from elsewhere."""
    num_computed_tokens: int = 0
    num_output_tokens: int = 0
    num_output_placeholders: int = 0
    begun: bool = False

    @property
    def num_tokens(self) -> int:
        return self.prompt + self.num_output_tokens


class LoopScheduler:
    """vLLM's schedule, request by request, with what ``DecodeTracker`` looks at."""

    def __init__(self, seqs: int, kv_blocks: int, tokens: int, prefilled: bool) -> None:
        self.seqs, self.tokens, self.prefilled = seqs, tokens, prefilled
        self.free = kv_blocks - 1
        self.requests: dict[str, Looped] = {}
        self.running: list[Looped] = []
        self.waiting: list[Looped] = []
        pool = SimpleNamespace(get_num_free_blocks=lambda: self.free, num_gpu_blocks=kv_blocks)
        self.kv_cache_manager = SimpleNamespace(block_pool=pool)
        self.tracker = DecodeTracker(self, SLO_MS)
        self.preemptions = 0
        self._finished: set[str] = set()

    def add(self, index: int, request: Request) -> None:
        made = Looped(str(index), request.prompt_tokens, request.output_tokens, self.prefilled)
        self.requests[made.request_id] = made
        self.waiting.append(made)

    def schedule(self) -> Any:
        budget, tokens, new, resumed, preempted = self.tokens, {}, [], set(), False
        at = 0
        while at < len(self.running) and budget:
            request = self.running[at]
            count = min(request.num_tokens - request.num_computed_tokens, budget)
            needed = blocks(request.num_computed_tokens + count) - blocks(request.num_computed_tokens)
            while needed > self.free:
                victim, preempted = self.running.pop(), True
                self.tracker.left(victim.request_id)
                self.free += blocks(victim.num_computed_tokens)
                victim.num_computed_tokens = 0
                self.waiting.insert(0, victim)
                self.preemptions += 1
                if victim is request:
                    break
            if request not in self.running:
                break
            self.free -= needed
            tokens[request.request_id] = count
            budget -= count
            at += 1
        while not preempted and self.waiting and budget and len(self.running) < self.seqs:
            request = self.waiting[0]
            if blocks(request.num_tokens) > self.free:
                break
            self.waiting.pop(0)
            self.running.append(request)
            request.num_computed_tokens = request.num_tokens - 1 if request.filled else 0
            request.filled = False
            count = min(request.num_tokens - request.num_computed_tokens, budget)
            self.free -= blocks(request.num_computed_tokens + count)
            tokens[request.request_id] = count
            budget -= count
            if request.begun:
                resumed.add(request.request_id)
            else:
                new.append(SimpleNamespace(req_id=request.request_id))
            request.begun = True
        for key, count in tokens.items():
            self.requests[key].num_computed_tokens += count
        finished, self._finished = self._finished, set()
        return SimpleNamespace(
            num_scheduled_tokens=tokens,
            total_num_scheduled_tokens=sum(tokens.values()),
            scheduled_new_reqs=new,
            scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=resumed),
            finished_req_ids=finished,
        )

    def update(self) -> set[str]:
        for request in list(self.running):
            if request.num_computed_tokens == request.num_tokens:
                request.num_output_tokens += 1
                if request.num_output_tokens == request.output:
                    self.running.remove(request)
                    self.free += blocks(request.num_computed_tokens)
                    del self.requests[request.request_id]
                    self._finished.add(request.request_id)
        self.tracker.stepped()
        return self._finished


arriving = st.lists(st.builds(Request, st.just(0.0), st.integers(1, 60), st.integers(1, 40)), max_size=3)


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(st.tuples(st.floats(0.001, 0.2), arriving), min_size=1, max_size=25),
    seqs=st.integers(1, 8),
    kv_blocks=st.integers(8, 30),
    tokens=st.integers(8, 70),
    prefilled=st.booleans(),
)
def test_the_batch_and_its_state_equal_those_of_a_loop(
    steps: list[tuple[float, list[Request]]], seqs: int, kv_blocks: int, tokens: int, prefilled: bool
) -> None:
    fast = BatchScheduler(
        max_num_seqs=seqs,
        kv_blocks=kv_blocks,
        max_num_batched_tokens=tokens,
        prefilled=prefilled,
        slo_tpot_ms=SLO_MS,
    )
    loop, now, coming, after = LoopScheduler(seqs, kv_blocks, tokens, prefilled), 0.0, 0, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_state, "time", SimpleNamespace(monotonic=lambda: now))
        while after < len(steps) or not fast.empty:
            took_s, requests = steps[after] if after < len(steps) else (0.01, [])
            after += 1
            for request in requests:
                fast.add(coming, request)
                loop.add(coming, request)
                coming += 1
            if fast.empty:
                assert not loop.running
                continue
            output = loop.schedule()
            found = fast.schedule(now)
            expected = loop.tracker.scheduled(output)
            assert found.slack_ms == pytest.approx(expected.slack_ms, abs=1e-6)
            assert asdict(found) | {"slack_ms": 0.0} == asdict(expected) | {"slack_ms": 0.0}
            now += took_s
            done = fast.stepped(now)
            assert {str(served.index) for served in done} == loop.update()
            assert 0 <= fast.free == loop.free
            for served in done:
                assert len(served.record(fast.step_ends_s).itl_ms) == served.request.output_tokens - 1
    assert fast.free == kv_blocks - 1
    assert fast.preemptions == loop.preemptions


def test_the_last_admitted_is_preempted_and_comes_back_first() -> None:
    scheduler = BatchScheduler(
        max_num_seqs=4, kv_blocks=1 + 5, max_num_batched_tokens=64, prefilled=True, slo_tpot_ms=None
    )
    for index in range(3):
        scheduler.add(index, Request(0.0, 30, 20))
    scheduler.schedule(0.0)  # 30 tokens each; the third does not fit
    assert [served.index for served in scheduler.running] == [0, 1]
    order, now = [], 0.0
    while not scheduler.empty:
        now += 1.0
        order += [(served.index, len(served.spans)) for served in scheduler.stepped(now)]
        if not scheduler.empty:
            scheduler.schedule(now)
    assert order == [(0, 1), (1, 2), (2, 2)]  # 1 gives its blocks to 0, comes before 2, and takes those of 2 later
    assert scheduler.preemptions == 2
    assert scheduler.free == 5


def test_a_step_must_hold_a_token_for_everyone() -> None:
    with pytest.raises(HarliError, match="32 tokens"):
        BatchScheduler(max_num_seqs=33, kv_blocks=9, max_num_batched_tokens=32, prefilled=True, slo_tpot_ms=None)
