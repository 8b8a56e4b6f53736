"""A policy for measuring: it walks through states in blocks, every ordered pair of states equally often."""

from __future__ import annotations

import random

from harli.types import Decision, DecodeState, FinetuneState
from policies.base import Policy, PolicyContext


class ShareBlocks(Policy):
    """Blocks of steps of one state each; a state is a share with or without an exclusive window."""

    def __init__(self, context: PolicyContext, *, block_steps: int = 10, window_ms: float = 40.0) -> None:
        super().__init__(context)
        shares = sorted(context.menu.shares[:-1], key=lambda share: share.decode)  # the smallest team first
        self._states = [Decision(share, window) for window in (0.0, window_ms) for share in shares]
        self._order = euler_tour(len(self._states), random.Random(context.seed))
        self._block_steps = block_steps
        self._step = 0

    def decide(self, decode: DecodeState, finetune: FinetuneState) -> Decision:
        block = self._step // self._block_steps
        self._step += decode.admitted == 0
        return self._states[self._order[block % len(self._order)]]


def euler_tour(states: int, rng: random.Random) -> list[int]:
    """A closed walk over ``states`` that takes every ordered pair once, pairs of the same state included."""
    left = {state: rng.sample(range(states), states) for state in range(states)}
    stack, tour = [0], []
    while stack:
        if left[stack[-1]]:
            stack.append(left[stack[-1]].pop())
        else:
            tour.append(stack.pop())
    return tour[:0:-1]
