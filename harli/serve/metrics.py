"""Harli's metrics for Prometheus, beside vLLM's on ``/metrics``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Summary

from harli.rows import StepRecord, UpdateRecord
from harli.serve.attainment import Counts
from harli.types import Slo

DECISION_BUCKETS_S = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 1e-2)
DRIFT = 1.3
"""A predictor whose forecasts need a larger factor than this, or its inverse, should be trained again."""
FACTORS = ("gap_factor_alone", "gap_factor_split")
"""What ``CorrectedPredictor.state`` calls the factors on forecasts."""


class Metrics:
    """Set once a second. Names of counters end in ``_total`` on the page."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"harli_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"harli_{name}", text, labels, registry=registry)

        self._slo = gauge("slo_seconds", "Decode's objective.", "objective")
        self._attainment = gauge("slo_attainment_ratio", "Within the objective, last minute.", "objective")
        self._asked = counter("slo_asked", "Gaps between tokens (itl) or requests (tpot).", "objective")
        self._attained = counter("slo_attained", "Those of them within the objective.", "objective")
        self._share = gauge(
            "finetune_share_ratio",
            "Part of the compute units that steps of the last second gave finetuning; 0 when decode idles.",
        )
        self._lent = gauge("lent_memory_ratio", "KV cache lent to finetuning, as of the last step.")
        self._tokens = counter("finetune_tokens", "Tokens of committed updates.")
        self._updates = counter("finetune_updates", "Committed updates.")
        self._loss = gauge("finetune_loss", "Training loss of the last update.")
        self._error = Summary(
            "harli_prediction_error_ratio", "abs(predicted / actual gap - 1) of steps.", registry=registry
        )
        self._bounded = counter("prediction_within_bound", "Predicted steps whose gap was within the bound.")
        self._factor = gauge("prediction_factor_ratio", "Online correction of forecasts.", "side")
        self._drift = gauge("prediction_drift", f"1 when a correction is beyond {DRIFT} or its inverse.")
        self._decision = Histogram(
            "harli_decision_seconds",
            "State, prediction and policy of a step, wall time.",
            buckets=DECISION_BUCKETS_S,
            registry=registry,
        )
        self._enabled = gauge("finetuning_enabled", "1 unless an operator has switched finetuning off.")
        self._training = gauge("finetuning_running", "1 while a job trains.")
        self._open = gauge("breaker_open", "1 while the circuit breaker holds finetuning back.")
        self._openings = counter("breaker_openings", "Times that the circuit breaker has opened.")
        for objective in ("itl", "tpot"):
            self.attained(objective, Counts(), Counts())

    def objectives(self, slo: Slo) -> None:
        for objective, limit_ms in (("itl", slo.itl_ms), ("tpot", slo.tpot_ms)):
            self._slo.labels(objective).set(math.nan if limit_ms is None else limit_ms / 1e3)

    def attained(self, objective: str, new: Counts, last_minute: Counts) -> None:
        """``new``: since the last call."""
        self._asked.labels(objective).inc(new.asked)
        self._attained.labels(objective).inc(new.attained)
        ratio = last_minute.attained / last_minute.asked if last_minute.asked else math.nan
        self._attainment.labels(objective).set(ratio)

    def steps(self, rows: Sequence[StepRecord]) -> None:
        """Steps since the last call; the share is 0 without any."""
        units = sum(row.decode_units + row.finetune_units for row in rows)
        self._share.set(sum(row.finetune_units for row in rows) / units if units else 0.0)
        if rows and (total := rows[-1].kv_blocks_total):
            self._lent.set(rows[-1].kv_blocks_lent / total)
        for row in rows:
            self._decision.observe(row.decide_wall_us / 1e6)
            actual_ms = row.gap_ms - row.window_ms
            if actual_ms > 0.0 and row.predicted_ms > 0.0:  # neither is NaN
                self._error.observe(abs(row.predicted_ms / actual_ms - 1.0))
                self._bounded.inc(actual_ms <= row.bound_ms)

    def updates(self, rows: Sequence[UpdateRecord]) -> None:
        """Updates since the last call."""
        if rows:
            self._updates.inc(len(rows))
            self._tokens.inc(sum(row.tokens for row in rows))
            self._loss.set(rows[-1].loss)

    def correction(self, state: Mapping[str, float]) -> None:
        """What ``Predictor.state`` says; nothing without a predictor."""
        factors = {name: state[name] for name in FACTORS if name in state}
        for name, factor in factors.items():
            self._factor.labels(name.removeprefix("gap_factor_")).set(factor)
        self._drift.set(any(not 1.0 / DRIFT <= factor <= DRIFT for factor in factors.values()))

    def finetuning(self, *, enabled: bool, training: bool, breaker_open: bool) -> None:
        self._enabled.set(enabled)
        self._training.set(training)
        self._open.set(breaker_open)

    def breaker_opened(self) -> None:
        self._openings.inc()


def keep_newest_series(loggers: Iterable[Any]) -> None:
    """Of the adapters in use, as vLLM's loggers of statistics tell them, keep the newest series and drop the others.

    vLLM makes a series for every order of names and drops none, and every job's name is new. The value is a time.
    """
    for logger in loggers:
        gauge = getattr(logger, "gauge_lora_info", None)
        if isinstance(gauge, Gauge):  # else another vLLM, or no adapters
            samples = [sample for family in gauge.collect() for sample in family.samples]
            gauge.clear()
            for newest in sorted(samples, key=lambda sample: sample.value)[-1:]:
                gauge.labels(**newest.labels).set(newest.value)
