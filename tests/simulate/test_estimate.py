"""Estimates from logs: both simulations see the same requests, and metrics say about what their requests would."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from harli.commands.estimate import estimate
from harli.records.reader import Record, read_record
from harli.records.schema import STEPS
from harli.simulate.devices import USUAL, make_device
from harli.simulate.estimate import running_mean
from harli.simulate.metrics_log import COLUMNS
from harli.simulate.run import Simulation, SimulationSettings
from harli.types import HarliError
from harli.workload.base import Request, Workload
from tests.records.builders import STEP

KV_BLOCKS = 47_000


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    monkeypatch.chdir(tmp_path)
    found = typer.Typer()
    found.command()(estimate)
    return found


def invoke(app: typer.Typer, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--quiet"])


def shown(app: typer.Typer, log: str, *arguments: str) -> dict[str, Any]:
    result = invoke(app, "--log", log, "--slo-itl-ms", "6", "--policy", "static", "--json", *arguments)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def trace(seconds: int, per_s: int = 8) -> str:
    rows = [f"{1000 * number // per_s},400,{30 + number % 50}" for number in range(seconds * per_s + 1)]
    Path("trace.csv").write_text("\n".join(("timestamp,input_length,output_length", *rows)) + "\n")
    return "trace.csv"


def exported(record: Record, every_s: float) -> str:
    """A record's metrics as Prometheus would have them."""
    begins_s, batch = record.steps["time_s"].to_numpy(), record.steps["batch"].to_numpy()
    used = 1.0 - record.steps["kv_blocks_free"].to_numpy() / (KV_BLOCKS - 1.0)
    waiting = record.steps["waiting"].to_numpy()
    admitted = np.cumsum(record.steps["admitted"].to_numpy()) * 400
    rows = []
    for now_s in np.arange(every_s, begins_s[-1], every_s):
        at = int(np.searchsorted(begins_s, now_s)) - 1
        rows.append(f"{now_s},{batch[at]},{waiting[at]},{used[at]},{batch[: at + 1].sum()},{admitted[at]}")
    Path("metrics.csv").write_text("\n".join((",".join(COLUMNS), *rows)) + "\n")
    return "metrics.csv"


def test_a_trace_is_simulated_with_and_without_finetuning(app: typer.Typer) -> None:
    found = shown(app, trace(6))
    alone, beside = found["decode_alone"], found["with_finetuning"]
    assert alone["decode/requests_completed"] == beside["decode/requests_completed"] == 48
    assert alone["finetune/tokens_per_s"] == 0.0 < beside["finetune/tokens_per_s"]
    assert 0.0 < found["gpu_hours_per_day"] < 24.0
    assert alone["slo/itl_attainment"] >= beside["slo/itl_attainment"]
    assert found["simulated"] is True
    assert found["log_running_mean"] is None


def test_only_the_part_that_is_asked_for_is_simulated(app: typer.Typer) -> None:
    assert shown(app, trace(6), "--duration", "2")["decode_alone"]["decode/requests_completed"] == 16
    assert "static" in invoke(app, "--log", trace(2), "--slo-itl-ms", "6", "--policy", "static").stdout


def test_metrics_say_about_what_their_requests_do(app: typer.Typer, tmp_path: Path) -> None:
    """Requests of a memoryless stream are simulated, exported as metrics and estimated from those."""
    rng = np.random.default_rng(3)
    arrivals_s, lengths = np.sort(rng.uniform(0.0, 60.0, 900)), rng.geometric(1 / 150, 900)
    requests = tuple(Request(float(at_s), 400, int(length)) for at_s, length in zip(arrivals_s, lengths, strict=True))
    values = {"policy": "static", "device": "h200/llama-3-8b", "kv_blocks": KV_BLOCKS, "slo": {"itl_ms": 6.0}}
    settings = SimulationSettings.model_validate(USUAL | values | {"workload": {"duration_s": 60.0}})
    device = make_device(settings.device, None, settings.finetune, settings.noise, 0)
    measured = Simulation(settings, device, Workload("memoryless", requests)).execute(tmp_path / "record").summary
    found = shown(app, exported(read_record(tmp_path / "record"), 2.0), "--kv-blocks", str(KV_BLOCKS))
    beside = found["with_finetuning"]
    for name, within in (
        ("decode/requests_per_s", 0.15),
        ("decode/output_tokens_per_s", 0.1),
        ("decode/itl_p50_ms", 0.05),
        ("decode/batch_mean", 0.15),
        ("finetune/tokens_per_s", 0.05),
    ):
        assert beside[name] == pytest.approx(measured[name], rel=within), name
    assert found["decode_alone_running_mean"] == pytest.approx(found["log_running_mean"], rel=0.1)
    assert found["log_running_mean"] == pytest.approx(measured["decode/batch_mean"], rel=0.2)


def test_a_running_mean_is_over_time_as_that_of_a_log_is() -> None:
    """Steps of a larger batch take longer; after idling there is no gap, so the step counts."""
    steps = [STEP._replace(batch=1, gap_ms=math.nan, latency_ms=10.0), STEP._replace(batch=3, gap_ms=30.0)]
    assert running_mean(STEPS.table(steps)) == pytest.approx((1 * 10.0 + 3 * 30.0) / 40.0)


@pytest.mark.parametrize(
    ("content", "arguments", "named"),
    [
        ("timestamp,input_length,output_length\n0,5,5\n500,5,5\n", [], "--slo-itl-ms"),
        ("timestamp,input_length,output_length\n0,5,5\n0,5,5\n", ["--slo-itl-ms", "9"], "covers no time"),
        ("when,what\n1,2\n", ["--slo-itl-ms", "9"], "no known trace"),
        ("timestamp,vllm:num_requests_running\n1,2\n", ["--slo-itl-ms", "9"], "has no column"),
        ("timestamp,input_length,output_length\n0,5,5\n500,5,5\n", ["--duration", "0"], "duration"),
        ("timestamp,input_length,output_length\n0,5,5\n500,5,5\n", ["--device", "abacus"], "abacus"),
    ],
)
def test_what_a_user_can_mend_is_one_line(app: typer.Typer, content: str, arguments: list[str], named: str) -> None:
    Path("log.csv").write_text(content)
    result = invoke(app, "--log", "log.csv", *arguments)
    assert isinstance(result.exception, HarliError)
    assert named in str(result.exception)
    assert len(str(result.exception).splitlines()) == 1
