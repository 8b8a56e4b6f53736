"""One split for the whole run."""

from __future__ import annotations

from typing import ClassVar

from harli.types import Decision, DecodeState, FinetuneState, HarliError, Share
from policies.base import Policy, PolicyContext


class Static(Policy):
    """One split for the whole run, as MIG or an MPS percentage gives.

    ``share`` names it ("1/1"; by default the middle one). ``work_conserving`` gives finetuning the
    whole device while decode is idle, and decode the whole device while there is nothing to train.
    """

    slo_aware: ClassVar[bool] = False

    def __init__(self, context: PolicyContext, *, share: str = "", work_conserving: bool = False) -> None:
        super().__init__(context)
        menu = context.menu
        if not share and not menu.splits:
            raise HarliError("this device cannot be split, so policy 'static' has nothing to choose from")
        chosen = menu.get(share) if share else menu.splits[len(menu.splits) // 2]
        if not chosen.decode:
            raise HarliError(f"share {share!r} leaves decode nothing; policy 'static' needs another")
        self._split = Decision(chosen)
        self._alone = Decision(menu.decode_alone)
        self._conserving = work_conserving

    def decide(self, decode: DecodeState, finetune: FinetuneState) -> Decision:
        return self._alone if self._conserving and not finetune.ready else self._split

    def idle(self, finetune: FinetuneState) -> Share:
        return self.context.menu.finetune_alone if self._conserving else self._split.share
