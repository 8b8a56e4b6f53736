"""Decides before every step how much of the KV cache is lent. Requests come first.

Twice: a slow plan lends what is free beyond what requests will soon need, and an emergency recall gets
back what the coming step needs at once.
"""

from __future__ import annotations

import math
import time
from itertools import islice
from typing import TYPE_CHECKING

from harli.memory.loan import Loan
from harli.memory.need import Need
from harli.memory.zone import Zone

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

PLAN_S = 0.25
"""Time between two plans."""
PIECE = 48
"""Most blocks that a step takes or gives back when there is no hurry."""
SLACK = 1.5
"""A plan leaves this many times what is needed, so that the next ones can let it be."""
PATIENCE_S = 5.0
"""A unit that takes longer has stalled: nothing is waited for again until it has ended after all."""


class Lender:
    """One engine's; lives on the engine's thread, like the scheduler whose block pool it lends from."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.loan: Loan | None = None
        """The present job's, until all of it is back."""
        self.reclaim_ms = math.nan
        """From an emergency's beginning until its blocks were there, if it ended before the coming step."""
        self.waited_ms = 0.0
        """What of that the coming step waited for the borrower."""
        self.hook_us = 0.0
        """What lending cost before the coming step, waiting aside."""
        self._scheduler = scheduler
        self._pool = scheduler.kv_cache_manager.block_pool
        self._watermark = scheduler.kv_cache_manager.watermark_blocks
        self._block_size = scheduler.block_size
        self._prompt_blocks = scheduler.max_num_scheduled_tokens // self._block_size  # a step's, at most
        self._need = Need(self._block_size)
        self._zone: Zone
        self._lowest_floor = 0
        self._kept = 0  # what the last plan leaves free
        self._next_plan_s = -math.inf
        self._emergency_s = math.nan
        self._patience_s = PATIENCE_S
        self._closing = False

    # The session's side

    def open(self, most: float) -> Loan | None:
        """A loan for a job: at most this fraction of the KV cache. None while another is not back yet."""
        if self.loan is not None:
            return None
        total = self._pool.num_gpu_blocks
        self.loan = Loan(total)
        self._zone = Zone(self._pool, self.loan)
        self._lowest_floor = max(1, total - int(most * total))
        self._next_plan_s, self._emergency_s, self._patience_s = -math.inf, math.nan, PATIENCE_S
        self._closing = False
        return self.loan

    def close(self) -> bool:
        """End the loan; False if its borrower still holds some of it, which then comes back later."""
        if self.loan is not None:
            self._closing = True
            self._zone.aim(self.loan.total)
            self._zone.collect(self.loan.total)
            if not self.owned:
                self.loan = None
        return self.loan is None

    def give_back(self) -> bool:
        """Get everything back, waiting for the unit that runs. Lending goes on with the next plan."""
        if self.loan is None:
            return True
        self._zone.aim(self.loan.total)
        self._wait()
        self._zone.collect(self.loan.total)
        return not self.owned

    @property
    def owned(self) -> int:
        """Blocks out of requests' reach: lent, on their way back, or taken to be lent."""
        return 0 if self.loan is None else self._zone.owned

    # The hooks

    def arrived(self, tokens: int) -> None:
        """A request with a prompt of ``tokens`` has arrived."""
        self._need.arrived(tokens)

    def idle(self, wanted: bool) -> None:
        """Decode has no request: there is time to lend all that the plan allows. ``wanted``: by a job."""
        if self.loan is not None and not self._scheduler.waiting:  # one may have come this moment
            total = self.loan.total
            self._emergency_s = math.nan
            self._plan(time.monotonic(), wanted)
            self._zone.collect(total)
            self._zone.extend(total, self._pool.get_num_free_blocks() - self._kept)
            self._zone.extend(0, 0)  # no step is under way

    def before_step(self, wanted: bool) -> None:
        """See to it that the coming step has the blocks it needs, then lend or take back a piece.

        ``wanted``: a job has a use for lent memory.
        """
        self.reclaim_ms, self.waited_ms, self.hook_us = math.nan, 0.0, 0.0
        zone, scheduler = self._zone, self._scheduler
        if not (wanted or zone.owned):
            return
        began = time.perf_counter()
        self._need.stepped()
        growth = len(scheduler.running) + self._prompt_blocks  # at most
        admissions = 0
        if scheduler.waiting:
            admissions = self._admissions(self._pool.get_num_free_blocks() + zone.owned - growth)
        need = growth + admissions
        if need > self._pool.get_num_free_blocks() and zone.owned:
            self._reclaim(need, admissions, began)
        else:
            self._emergency_s = math.nan
            now = time.monotonic()
            if now >= self._next_plan_s:
                self._plan(now, wanted)
            if not zone.collect(PIECE):
                zone.extend(PIECE, self._pool.get_num_free_blocks() - max(self._kept, need))
        self.hook_us = (time.perf_counter() - began) * 1e6 - self.waited_ms * 1e3

    # The plan

    def _plan(self, now_s: float, wanted: bool) -> None:
        """Let the zone begin above what requests use and will soon need, as if that all lay at the bottom."""
        zone, free = self._zone, self._pool.get_num_free_blocks()
        self._next_plan_s = now_s + PLAN_S
        keep = self._need.within_horizon(now_s, len(self._scheduler.running)) + self._prompt_blocks + self._watermark
        self._kept = math.ceil(SLACK * keep)
        floor = max(zone.loan.total - free - zone.owned + self._kept, self._lowest_floor)
        if not wanted or self._closing:
            zone.aim(zone.loan.total)
        elif free < keep:
            zone.aim(max(floor, zone.floor))
        elif free > self._kept:
            zone.aim(min(floor, zone.floor))

    # The emergency

    def _reclaim(self, need: int, admissions: int, now_s: float) -> None:
        """Get ``need`` blocks free. Waits for the running unit only where decode would suffer otherwise.

        That is when a running request would be preempted, or when blocks have been asked for since an earlier
        step and the waiting requests still cannot have the ``admissions`` that they need.
        """
        zone, pool = self._zone, self._pool
        late = not math.isnan(self._emergency_s)
        if not late:
            self._emergency_s = now_s
        if zone.loan.vacated:
            self._patience_s = PATIENCE_S
        missing = need - pool.get_num_free_blocks()
        zone.recall(missing)
        missing -= zone.collect(missing)
        if missing > 0 and self._growth() + admissions * late > pool.get_num_free_blocks():
            self._wait()
            missing -= zone.collect(missing)
        if missing <= 0 or not zone.owned:
            self.reclaim_ms = (time.perf_counter() - self._emergency_s) * 1e3
            self._emergency_s = math.nan

    def _admissions(self, available: int) -> int:
        """Blocks that the next waiting requests need without any prefix-cache hit, up to those ``available``."""
        scheduler = self._scheduler
        blocks = 0
        for request in islice(scheduler.waiting, max(0, scheduler.max_num_running_reqs - len(scheduler.running))):
            blocks += -(-request.num_tokens // self._block_size)
            if blocks + self._watermark >= available:
                return max(0, available)
        return blocks + self._watermark if blocks else 0

    def _growth(self) -> int:
        """Blocks that the running requests need in the coming step."""
        size, budget = self._block_size, self._scheduler.max_num_scheduled_tokens
        blocks = 0
        for request in self._scheduler.running:
            computed = request.num_computed_tokens
            new = min(request.num_tokens_with_spec + request.num_output_placeholders - computed, budget)
            budget -= new
            blocks += -(-(computed + new) // size) + -computed // size
        return blocks

    def _wait(self) -> None:
        """Wait until the borrower has let go of what was recalled."""
        loan = self._zone.loan
        if loan.vacated:
            return
        began = time.perf_counter()
        if not loan.wait_vacated(self._patience_s):
            self._patience_s = 0.0
        self.waited_ms += (time.perf_counter() - began) * 1e3
