"""The metrics of a run, computed from its record."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from harli.records.columns import Floats, column
from harli.records.schema import REQUESTS, STEPS, UPDATES
from harli.types import Slo

SETTLED_STEPS = 100


def summarise(
    steps: pa.Table, requests: pa.Table, updates: pa.Table, *, slo: Slo, duration_s: float
) -> dict[str, float | None]:
    """Every metric of a run, in the order in which they are shown; None where a metric has no data, never NaN.

    Percentiles are over everything measured, what failed requests got included. Rates are over
    ``duration_s`` seconds and count completed requests, received output tokens, and tokens of
    committed updates. Batch is the mean over steps. ITL attainment is the fraction of output tokens
    after the first whose gap is within the SLO; TPOT attainment the fraction of requests for two or
    more output tokens whose mean gap is. A failed request misses both, with every gap it asked for.
    Lent memory is a fraction of the KV cache while decode runs, kept layers are those that finetuning did not have to
    recompute then; reclaims are those that requests needed at once.
    Predictions are judged at the shares that steps really had, after the first ``SETTLED_STEPS`` of them,
    in which the online correction finds its level.
    """
    completed = pc.equal(requests["error"], "").to_numpy().astype(bool)
    ttft_ms = column(requests, "ttft_ms")
    tpot_ms = column(requests, "tpot_ms")
    gaps_ms = pc.list_flatten(requests["itl_ms"]).to_numpy()
    tokens = pc.list_value_length(requests["itl_ms"]).to_numpy() + np.isfinite(ttft_ms)
    losses = column(updates, "loss")
    return {
        "decode/tpot_p50_ms": _percentile(tpot_ms, 50),
        "decode/tpot_p90_ms": _percentile(tpot_ms, 90),
        "decode/tpot_p99_ms": _percentile(tpot_ms, 99),
        "decode/itl_p50_ms": _percentile(gaps_ms, 50),
        "decode/itl_p90_ms": _percentile(gaps_ms, 90),
        "decode/itl_p99_ms": _percentile(gaps_ms, 99),
        "decode/ttft_p50_ms": _percentile(ttft_ms, 50),
        "decode/ttft_p99_ms": _percentile(ttft_ms, 99),
        "decode/queue_wait_p99_ms": _percentile(column(requests, "queue_wait_ms"), 99),
        "decode/requests_per_s": _rate(completed.sum(), duration_s),
        "decode/output_tokens_per_s": _rate(tokens.sum(), duration_s),
        "decode/requests_completed": float(completed.sum()),
        "decode/requests_failed": float((~completed).sum()),
        "decode/batch_mean": float(column(steps, "batch").mean()) if len(steps) else None,
        "decode/busy_fraction": _busy_fraction(steps, duration_s),
        "slo/tpot_attainment": _tpot_attainment(requests, completed, slo.tpot_ms),
        "slo/itl_attainment": _itl_attainment(requests, completed, slo.itl_ms),
        "finetune/tokens_per_s": _rate(column(updates, "tokens").sum(), duration_s),
        "finetune/updates": float(len(updates)),
        "finetune/loss_first": _finite(losses[0]) if len(losses) else None,
        "finetune/loss_last": _finite(losses[-1]) if len(losses) else None,
        **_prediction(steps),
        **_memory(steps),
        "scheduler/decision_p99_us": _percentile(column(steps, "decide_cpu_us"), 99),
        "scheduler/decision_wall_p99_us": _percentile(column(steps, "decide_wall_us"), 99),
        "scheduler/hook_p99_us": _percentile(column(steps, "hook_us"), 99),
        "scheduler/step_p50_ms": _percentile(column(steps, "latency_ms"), 50),
    }


def _prediction(steps: pa.Table) -> dict[str, float | None]:
    """Error of the predicted gaps, coverage of their bounds, and the median of bound over gap."""
    actual_ms = column(steps, "gap_ms") - column(steps, "window_ms")
    predicted_ms, bound_ms = column(steps, "predicted_ms"), column(steps, "bound_ms")
    judged = np.flatnonzero(np.isfinite(actual_ms) & np.isfinite(predicted_ms))[SETTLED_STEPS:]
    if not judged.size:
        return dict.fromkeys(("predictor/gap_mape", "predictor/bound_coverage", "predictor/bound_width"))
    actual_ms, predicted_ms, bound_ms = actual_ms[judged], predicted_ms[judged], bound_ms[judged]
    return {
        "predictor/gap_mape": float(np.mean(np.abs(predicted_ms / actual_ms - 1.0))),
        "predictor/bound_coverage": float(np.mean(actual_ms <= bound_ms)),
        "predictor/bound_width": float(np.median(bound_ms / predicted_ms)),
    }


def _memory(steps: pa.Table) -> dict[str, float | None]:
    """How much of the KV cache was lent, as a mean over steps and at most, to what end, and what recalls took."""
    lent = column(steps, "kv_blocks_lent") / np.maximum(column(steps, "kv_blocks_total"), 1.0)
    reclaim_ms = column(steps, "reclaim_ms")
    kept = column(steps, "kept_layers")[column(steps, "microbatch_tokens") > 0]
    return {
        "memory/lent_mean": float(lent.mean()) if lent.size else None,
        "memory/lent_peak": float(lent.max()) if lent.size else None,
        "memory/kept_layers_mean": float(kept.mean()) if kept.size else None,
        "memory/reclaims": float(np.isfinite(reclaim_ms).sum()),
        "memory/reclaim_p99_ms": _percentile(reclaim_ms, 99),
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _percentile(values: Floats, percent: float) -> float | None:
    """Linear interpolation between the finite values."""
    finite = values[np.isfinite(values)]
    return float(np.percentile(finite, percent)) if finite.size else None


def _rate(amount: float, duration_s: float) -> float | None:
    return float(amount) / duration_s if duration_s > 0 else None


def _busy_fraction(steps: pa.Table, duration_s: float) -> float | None:
    """Share of the run during which some request was running: the gaps between steps, or, after idling, the step."""
    gap_ms = column(steps, "gap_ms")
    busy_ms = np.where(np.isfinite(gap_ms), gap_ms, column(steps, "latency_ms")).sum()
    fraction = _rate(busy_ms / 1000.0, duration_s)
    return None if fraction is None else min(fraction, 1.0)


def _tpot_attainment(requests: pa.Table, completed: NDArray[np.bool_], slo_ms: float | None) -> float | None:
    several = column(requests, "output_tokens") >= 2
    if slo_ms is None or not several.any():
        return None
    within = completed & (column(requests, "tpot_ms") <= slo_ms)
    return float(within[several].mean())


def _itl_attainment(requests: pa.Table, completed: NDArray[np.bool_], slo_ms: float | None) -> float | None:
    asked = np.maximum(column(requests, "output_tokens") - 1, 0).sum()
    if slo_ms is None or not asked:
        return None
    gaps_ms = pc.list_flatten(requests.filter(pa.array(completed))["itl_ms"]).to_numpy()
    return float((gaps_ms <= slo_ms).sum() / asked)


METRICS = tuple(summarise(STEPS.table([]), REQUESTS.table([]), UPDATES.table([]), slo=Slo(), duration_s=0.0))
"""The names of all metrics: a run that nothing happened in has them too."""
