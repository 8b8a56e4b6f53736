"""Random lending, recalling, serving and aborting: vLLM's block pool stays sound, and requests come first."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from harli.memory.lender import Lender
from harli.memory.need import Need
from tests.memory.builders import BLOCK, Borrower, check, request, scheduler, step

BLOCKS = 60
MAX_REQUESTS = 6


class Lending(RuleBasedStateMachine):
    """vLLM's scheduler, our lender, and a borrower that follows the loan's protocol, in any order."""

    @initialize(most=st.sampled_from([0.3, 0.9, 1.0]))
    def begin(self, most: float) -> None:
        self.scheduler = scheduler(BLOCKS, max_requests=MAX_REQUESTS, max_tokens=4 * BLOCK)
        self.lender = Lender(self.scheduler)
        self.loan = self.lender.open(most)
        assert self.loan is not None
        self.loan.wait_vacated = self._unit_ends  # type: ignore[method-assign]
        self.borrower = Borrower(self.loan)
        self.wanted = True
        self.sent = 0
        self.reclaimable = 0
        """Consecutive steps before which the first waiting request would have fitted, had all been given back."""

    def _unit_ends(self, timeout_s: float) -> bool:
        """The engine's thread waits, so the running unit ends meanwhile."""
        assert timeout_s > 0.0
        self.borrower.between_units()
        return self.loan.vacated

    @rule(length=st.integers(1, 200), output_tokens=st.integers(1, 60), prefix=st.sampled_from([0, 32, 96]))
    def arrive(self, length: int, output_tokens: int, prefix: int) -> None:
        prompt = [*[1] * prefix, *np.random.default_rng(self.sent).integers(10, 200, length).tolist()]
        self.scheduler.add_request(request(f"request-{self.sent}", prompt, output_tokens))
        self.lender.arrived(len(prompt))
        self.sent += 1

    @rule(which=st.integers(0, 20))
    def abort(self, which: int) -> None:
        from vllm.v1.request import RequestStatus

        names = list(self.scheduler.requests)
        if names:
            self.scheduler.finish_requests([names[which % len(names)]], RequestStatus.FINISHED_ABORTED)

    @rule(count=st.integers(1, 12))
    def serve(self, count: int) -> None:
        for _ in range(count):
            self._step()

    @rule()
    def quiet(self) -> None:
        """As if nothing had arrived for long: all that is free may be lent."""
        self.lender._need = Need(BLOCK)
        for _ in range(3):
            self.lender._next_plan_s = -math.inf
            self._step()

    @rule(blocks=st.integers(1, BLOCKS))
    def claim(self, blocks: int) -> None:
        self.borrower.claim(blocks)

    @rule()
    def end_unit(self) -> None:
        self.borrower.between_units()

    @rule(wanted=st.booleans())
    def want(self, wanted: bool) -> None:
        self.wanted = wanted

    @rule()
    def reset(self) -> None:
        lender = self.lender
        assert lender.give_back()
        assert self.scheduler.reset_prefix_cache() == (not self.scheduler.running)

    @precondition(lambda self: not self.scheduler.has_unfinished_requests())
    @rule()
    def idle(self) -> None:
        self.lender.idle(self.wanted)

    @rule()
    def next_job(self) -> None:
        if not self.lender.close():  # the job before holds some of it, and the engine's thread does not wait for that
            assert self.lender.open(0.9) is None
            self.borrower.between_units()
            assert self.lender.close()
        loan = self.lender.open(0.9)
        assert loan is not None
        loan.wait_vacated = self._unit_ends  # type: ignore[method-assign]
        self.loan, self.borrower = loan, Borrower(loan)

    def _step(self) -> None:
        engine, pool = self.scheduler, self.scheduler.kv_cache_manager.block_pool
        fits = False
        if engine.waiting and len(engine.running) < MAX_REQUESTS:
            growth = len(engine.running) + engine.max_num_scheduled_tokens // BLOCK
            blocks = -(-next(iter(engine.waiting)).num_tokens // BLOCK)
            fits = blocks + growth <= pool.get_num_free_blocks() + self.lender.owned
        self.reclaimable = self.reclaimable + 1 if fits else 0
        available = pool.get_num_free_blocks() + self.lender.owned
        running = len(engine.running)
        need = self.lender._growth()
        scheduled = step(engine, self.lender, wanted=self.wanted)
        if scheduled.preempted_req_ids:
            assert need > available, "a request was preempted that had not been without lending"
        if scheduled.scheduled_new_reqs or scheduled.scheduled_cached_reqs.resumed_req_ids:
            self.reclaimable = 0
        assert running == 0 or scheduled.total_num_scheduled_tokens
        if sum(scheduled.num_scheduled_tokens.values()) < engine.max_num_scheduled_tokens:
            assert self.reclaimable < 2, "a request that fits waited for two steps"

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "scheduler"):
            check(self.scheduler, self.lender, self.borrower)


class TestLending(Lending.TestCase):  # type: ignore[misc]
    settings = settings(
        max_examples=100,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


def test_ten_thousand_random_operations_leave_the_pool_sound() -> None:
    random = np.random.default_rng(0)
    machine = Lending()
    machine.begin(most=0.9)
    operations: list[tuple[float, Callable[[], None]]] = [
        (0.25, lambda: machine.arrive(int(random.integers(1, 200)), int(random.integers(1, 40)), 96)),
        (0.05, lambda: machine.abort(int(random.integers(20)))),
        (0.33, lambda: machine.serve(int(random.integers(1, 12)))),
        (0.12, machine.quiet),
        (0.10, lambda: machine.claim(int(random.integers(1, BLOCKS)))),
        (0.10, machine.end_unit),
        (0.02, lambda: machine.want(bool(random.random() < 0.95))),
        (0.02, machine.reset),
        (0.01, machine.next_job),
    ]
    weights, calls = zip(*operations, strict=True)
    claimed = taken = 0
    for choice in random.choice(len(calls), 10_000, p=weights):
        owned = machine.lender.owned
        calls[choice]()
        machine.sound()
        claimed += machine.borrower.lowest < BLOCKS
        taken += max(0, machine.lender.owned - owned)
    assert claimed > 300
    assert taken > 1000
    assert machine.sent > 1000
    machine.next_job()
    assert machine.lender.owned == 0
