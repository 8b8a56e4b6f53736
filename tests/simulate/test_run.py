"""Simulated runs: the record they leave, what ``--like`` compares, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from harli.commands.simulate import simulate
from harli.records.reader import read_record
from harli.records.summary import METRICS
from harli.simulate.like import COMPARED, compare, recorded_workload
from harli.simulate.run import Simulation, SimulationSettings
from harli.tracking.figures import timeline
from harli.types import HarliError
from harli.workload.make import make_workload
from policies.base import Policy
from tests.simulate.builders import device


class Interrupting(Policy):
    """Stands for Ctrl-C in the middle of a run."""

    def decide(self, decode: Any, finetune: Any) -> Any:
        raise KeyboardInterrupt


def settings(**changes: Any) -> SimulationSettings:
    given: dict[str, Any] = {
        "policy": "static",
        "device": "small",
        "engine": {"max_model_len": 256, "max_num_seqs": 8},
        "finetune": {"microbatch_tokens": 64},
        "workload": {"requests_per_s": 3.0, "duration_s": 10.0},
        "slo": {"tpot_ms": 60.0, "itl_ms": 80.0},
        "noise": {"sigma": 0.05},
    }
    return SimulationSettings.model_validate(given | changes)


def simulation(chosen: SimulationSettings) -> Simulation:
    return Simulation(
        chosen, device(chosen.noise, chosen.finetune), make_workload(chosen.workload, chosen.engine.max_model_len)
    )


def test_the_record_is_one_of_a_run_and_says_that_it_is_simulated(tmp_path: Path) -> None:
    info = simulation(settings()).execute(tmp_path / "record")
    record = read_record(tmp_path / "record")
    assert record.info == info
    assert record.info.simulated
    assert record.info.device == {"kind": "simulated", "name": "small"}
    assert record.info.status == "finished"
    assert record.info.duration_s >= 10.0
    assert tuple(info.summary) == METRICS
    assert info.summary["decode/requests_completed"] == len(record.requests) > 10
    assert info.summary["finetune/tokens_per_s"] == sum(record.updates["tokens"].to_pylist()) / info.duration_s > 0
    assert info.summary["finetune/loss_last"] is None
    assert info.summary["scheduler/decision_p99_us"] is None
    assert info.predictor is not None
    assert info.predictor.correction["steps"] > 0
    predicted = record.steps["predicted_ms"].to_pylist()
    assert all(low <= high for low, high in zip(predicted, record.steps["bound_ms"].to_pylist(), strict=True))
    assert "(simulated)" in timeline(record)._suptitle.get_text()  # type: ignore[attr-defined]


def test_the_same_settings_give_the_same_tables(tmp_path: Path) -> None:
    for name in ("one", "two"):
        simulation(settings()).execute(tmp_path / name)
    for file in ("steps.parquet", "requests.parquet", "finetune.parquet"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_simulation_like_itself_agrees(tmp_path: Path) -> None:
    chosen = settings()
    first = simulation(chosen).execute(tmp_path / "first")
    record = read_record(tmp_path / "first")
    workload = recorded_workload(record)
    again = Simulation(chosen, device(chosen.noise, chosen.finetune), workload).execute(tmp_path / "again")
    rows = compare(first, again)
    assert tuple(row.metric for row in rows) == COMPARED
    assert all(row.ratio == pytest.approx(1.0) for row in rows)
    nothing = compare(first.model_copy(update={"summary": {}}), again)
    assert all(row.recorded is None and row.ratio is None for row in nothing)


def test_an_interrupted_simulation_keeps_its_record(tmp_path: Path) -> None:
    path = f"{__file__}:Interrupting"
    with pytest.raises(KeyboardInterrupt):
        simulation(settings(policy=path)).execute(tmp_path / "record")
    assert read_record(tmp_path / "record").info.status == "interrupted"


def test_a_request_that_can_never_run_is_refused() -> None:
    with pytest.raises(HarliError, match="raise --kv-blocks"):
        simulation(settings(kv_blocks=4))


# The command


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    found = typer.Typer()
    found.command()(simulate)
    return found


def invoke(app: typer.Typer, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--quiet"])


def test_the_command_leaves_a_record_and_compares(app: typer.Typer) -> None:
    first = invoke(app, "--policy", "static", "--param", "share=112/20", "--duration", "5", "--out", "one", "--json")
    assert first.exit_code == 0, first.output
    metrics = json.loads(first.stdout)
    assert metrics["decode/requests_completed"] > 5
    info = read_record(Path("one")).info
    assert info.simulated
    assert info.policy_params == {"share": "112/20"}
    assert info.model == "meta-llama/Meta-Llama-3-8B"

    again = json.loads(invoke(app, "--like", "one", "--out", "two", "--json").stdout)
    ratios = [again["compared"][name]["ratio"] for name in COMPARED]
    assert all(ratio is None or math.isclose(ratio, 1.0) for ratio in ratios)

    other = invoke(app, "--like", "one", "--policy", "separate", "--slo-itl-ms", "9", "--out", "three")
    assert other.exit_code == 0, other.output
    assert "static (simulated)" in other.stdout
    assert "separate (simulated)" in other.stdout
    refused = invoke(app, "--like", "one", "--duration", "9", "--out", "four")
    assert "leave out --duration" in str(refused.exception)
    info = read_record(Path("three")).info
    assert (info.policy, info.policy_params, info.slo.itl_ms) == ("separate", {}, 9.0)


def test_a_record_of_another_predictor_is_not_simulated_on_this_one(app: typer.Typer) -> None:
    assert invoke(app, "--policy", "separate", "--duration", "5", "--out", "one").exit_code == 0
    content = json.loads(Path("one", "run.json").read_text())
    content["predictor"]["data_sha256"] = "0123456789abcdef"
    Path("one", "run.json").write_text(json.dumps(content))
    refused = invoke(app, "--like", "one", "--out", "two")
    assert isinstance(refused.exception, HarliError)
    assert "h200/llama-3-8b is no longer the predictor that one was recorded with" in str(refused.exception)
    assert "data_sha256 0123456789ab" in str(refused.exception)
    assert not Path("two").exists()
    assert invoke(app, "--like", "one", "--device", "h200/llama-3-8b", "--out", "two").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--policy", "static", "--device", "abacus"], "abacus"),
        (["--policy", "statics"], "static"),
        (["--policy", "static", "--param", "share"], "key=value"),
        (["--policy", "static", "--noise", "-1"], "noise"),
        (["--policy", "static", "--duration", "inf"], "workload.duration_s: input should be a finite number"),
        (
            ["--policy", "static", "--trace", "requests.csv", "--requests-per-s", "2"],
            "--requests-per-s is for generated",
        ),
        (["--policy", "static", "--kv-blocks", "100"], "--kv-blocks"),
        (["--duration", "5"], "policy"),
        (["--like", "nowhere"], "nowhere"),
    ],
)
def test_what_a_user_can_mend_is_one_line(app: typer.Typer, arguments: list[str], named: str) -> None:
    result = invoke(app, *arguments, "--out", "refused")
    assert isinstance(result.exception, HarliError)
    assert named in str(result.exception)
    assert len(str(result.exception).splitlines()) == 1
    assert not Path("refused").exists()
