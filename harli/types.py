"""The vocabulary: what scheduler, worker, trainer, policies and records say to each other.

Ground floor of the package: standard library only, imports nothing of ours. Times are milliseconds
where a name ends in ``_ms`` and seconds where it ends in ``_s``; ``time_s`` is a monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class HarliError(Exception):
    """A problem that the user can mend: one line that says what is wrong and what to do (exit code 2)."""


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
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Costs:
    """What co-location costs beyond the lengths of steps and windows, as a profile measured it."""

    switch_ms: float = 0.0
    """A step with a larger decode part than the step before takes this much longer (a unit may still run)."""
    window_overhead_ms: float = 0.0
    """A window of ``w`` makes the gap ``w + window_overhead_ms`` longer."""
    window_dead_ms: float = 0.0
    """Of the time that a window really takes, this much yields no finetuning."""


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
        """Longest gap that the next token may take.

        For an ITL SLO the SLO; for a TPOT SLO the tightest request's slack, but never more than twice
        the SLO, so that banked slack is not spent as one long stall. Infinite without an SLO.
        """
        budget = math.inf if self.itl_ms is None else self.itl_ms
        if self.tpot_ms is not None:
            budget = min(budget, slack_ms, 2.0 * self.tpot_ms)
        return budget


class StepRecord(NamedTuple):
    """One decode step as it happened: a row of ``steps.parquet``, in this order of columns."""

    step: int
    time_s: float
    """When the step began, in seconds since the run began."""
    batch: int
    context_sum: int
    context_max: int
    prefill_tokens: int
    admitted: int
    waiting: int
    kv_blocks_free: int
    kv_blocks_total: int
    kv_blocks_lent: int
    slack_ms: float
    microbatch_tokens: int
    kept_layers: int
    """Finetuning's shape, as in FinetuneState."""
    wanted_finetune: int
    """Compute units that the policy's share gives to finetuning."""
    decode_units: int
    """Compute units that decode had; fewer than decided while a finetune unit still ran."""
    finetune_units: int
    exclusive_ms: float
    """Window that the policy asked for."""
    window_ms: float
    """What that window, or waiting for a unit to end, really took."""
    reclaim_ms: float
    """How long it took to get lent blocks back that requests needed at once; NaN on steps that needed none."""
    latency_ms: float
    """The forward pass and sampling."""
    gap_ms: float
    """Since the end of the step before: what a client sees between tokens. NaN on the first step after idling."""
    predicted_ms: float
    """The predictor's gap and its upper bound; NaN without a predictor."""
    bound_ms: float
    finetune_tokens: float
    """Training tokens done since the step before, a micro-batch's tokens spread evenly over its units."""
    decode_cpu_ms: float
    """CPU time that each side's threads had since the step before; NaN where it cannot be read."""
    finetune_cpu_ms: float
    decide_cpu_us: float
    """Thread CPU time and wall time of state, prediction and policy together."""
    decide_wall_us: float
    hook_us: float
    """Wall time of everything else our hooks did in the step, waiting aside."""

    @classmethod
    def begun(
        cls,
        decode: DecodeState,
        finetune: FinetuneState,
        decision: Decision,
        *,
        decode_units: int,
        held_units: int,
        predicted_ms: float,
        bound_ms: float,
        window_ms: float,
        clock_zero: float = 0.0,
        reclaim_ms: float = math.nan,
        decide_cpu_us: float = math.nan,
        decide_wall_us: float = math.nan,
        hook_us: float = math.nan,
    ) -> StepRecord:
        """What is known of a step when it begins; the rest is NaN, or 0 finetune tokens.

        ``held_units``: of the finetune unit that runs. ``clock_zero``: when the run began, on ``decode``'s clock.
        """
        wanted = decision.share.finetune
        return cls(
            step=decode.step,
            time_s=decode.time_s - clock_zero,
            batch=decode.batch,
            context_sum=decode.context_sum,
            context_max=decode.context_max,
            prefill_tokens=decode.prefill_tokens,
            admitted=decode.admitted,
            waiting=decode.waiting,
            kv_blocks_free=decode.kv_blocks_free,
            kv_blocks_total=decode.kv_blocks_total,
            kv_blocks_lent=decode.kv_blocks_lent,
            slack_ms=decode.slack_ms,
            microbatch_tokens=finetune.microbatch_tokens,
            kept_layers=finetune.kept_layers,
            wanted_finetune=wanted,
            decode_units=decode_units,
            finetune_units=max(held_units, wanted if finetune.ready else 0),
            exclusive_ms=decision.exclusive_ms,
            window_ms=window_ms,
            reclaim_ms=reclaim_ms,
            latency_ms=math.nan,
            gap_ms=math.nan,
            predicted_ms=predicted_ms,
            bound_ms=bound_ms,
            finetune_tokens=0.0,
            decode_cpu_ms=math.nan,
            finetune_cpu_ms=math.nan,
            decide_cpu_us=decide_cpu_us,
            decide_wall_us=decide_wall_us,
            hook_us=hook_us,
        )


class UpdateRecord(NamedTuple):
    """One optimizer step: a row of ``finetune.parquet``."""

    update: int
    time_s: float
    """When it was committed, in seconds since the run began."""
    loss: float
    """Mean over the update's target tokens."""
    tokens: int
    """Unpadded tokens of its micro-batches."""
    learning_rate: float


class UnitRecord(NamedTuple):
    """One unit of finetuning as it ran: a row of a profile's ``units.parquet``."""

    time_s: float
    """When it began, in seconds since the run began."""
    kind: str
    """``embed``, ``forward``, ``loss``, ``backward`` or ``optimizer``; ``..._kept`` if activations are kept."""
    units: int
    """Compute units it ran on."""
    beside_decode: bool
    """Decode had requests when it began."""
    microbatch_tokens: int
    kept_layers: int
    duration_ms: float
    tokens: float
    """Training tokens that it stands for."""


class RequestRecord(NamedTuple):
    """One request as the client saw it: a row of ``requests.parquet``."""

    request_id: str
    arrival_s: float
    """When it was due, in seconds since the run began; latencies count from here."""
    prompt_tokens: int
    output_tokens: int
    """Tokens it asked for; it has fewer gaps than that only if it failed."""
    clipped: bool
    """Its lengths were cut to the model's limit."""
    ttft_ms: float
    tpot_ms: float
    """Mean gap after the first token; NaN with fewer than two tokens."""
    queue_wait_ms: float
    """From being due to being scheduled first."""
    finished_s: float
    itl_ms: tuple[float, ...]
    """Gaps between consecutive output tokens."""
    error: str
    """Empty when it completed."""
