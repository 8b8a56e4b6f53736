"""Continuous batching over KV blocks as vLLM's scheduler does it, in constant time per step.

First come, first served. A step schedules the running requests in order of their admission, one token each, or a
chunk of its prompt for the one that still computes it. A request that needs a block when none is free preempts the
request admitted last, which loses its KV cache, returns to the head of the queue and is computed anew. If nobody was
preempted, waiting requests are admitted while the batch, the step's token budget and the blocks for their whole
prompt allow it. (vLLM 0.32, ``Scheduler.schedule``; prefix caching is left out.)

All requests that decode advance together, so their tokens and blocks follow from the step's number, and a step costs
something only for requests that come or go. At most one request, the last, is in the middle of its prompt: the token
budget holds a token for everyone.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections import defaultdict, deque
from itertools import count

from harli.simulate.served import BLOCK_TOKENS, Served, blocks
from harli.types import DecodeState, HarliError
from harli.workload.base import Request


class BatchScheduler:
    """Queue, batch and KV blocks of one engine; ``schedule`` begins a step and ``stepped`` ends it."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        kv_blocks: int,
        max_num_batched_tokens: int,
        prefilled: bool,
        slo_tpot_ms: float | None,
    ) -> None:
        """``prefilled``: requests arrive with their prompts' KV cache, all but the last token (the decode role).

        As in vLLM one of ``kv_blocks`` is a placeholder that requests never get.
        """
        if max_num_batched_tokens < max_num_seqs:
            raise HarliError(f"{max_num_batched_tokens} tokens a step do not suffice for {max_num_seqs} requests")
        self.waiting: deque[Served] = deque()
        self.running: list[Served] = []
        self.free = kv_blocks - 1
        self.step_ends_s = array("d", [math.nan])
        """By step, from 1 on."""
        self.preemptions = 0
        self.state = DecodeState(kv_blocks_total=kv_blocks)
        self._max_num_seqs = max_num_seqs
        self._max_tokens = max_num_batched_tokens
        self._prefilled = prefilled
        self._slo_s = math.inf if slo_tpot_ms is None else slo_tpot_ms / 1e3
        self._step = 0
        self._decoding = 0
        self._context_sum = 0
        self._needs = [0] * BLOCK_TOKENS
        """Decoding requests by when they need their next block: at steps of this remainder."""
        self._finishing: defaultdict[int, list[Served]] = defaultdict(list)
        self._joining: list[Served] = []
        """Scheduled in this step, or next, but not decoding yet."""
        self._longest: list[tuple[int, int, Served]] = []
        self._tightest: list[tuple[float, int, Served]] = []
        self._tickets = count(1)

    def add(self, index: int, request: Request) -> None:
        """Queue a request, whose tokens must fit into the KV cache."""
        self.waiting.append(Served(index, request))

    @property
    def empty(self) -> bool:
        return not self.running and not self.waiting

    def schedule(self, now_s: float) -> DecodeState:
        """Begin a step: what it computes, as ``harli.engine.decode_state.DecodeTracker`` describes it."""
        self._step = step = self._step + 1
        preempted = self.preemptions
        needed = self._needs[step % BLOCK_TOKENS]
        if self._joining:
            needed += self._growth(self._joining[0])
        if needed <= self.free:
            self.free -= needed
        else:
            self._take_blocks()
        budget = self._max_tokens - self._decoding
        self._context_sum += self._decoding
        batch, prefill = self._decoding, 0
        if self._joining:
            chunk = self._advance(self._joining[0], budget)
            budget -= chunk
            batch += chunk > 0
            prefill += chunk if chunk > 1 else 0
        admitted = 0
        if self.waiting and preempted == self.preemptions:
            while (chunk := self._admit(budget, now_s)) > 0:
                budget -= chunk
                admitted += 1
                prefill += chunk if chunk > 1 else 0
        state = self.state
        state.time_s = now_s
        state.step = step
        state.batch = batch + admitted
        state.context_sum = self._context_sum
        state.context_max = self._context_max()
        state.prefill_tokens = prefill
        state.admitted = admitted
        state.waiting = len(self.waiting)
        state.kv_blocks_free = self.free
        state.slack_ms = (self._deadline_s() - now_s) * 1e3
        return state

    def stepped(self, now_s: float) -> list[Served]:
        """End the step: its tokens are there at ``now_s``. Returns the requests that finished with it."""
        step = self._step
        self.step_ends_s.append(now_s)
        if self._joining:
            joining, self._joining = self._joining, []
            for served in joining:
                if served.computed < served.request.prompt_tokens + served.produced:
                    self._joining.append(served)
                else:
                    served.produced += 1
                    self._start_decoding(served, now_s)
        finished = self._finishing.pop(step, [])
        for served in finished:
            self._leave(served, step)
        return finished

    # Coming and going

    def _admit(self, budget: int, now_s: float) -> int:
        """Admit the first in the queue; the tokens it computes in this step, 0 if it has to wait."""
        if not self.waiting or not budget or len(self.running) == self._max_num_seqs:
            return 0
        served = self.waiting[0]
        tokens = served.request.prompt_tokens + served.produced
        if blocks(tokens) > self.free:
            return 0
        self.waiting.popleft()
        first_time = math.isnan(served.scheduled_s)
        if first_time:
            served.scheduled_s = now_s
        served.computed = tokens - 1 if self._prefilled and first_time else 0
        self.free -= blocks(served.computed)
        self._context_sum += served.computed
        self.running.append(served)
        self._joining.append(served)
        self.free -= self._growth(served, budget)
        return self._advance(served, budget)

    def _advance(self, served: Served, budget: int) -> int:
        """Compute as much of the prompt as ``budget`` allows; its blocks have been taken."""
        chunk = min(served.request.prompt_tokens + served.produced - served.computed, budget)
        served.computed += chunk
        self._context_sum += chunk
        return chunk

    def _start_decoding(self, served: Served, now_s: float) -> None:
        served.since, served.ticket = self._step, next(self._tickets)
        if math.isnan(served.first_token_s):
            served.first_token_s = now_s
        self._decoding += 1
        self._needs[self._phase(served)] += 1
        self._finishing[served.since + served.request.output_tokens - served.produced].append(served)
        heapq.heappush(self._longest, (served.since - served.computed, served.ticket, served))
        if self._slo_s < math.inf:
            began_s = served.first_token_s + self._slo_s * (served.produced - served.since - 1)
            heapq.heappush(self._tightest, (began_s, served.ticket, served))

    def _leave(self, served: Served, last_step: int) -> None:
        """A decoding request leaves the batch; ``last_step`` is the last that gave it a token."""
        self.running.remove(served)
        self._decoding -= 1
        self._needs[self._phase(served)] -= 1
        served.spans.append((served.since, last_step))
        served.computed += last_step - served.since
        served.produced += last_step - served.since
        served.ticket = 0
        self._context_sum -= served.computed
        self.free += blocks(served.computed)

    # KV blocks

    def _take_blocks(self) -> None:
        """Give each running request the block it needs, at the cost of those admitted last."""
        for served in tuple(self.running):
            growth = self._growth(served)
            while growth > self.free:
                victim = self.running[-1]
                self._preempt(victim)
                if victim is served:
                    return
            self.free -= growth
            if served is self.running[-1]:
                return

    def _growth(self, served: Served, budget: int | None = None) -> int:
        """Blocks that a running request needs in this step beyond those it has."""
        if served.ticket:
            return int(self._phase(served) == self._step % BLOCK_TOKENS)
        budget = self._max_tokens - self._decoding if budget is None else budget
        chunk = min(served.request.prompt_tokens + served.produced - served.computed, budget)
        return blocks(served.computed + chunk) - blocks(served.computed)

    def _preempt(self, served: Served) -> None:
        """The request admitted last gives up its blocks, which it has as of the step before."""
        self.preemptions += 1
        if served.ticket:
            finishing = served.since + served.request.output_tokens - served.produced
            self._finishing[finishing].remove(served)
            self._leave(served, self._step - 1)
        else:
            self.running.remove(served)
            self._joining.remove(served)
            self._context_sum -= served.computed
            self.free += blocks(served.computed)
        served.computed = 0
        self.waiting.appendleft(served)

    @staticmethod
    def _phase(served: Served) -> int:
        """The remainder of the steps in which a decoding request begins a block."""
        return (served.since - served.computed + 1) % BLOCK_TOKENS

    # The state

    def _context_max(self) -> int:
        heap = self._longest
        while heap and heap[0][2].ticket != heap[0][1]:
            heapq.heappop(heap)
        longest = self._step - heap[0][0] if heap else 0
        return max(longest, *(served.computed for served in self._joining)) if self._joining else longest

    def _deadline_s(self) -> float:
        """When the next token of the tightest request is due."""
        heap = self._tightest
        while heap and heap[0][2].ticket != heap[0][1]:
            heapq.heappop(heap)
        deadline_s = heap[0][0] + self._slo_s * self._step if heap else math.inf
        for served in self._joining:
            if served.produced:  # it was preempted
                deadline_s = min(deadline_s, served.first_token_s + self._slo_s * served.produced)
        return deadline_s
