"""Metrics without a server; what is on its page is checked in ``test_operate``."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Gauge
from vllm.v1.metrics.loggers import PrometheusStatLogger

from harli.rows import UpdateRecord
from harli.serve.attainment import Counts
from harli.serve.metrics import DRIFT, Metrics, keep_newest_series
from harli.types import Slo
from tests.records.builders import STEP

EXAMPLES = Path(__file__).parents[2] / "examples"
UPDATE = UpdateRecord(update=0, time_s=0.0, loss=3.0, tokens=100, learning_rate=1e-4)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    return Metrics(registry)


def test_steps_are_judged_by_their_forecasts(metrics: Metrics, registry: CollectorRegistry) -> None:
    rows = [
        STEP._replace(gap_ms=12.0, window_ms=2.0, predicted_ms=11.0, bound_ms=12.0),
        STEP._replace(gap_ms=20.0, window_ms=0.0, predicted_ms=10.0, bound_ms=15.0),
        STEP._replace(gap_ms=math.nan, predicted_ms=10.0, bound_ms=15.0),
        STEP._replace(gap_ms=20.0, predicted_ms=math.nan, bound_ms=math.nan),
    ]
    metrics.steps(rows)
    assert registry.get_sample_value("harli_prediction_error_ratio_count") == 2
    assert registry.get_sample_value("harli_prediction_error_ratio_sum") == pytest.approx(0.1 + 0.5)
    assert registry.get_sample_value("harli_prediction_within_bound_total") == 1
    assert registry.get_sample_value("harli_decision_seconds_count") == 4


def test_the_share_is_that_of_the_units_used(metrics: Metrics, registry: CollectorRegistry) -> None:
    metrics.steps([STEP._replace(decode_units=4, finetune_units=0), STEP._replace(decode_units=2, finetune_units=2)])
    assert registry.get_sample_value("harli_finetune_share_ratio") == 0.25
    metrics.steps([])
    assert registry.get_sample_value("harli_finetune_share_ratio") == 0.0


def test_lent_memory_is_a_part_of_the_cache(metrics: Metrics, registry: CollectorRegistry) -> None:
    metrics.steps([STEP._replace(kv_blocks_total=200, kv_blocks_lent=50)])
    assert registry.get_sample_value("harli_lent_memory_ratio") == 0.25


def test_attainment_is_nothing_before_there_is_something_to_attain(
    metrics: Metrics, registry: CollectorRegistry
) -> None:
    name, labels = "harli_slo_attainment_ratio", {"objective": "itl"}
    metrics.objectives(Slo(itl_ms=50.0))
    assert registry.get_sample_value("harli_slo_seconds", labels) == 0.05
    assert math.isnan(registry.get_sample_value(name, labels) or 0.0)
    metrics.attained("itl", Counts(4, 3), Counts(10, 9))
    metrics.attained("itl", Counts(2, 2), Counts(12, 11))
    assert registry.get_sample_value(name, labels) == pytest.approx(11 / 12)
    assert registry.get_sample_value("harli_slo_asked_total", labels) == 6
    assert registry.get_sample_value("harli_slo_attained_total", labels) == 5


def test_updates_add_up(metrics: Metrics, registry: CollectorRegistry) -> None:
    metrics.updates([UPDATE._replace(tokens=100, loss=3.0), UPDATE._replace(tokens=20, loss=2.0)])
    metrics.updates([])
    assert registry.get_sample_value("harli_finetune_tokens_total") == 120
    assert registry.get_sample_value("harli_finetune_updates_total") == 2
    assert registry.get_sample_value("harli_finetune_loss") == 2.0


@pytest.mark.parametrize(("factor", "drifts"), [(1.0, 0), (DRIFT + 0.01, 1), (1.0 / DRIFT - 0.01, 1), (DRIFT, 0)])
def test_a_forecast_that_needs_much_correction_is_told(
    metrics: Metrics, registry: CollectorRegistry, factor: float, drifts: int
) -> None:
    metrics.correction({"gap_factor_alone": 1.0, "gap_factor_split": factor, "bound_factor_split": 9.0, "steps": 3.0})
    assert registry.get_sample_value("harli_prediction_drift") == drifts
    assert registry.get_sample_value("harli_prediction_factor_ratio", {"side": "split"}) == factor


def test_the_dashboard_asks_for_metrics_that_exist(metrics: Metrics, registry: CollectorRegistry) -> None:
    metrics.objectives(Slo(itl_ms=50.0))
    metrics.correction({"gap_factor_alone": 1.0, "gap_factor_split": 1.0})
    known = {sample.name for family in registry.collect() for sample in family.samples}
    dashboard = json.loads((EXAMPLES / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = {name for expression in asked for name in re.findall(r"harli_\w+", expression)}
    assert used
    assert used <= known


def test_of_the_adapters_in_use_only_the_newest_series_stays(registry: CollectorRegistry) -> None:
    gauge = Gauge("vllm:lora_requests_info", "Adapters.", ["max_lora", "running"], registry=registry)
    for time_s, names in ((5.0, "a,b"), (7.0, "b,a"), (6.0, "a")):
        gauge.labels(max_lora=1, running=names).set(time_s)
    loggers = [SimpleNamespace(gauge_lora_info=gauge), SimpleNamespace(gauge_lora_info=None), object()]
    for _ in range(2):
        keep_newest_series(loggers)
    (family,) = registry.collect()
    assert [(sample.labels["running"], sample.value) for sample in family.samples] == [("b,a", 7.0)]
    assert "gauge_lora_info" in PrometheusStatLogger.__init__.__code__.co_names  # where vLLM keeps it
