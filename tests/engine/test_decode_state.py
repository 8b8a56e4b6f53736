"""The decode state that is kept incrementally equals the one that a loop over all requests gives."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harli.engine import decode_state
from harli.engine.decode_state import DecodeTracker, _Smallest
from harli.types import DecodeState

SLO_S = 0.05
TOKEN_BUDGET = 16
MAX_RUNNING = 6
BLOCKS_FREE, BLOCKS = 70, 100


@dataclass
class Request:
    request_id: str
    prompt_tokens: int
    output_limit: int
    num_computed_tokens: int = 0
    num_output_tokens: int = 0
    num_output_placeholders: int = 0
    preempted: bool = False

    @property
    def num_tokens(self) -> int:
        return self.prompt_tokens + self.num_output_tokens

    @property
    def decodes(self) -> bool:
        """Its next step yields one more token."""
        return self.num_output_tokens > 0 and self.num_computed_tokens >= self.num_tokens - 1


class Scheduler:
    """Keeps its requests as vLLM's scheduler does: chunked prefill, preemption with recomputation, resumption."""

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        pool = SimpleNamespace(get_num_free_blocks=lambda: BLOCKS_FREE, num_gpu_blocks=BLOCKS)
        self.kv_cache_manager = SimpleNamespace(block_pool=pool)
        self.tracker: DecodeTracker | None = None
        self._finished: set[str] = set()

    def add(self, request: Request) -> None:
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        (self.running if request in self.running else self.waiting).remove(request)
        del self.requests[request.request_id]
        self._finished.add(request.request_id)

    def schedule(self, preemptions: int) -> Any:
        for _ in range(min(preemptions, len(self.running))):
            request = self.running.pop()
            if self.tracker is not None:
                self.tracker.left(request.request_id)
            request.num_computed_tokens, request.preempted = 0, True
            self.waiting.insert(0, request)
        budget, tokens, new, resumed = TOKEN_BUDGET, {}, [], set()
        for request in self.running:
            ahead = request.num_tokens + request.num_output_placeholders - request.num_computed_tokens
            tokens[request.request_id] = min(ahead, budget)
            budget -= tokens[request.request_id]
        while self.waiting and budget and not preemptions and len(self.running) < MAX_RUNNING:
            request = self.waiting.pop(0)
            self.running.append(request)
            tokens[request.request_id] = min(request.num_tokens, budget)
            budget -= tokens[request.request_id]
            if request.preempted:
                resumed.add(request.request_id)
                request.preempted = False
            else:
                new.append(SimpleNamespace(req_id=request.request_id))
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

    def update(self) -> None:
        for request in list(self.running):
            if request.num_computed_tokens == request.num_tokens:
                request.num_output_tokens += 1
                if request.num_output_tokens == request.output_limit:
                    self.finish(request)


@dataclass
class Loop:
    """The same state by a loop over all requests."""

    first_token_s: dict[str, float] = field(default_factory=dict)
    decoding: set[str] = field(default_factory=set)

    def state(self, scheduler: Scheduler, output: Any, step: int, now: float) -> DecodeState:
        scheduled = {key: scheduler.requests[key] for key in output.num_scheduled_tokens}
        came = {new.req_id for new in output.scheduled_new_reqs} | output.scheduled_cached_reqs.resumed_req_ids
        decoding = (self.decoding & set(scheduled)) - came
        slack = [
            self.first_token_s[key] + SLO_S * request.num_output_tokens - now
            for key, request in scheduled.items()
            if key in self.first_token_s
        ]
        return DecodeState(
            time_s=now,
            step=step,
            batch=len(scheduled),
            context_sum=sum(request.num_computed_tokens for request in scheduled.values()),
            context_max=max(request.num_computed_tokens for request in scheduled.values()),
            prefill_tokens=sum(
                count for key, count in output.num_scheduled_tokens.items() if count > 1 and key not in decoding
            ),
            admitted=len(came),
            waiting=len(scheduler.waiting),
            kv_blocks_free=BLOCKS_FREE,
            kv_blocks_total=BLOCKS,
            slack_ms=min(slack, default=math.inf) * 1e3,
        )

    def stepped(self, scheduler: Scheduler, now: float) -> None:
        self.decoding = {request.request_id for request in scheduler.running if request.decodes}
        for key in self.decoding:
            done = scheduler.requests[key].num_output_tokens - 1
            self.first_token_s.setdefault(key, now - SLO_S * done)


arrivals = st.tuples(st.integers(1, 40), st.integers(1, 12))


@dataclass(frozen=True)
class Step:
    took_s: float
    arriving: list[tuple[int, int]]
    preemptions: int
    aborted: int | None


steps = st.lists(
    st.builds(
        Step,
        took_s=st.floats(0.001, 0.2),
        arriving=st.lists(arrivals, max_size=3),
        preemptions=st.sampled_from([0, 0, 0, 0, 1, 2]),
        aborted=st.none() | st.integers(0, 20),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(steps=steps, begins_at=st.integers(0, 8), slo_s=st.sampled_from([SLO_S, None]))
def test_the_tracker_agrees_with_a_loop(steps: list[Step], begins_at: int, slo_s: float | None) -> None:
    scheduler, loop, now, count = Scheduler(), Loop(), 1000.0, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_state, "time", SimpleNamespace(monotonic=lambda: now))
        for number, step in enumerate(steps):
            for prompt_tokens, output_limit in step.arriving:
                scheduler.add(Request(f"r{number}-{len(scheduler.requests)}", prompt_tokens, output_limit))
            if step.aborted is not None and step.aborted < len(scheduler.requests):
                scheduler.finish(list(scheduler.requests.values())[step.aborted])
            if number == begins_at:
                scheduler.tracker = DecodeTracker(scheduler, None if slo_s is None else slo_s * 1e3)
            output = scheduler.schedule(step.preemptions)
            tracker = scheduler.tracker
            if not output.num_scheduled_tokens:
                if tracker is not None:
                    tracker.finished(output)
                continue
            if tracker is not None:
                count += 1
                expected = loop.state(scheduler, output, count, now)
                if slo_s is None:
                    expected.slack_ms = math.inf
                found = tracker.scheduled(output)
                assert found.slack_ms == pytest.approx(expected.slack_ms, abs=1e-3)
                found.slack_ms = expected.slack_ms
                assert found == expected
            now += step.took_s
            scheduler.update()
            if tracker is not None:
                tracker.stepped()
                loop.stepped(scheduler, now)


def test_the_tracker_forgets_what_is_gone() -> None:
    scheduler = Scheduler()
    tracker = scheduler.tracker = DecodeTracker(scheduler, 50.0)
    for number in range(50):
        scheduler.add(Request(f"r{number}", 3, 4))
    output = scheduler.schedule(0)
    while output.num_scheduled_tokens:
        tracker.scheduled(output)
        scheduler.update()
        tracker.stepped()
        output = scheduler.schedule(0)
    tracker.finished(output)
    assert not tracker._requests
    assert not tracker._joining
    assert not tracker._first_token_s
    assert tracker._context_sum == 0
    assert tracker._longest.value() == tracker._tightest.value() == math.inf
    assert not tracker._longest._heap


keys = st.sampled_from("abcd")
values = st.integers(0, 5).map(float)


@given(st.lists(st.tuples(keys, values | st.none())))
def test_smallest_of_a_changing_set(changes: list[tuple[str, float | None]]) -> None:
    smallest, plain = _Smallest(), dict[str, float]()
    for key, value in changes:
        if value is None:
            smallest.discard(key)
            plain.pop(key, None)
        else:
            smallest.add(key, value)
            plain[key] = value
        assert smallest.value() == min(plain.values(), default=math.inf)


def test_smallest_forgets_what_never_surfaces() -> None:
    smallest = _Smallest()
    for number in range(1000):
        smallest.add(str(number), -float(number))
        smallest.discard(str(number - 2))
        assert smallest.value() == -float(number)
    assert len(smallest._heap) < 100


def test_with_a_step_in_flight_every_request_has_its_own_tokens_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asynchronous scheduling: a step is scheduled before the one before it has its tokens."""
    now = 1000.0
    monkeypatch.setattr(decode_state, "time", SimpleNamespace(monotonic=lambda: now))
    scheduler = Scheduler()
    tracker = scheduler.tracker = DecodeTracker(scheduler, SLO_S * 1e3)  # type: ignore[arg-type]
    scheduler.add(Request("a", 3, 50))
    scheduler.add(Request("b", 5, 50))
    first_s = 0.0
    for step in range(1, 12):
        output = scheduler.schedule(0)
        for key in output.num_scheduled_tokens:
            scheduler.requests[key].num_output_placeholders += 1
        state = tracker.scheduled(output)
        assert state.batch == 2
        assert state.context_sum == sum(request.num_computed_tokens for request in scheduler.running)
        assert state.context_max == max(request.num_computed_tokens for request in scheduler.running)
        if step > 2:  # the token of step n is a request's n-th
            assert state.slack_ms == pytest.approx((first_s + SLO_S * (step - 1) - now) * 1e3)
        now += 0.03
        if step > 1:  # the step before has its tokens
            first_s = first_s or now
            for request in scheduler.running:
                request.num_output_tokens += 1
                request.num_output_placeholders -= 1
            tracker.stepped()
