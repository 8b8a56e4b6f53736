"""Both sides at full tilt, whatever becomes of decode."""

from __future__ import annotations

from typing import ClassVar

from harli.types import Decision, DecodeState, FinetuneState, HarliError
from policies.base import Policy, PolicyContext


class Unmanaged(Policy):
    """The split with the largest finetune part at every step, whatever the SLO: nobody manages anything.

    Both sides on all compute units at once is not on any menu, since shares never overlap. This is the
    nearest to it that a partitioner can apply: finetuning takes all it can get and never gives way.
    """

    slo_aware: ClassVar[bool] = False

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        if not context.menu.splits:
            raise HarliError("this device cannot be split, so policy 'unmanaged' has nothing to run on")
        self._most = Decision(context.menu.splits[-1])

    def decide(self, decode: DecodeState, finetune: FinetuneState) -> Decision:
        return self._most
