"""Decode alone: no finetuning at all."""

from __future__ import annotations

from typing import ClassVar

from harli.types import Decision, DecodeState, FinetuneState, Share
from policies.base import Policy, PolicyContext


class Separate(Policy):
    """No finetuning: what decode does when it has the device to itself."""

    slo_aware: ClassVar[bool] = False

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._decision = Decision(context.menu.decode_alone)

    def decide(self, decode: DecodeState, finetune: FinetuneState) -> Decision:
        return self._decision

    def idle(self, finetune: FinetuneState) -> Share:
        return self._decision.share
