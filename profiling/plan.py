"""What a profile measures, and in which order.

A *group* is a batch, a mix of context lengths and a finetune shape; its segments are a few steps each at
decode alone and at splits, so that what is compared was measured within seconds. Corners come first;
between them and the space lies a scrambled Sobol sequence (Sobol 1967, Owen 1998; ``scipy.stats.qmc``).
One reference group comes back throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from harli.config import BATCHED_TOKENS
from harli.types import HarliError, Menu, Share

DROPPED = 2
"""Steps at the beginning of a segment that are left out."""
KEPT = 8
SPLITS_PER_GROUP = 3
SECONDS_PER_GROUP = 5.0
"""Of the budget: a group takes about two of them on a small model, the rest is for repeats."""
MIN_CONTEXT = 16
SPREAD = 0.8
"""Standard deviation of log context length in a skewed mix."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine can hold."""

    max_batch: int
    max_context: int
    """Tokens of one request, outputs included."""
    kv_tokens: int
    """Tokens of all requests together."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Steps in a row at one share and window."""

    share: Share
    exclusive_ms: float = 0.0
    steps: int = DROPPED + KEPT


@dataclass(frozen=True, slots=True)
class Group:
    """Segments of the same requests, measured right after each other."""

    number: int
    purpose: str
    contexts: tuple[int, ...]
    """Prompt tokens of each request; their number is the batch."""
    microbatch_tokens: int
    shares: tuple[Share, ...]
    visitor_tokens: int
    """Prompt of the short requests that come and go meanwhile: admissions, and in mixed role prefill."""

    @property
    def batch(self) -> int:
        return len(self.contexts)

    @property
    def keeps(self) -> bool:
        """Finetuning may keep activations in borrowed memory: in every other group, and not in the reference."""
        return self.purpose != "reference" and self.number % 2 == 1

    def point(self, share: Share, menu: Menu) -> int:
        """The id of the operating point at ``share``."""
        return self.number * len(menu.shares) + menu.shares.index(share)


class Plan:
    """Follows from its arguments alone: the same ones give the same plan."""

    def __init__(
        self, *, seed: int, budget_s: float, menu: Menu, limits: Limits, microbatches: Sequence[int], role: str
    ) -> None:
        """``microbatches``: the finetune shapes, in tokens of a micro-batch. Raises HarliError without room."""
        self.menu = menu
        self.microbatches = tuple(microbatches)
        self.described: dict[str, Any] = {
            "seed": seed,
            "budget_s": budget_s,
            "shares": [str(share) for share in menu.shares],
            "limits": asdict(limits),
            "microbatches": list(microbatches),
            "role": role,
        }
        self._seed = seed
        self._limits = limits
        self._prompts_take_steps = role != "decode"
        self._longest = _steps_of(1 + min(len(menu.splits), SPLITS_PER_GROUP))
        self._longest += self._prompt_steps(min(limits.kv_tokens, limits.max_batch * limits.max_context))
        if limits.max_context < 2 * (MIN_CONTEXT + self._longest):
            raise HarliError(f"requests of {limits.max_context} tokens are too short to profile; raise --max-model-len")
        corners = self._corners()
        fill = max(0, int(budget_s / SECONDS_PER_GROUP) - len(corners))
        self.groups: tuple[Group, ...] = (*corners, *self._fill(len(corners), fill))
        self.corners = len(corners)
        middle = self._group(0, "reference", 0.55, 0.5, skewed=False, microbatch=self._middle_shape, splits=None)
        self.reference = _numbered(middle, len(self.groups))

    def script(self, group: Group, visit: int) -> list[Segment]:
        """The group's segments in random order, then once more: drift cancels, and repeats can be compared."""
        rng = np.random.default_rng((self._seed, group.number, visit))
        orders = [rng.permutation(len(group.shares)) for _ in range(2)]
        return [Segment(group.shares[index]) for order in orders for index in order]

    def windows(self, lengths_ms: Sequence[float]) -> list[Segment]:
        """Exclusive windows before steps of decode alone, beside none."""
        alone = self.menu.decode_alone
        return [Segment(alone, length) for length in (0.0, *lengths_ms, *reversed(lengths_ms), 0.0)]

    def output_tokens(self, group: Group, script: Sequence[Segment]) -> int:
        """Tokens a request has to live for, so that all are there from the first segment to the last."""
        return sum(segment.steps for segment in script) + self._prompt_steps(sum(group.contexts)) + 12

    # Details

    def _prompt_steps(self, tokens: int) -> int:
        """Steps in which prompts of so many tokens are computed, while the first requests run already."""
        return -(-tokens // BATCHED_TOKENS) if self._prompts_take_steps else 0

    @property
    def _middle_shape(self) -> int:
        return self.microbatches[len(self.microbatches) // 2]

    def _corners(self) -> list[Group]:
        places = [(batch, context) for batch in (0.0, 1.0) for context in (0.0, 1.0)]
        shape = self._middle_shape
        found = [
            self._group(number, "corner", batch, context, skewed=False, microbatch=shape, splits=None)
            for number, (batch, context) in enumerate(places)
        ]
        order = np.random.default_rng(self._seed).permutation(len(found))
        return [_numbered(found[index], number) for number, index in enumerate(order)]

    def _fill(self, first: int, count: int) -> Iterator[Group]:
        from scipy.stats import qmc

        points = qmc.Sobol(5, rng=np.random.default_rng(self._seed)).random_base2(
            max(1, math.ceil(math.log2(count + 1)))
        )
        for number, (batch, context, skew, shape, splits) in enumerate(points[:count].tolist(), start=first):
            microbatch = self.microbatches[int(shape * len(self.microbatches))]
            yield self._group(number, "fill", batch, context, skewed=skew > 0.5, microbatch=microbatch, splits=splits)

    def _group(
        self, number: int, purpose: str, batch: float, context: float, *, skewed: bool, microbatch: int,
        splits: float | None,
    ) -> Group:  # fmt: skip
        """The group at a place of the unit square: logarithmic in batch and in mean context length."""
        limits = self._limits
        size = round(limits.max_batch**batch)
        longest = limits.max_context - self._longest - 2
        fitting = min(longest, limits.kv_tokens // size - self._longest - 2)
        mean = MIN_CONTEXT * (max(fitting, MIN_CONTEXT) / MIN_CONTEXT) ** context
        rng = np.random.default_rng((self._seed, number))
        factors = np.exp(SPREAD * rng.standard_normal(size)) if skewed else np.ones(size)
        contexts = np.clip(mean * factors / factors.mean(), MIN_CONTEXT, longest).astype(int)
        if contexts.sum() > fitting * size:
            contexts = np.maximum(MIN_CONTEXT, contexts * fitting * size // contexts.sum())
        visitor = int(MIN_CONTEXT * (min(longest, 1024) / MIN_CONTEXT) ** rng.random())
        return Group(
            number=number,
            purpose=purpose,
            contexts=tuple(contexts.tolist()),
            microbatch_tokens=microbatch,
            shares=(self.menu.decode_alone, *self._some_splits(splits)),
            visitor_tokens=visitor,
        )

    def _some_splits(self, place: float | None) -> Sequence[Share]:
        """All splits, or a few of them spread over the menu, beginning at a place that differs from group to group."""
        splits = self.menu.splits
        if len(splits) <= SPLITS_PER_GROUP:
            return splits
        stride = len(splits) / SPLITS_PER_GROUP
        first = 0.5 * stride if place is None else place * stride
        return tuple(splits[int(first + index * stride)] for index in range(SPLITS_PER_GROUP))


def _steps_of(shares: int) -> int:
    """Steps of a group's script, and some for requests that are admitted before others."""
    return 2 * shares * (DROPPED + KEPT) + 24


def _numbered(group: Group, number: int) -> Group:
    return replace(group, number=number)
