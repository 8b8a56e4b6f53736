"""Plays a script of segments in the engine, and finds them again in the steps that come back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from harli.rows import StepRecord
from harli.types import Decision, DecodeState, FinetuneState, Menu, Share
from policies.base import Policy, PolicyContext
from profiling.plan import DROPPED, Segment

POLICY = f"{Path(__file__).resolve()}:Script"
"""What the engine knows the policy by."""


class Script(Policy):
    """Follows a script from the step on at which all requests of a group run; before and after it, decode is alone."""

    def __init__(self, context: PolicyContext, *, script: str, batch: int, idle: str) -> None:
        super().__init__(context)
        self._decisions = [
            Decision(segment.share, segment.exclusive_ms)
            for segment in decode_script(script, context.menu)
            for _ in range(segment.steps)
        ]
        self._alone = Decision(context.menu.decode_alone)
        self._idle = context.menu.get(idle)
        self._batch = batch
        self._next: int | None = None

    def decide(self, decode: DecodeState, finetune: FinetuneState) -> Decision:
        if self._next is None and has_begun(decode.batch, decode.waiting, self._batch):
            self._next = 0
        if self._next is None or self._next >= len(self._decisions):
            return self._alone
        self._next += 1
        return self._decisions[self._next - 1]

    def idle(self, finetune: FinetuneState) -> Share:
        return self._idle


def has_begun(batch: int, waiting: int, wanted: int) -> bool:
    """Whether all requests of the group run."""
    return batch >= wanted and not waiting


def encode_script(script: Sequence[Segment]) -> str:
    """A script as a policy's parameter: "2/0:10:0.0,1/1:10:0.0"."""
    return ",".join(f"{segment.share}:{segment.steps}:{segment.exclusive_ms!r}" for segment in script)


def decode_script(text: str, menu: Menu) -> Iterator[Segment]:
    for part in filter(None, text.split(",")):
        share, steps, exclusive_ms = part.split(":")
        yield Segment(menu.get(share), float(exclusive_ms), int(steps))


def segments_of(rows: Sequence[StepRecord], script: Sequence[Segment], batch: int) -> list[int]:
    """For each row the index of its segment in ``script``; -1 before, after, and for a segment's first steps."""
    labels = [-1] * len(rows)
    begun = (index for index, row in enumerate(rows) if has_begun(row.batch, row.waiting, batch))
    first = next(begun, len(rows))
    for number, segment in enumerate(script):
        dropped = min(DROPPED, segment.steps - 1)
        for index in range(first + dropped, min(first + segment.steps, len(rows))):
            labels[index] = number
        first += segment.steps
    return labels
