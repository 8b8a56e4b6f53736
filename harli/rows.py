"""The rows of the tables that a run writes: what happened in a step, an update, a unit, and to a request.

Beside ``harli.types``, whose conventions for units hold here too; imports nothing else of ours.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from harli.types import Decision, DecodeState, FinetuneState


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
