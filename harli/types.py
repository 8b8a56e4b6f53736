"""The vocabulary: what scheduler, worker, trainer, policies and records say to each other.

Ground floor of the package: standard library only, imports nothing of ours. Times are milliseconds
where a name ends in ``_ms`` and seconds where it ends in ``_s``; ``time_s`` is a monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


class HarliError(Exception):
    """A problem that the user can mend: one line that says what is wrong and what to do (exit code 2)."""


def one_line(error: BaseException) -> str:
    """Kind and message of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


@dataclass(slots=True)
class DecodeState:
    """Decode as the scheduler sees it when a step begins; one object, updated in place every step."""

    time_s: float = 0.0
    step: int = 0
    batch: int = 0
    """Requests scheduled in this step."""
    context_sum: int = 0
    """KV tokens of the scheduled requests, this step's included."""
    context_max: int = 0
    prefill_tokens: int = 0
    """Prompt tokens computed in this step (0 on a pure decode step)."""
    admitted: int = 0
    """Requests whose first step this is."""
    waiting: int = 0
    kv_blocks_free: int = 0
    kv_blocks_total: int = 0
    kv_blocks_lent: int = 0
    """Out of requests' reach: lent to finetuning, being taken, or on their way back."""
    slack_ms: float = math.inf
    """Smallest slack of a running request: how late its next token may come within the TPOT SLO."""


@dataclass(slots=True)
class FinetuneState:
    """Finetuning when a step begins; one object, updated in place."""

    ready: bool = False
    """There is a unit to run. Without one, any share but "decode alone" wastes the device."""
    microbatch_tokens: int = 0
    kept_layers: int = 0
    """Layers whose activations are kept rather than recomputed."""
    held_units: int = 0
    """Compute units of the unit that runs: decode cannot have them in the step that begins."""
    held_ms: float = 0.0
    """How long that unit is expected to run on; 0 when none runs."""


@dataclass(frozen=True, slots=True)
class Share:
    """One entry of a partitioner's menu: compute units (cores, SMs) of each side; they never overlap."""

    decode: int
    finetune: int

    @property
    def finetune_share(self) -> float:
        """The fraction of the device that finetuning has."""
        return self.finetune / (self.decode + self.finetune)

    def __str__(self) -> str:
        return f"{self.decode}/{self.finetune}"


@dataclass(frozen=True, slots=True)
class Menu:
    """The shares that a partitioner can apply, ordered by growing finetune share.

    The first is "decode alone", the last "finetune alone" (used by exclusive windows and when decode
    is idle); what lies between are the splits.
    """

    shares: tuple[Share, ...]

    def __post_init__(self) -> None:
        order = [share.finetune for share in self.shares]
        if len(self.shares) < 2 or order != sorted(set(order)) or self.shares[0].finetune or self.shares[-1].decode:
            raise ValueError(f"not a menu: {', '.join(map(str, self.shares))}")

    @classmethod
    def parse(cls, names: Iterable[str]) -> Menu:
        """The menu of shares called ``names``, such as "3/1". Raises ValueError when they make no menu."""
        return cls(tuple(Share(*map(int, name.split("/", 1))) for name in names))

    @property
    def decode_alone(self) -> Share:
        return self.shares[0]

    @property
    def finetune_alone(self) -> Share:
        return self.shares[-1]

    @property
    def splits(self) -> tuple[Share, ...]:
        """Shares that give both sides something."""
        return self.shares[1:-1]

    def get(self, name: str) -> Share:
        """The share called ``name`` ("3/1"). Raises HarliError when the menu has none."""
        for share in self.shares:
            if str(share) == name:
                return share
        raise HarliError(f"no share {name!r} on this device; it has {', '.join(map(str, self.shares))}")

    def largest_decode(self, units: int) -> int:
        """The largest decode part that is no more than ``units``; 0 if there is none."""
        return max((share.decode for share in self.shares if share.decode <= units), default=0)

    def largest_finetune(self, units: int) -> int:
        """The largest finetune part that is no more than ``units``; 0 if there is none."""
        return max((share.finetune for share in self.shares if share.finetune <= units), default=0)


@dataclass(frozen=True, slots=True)
class Decision:
    """What a policy wants of one step: a share, and time for finetuning alone before the step."""

    share: Share
    exclusive_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class UnitTime:
    """How long one kind of unit takes on ``units`` compute units with nothing beside it."""

    kind: str
    units: int
    microbatch_tokens: int
    kept_layers: int
    per_pass: float
    """Units of this kind in one micro-batch; the optimizer's are spread over the micro-batches of an update."""
    mean_ms: float


@dataclass(frozen=True, slots=True)
class Costs:
    """What co-location costs beyond the lengths of steps and windows, as a profile measured it."""

    switch_ms: float = 0.0
    """A step with a larger decode part than the step before takes this much longer (a unit may still run)."""
    window_overhead_ms: float = 0.0
    """A window of ``w`` makes the gap ``w + window_overhead_ms`` longer."""


LONGEST_GAP_MS = 1000.0
"""Where no SLO limits a gap: a window has to end."""


@dataclass(frozen=True, slots=True)
class Slo:
    """Decode's latency objective; ``None`` where there is none."""

    itl_ms: float | None = None
    """Every gap between two output tokens of a request."""
    tpot_ms: float | None = None
    """The mean gap of a request."""

    def __post_init__(self) -> None:
        for name, value in (("ITL", self.itl_ms), ("TPOT", self.tpot_ms)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise HarliError(f"the {name} SLO must be a positive number of milliseconds, not {value}")

    def budget_ms(self, slack_ms: float) -> float:
        """Longest gap that the next token may take; negative when the tightest request is late already.

        For an ITL SLO the SLO; for a TPOT SLO the tightest request's slack, but never more than twice
        the SLO, so that banked slack is not spent as one long stall. Never more than ``LONGEST_GAP_MS``.
        """
        budget = LONGEST_GAP_MS if self.itl_ms is None else min(self.itl_ms, LONGEST_GAP_MS)
        if self.tpot_ms is not None:
            budget = min(budget, slack_ms, 2.0 * self.tpot_ms)
        return budget
