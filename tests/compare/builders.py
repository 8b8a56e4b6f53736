"""Settings of comparisons, and the metrics of runs that never were."""

from __future__ import annotations

from typing import Any

from harli.compare.settings import ComparisonSettings
from harli.compare.verdict import ADMITTED, TOKENS, WAIT, Run
from harli.config import RunSettings, SloSettings
from harli.records.summary import METRICS


def comparison_settings(*policies: str, itl_ms: float | None = None, **changes: Any) -> ComparisonSettings:
    run = RunSettings(policy="separate", slo=SloSettings(itl_ms=itl_ms))
    return ComparisonSettings(policies=policies, **{"run": run, **changes})


def rounds(*runs: Run) -> dict[int, Run]:
    return dict(enumerate(runs, 1))


def shown(tokens: float = 0.0, failure: str = "", **metrics: float | None) -> Run:
    """A run whose decode is as good as alone, but for ``metrics`` given by their last words."""
    names = {name.rsplit("/")[-1]: name for name in (*METRICS, ADMITTED)}
    usual = {
        "slo/itl_attainment": 1.0,
        "decode/itl_p99_ms": 80.0,
        "decode/requests_failed": 0.0,
        ADMITTED: 2.0,
        WAIT: 50.0,
        TOKENS: tokens,
    }
    given = {names[name]: value for name, value in metrics.items()}
    return Run(dict.fromkeys((*METRICS, ADMITTED)) | usual | given, failure)
