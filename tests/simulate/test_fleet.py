"""Fleets: the sum of their instances, the same however many processes simulate them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner, Result

from harli.commands.simulate import simulate
from harli.records.reader import read_info
from harli.records.summary import METRICS
from harli.simulate.devices import USUAL, make_device
from harli.simulate.fleet import FLEET_FILE, INSTANCES_FILE, Fleet, FleetInfo, FleetSettings, Row, summarise_fleet
from harli.simulate.run import Simulation, SimulationSettings
from harli.types import HarliError
from harli.workload.base import Request, Workload
from harli.workload.make import make_workload

DEVICE = "h200/llama-3-8b"


def settings(instances: int, **changes: Any) -> FleetSettings:
    workload = {"requests_per_s": 8.0, "duration_s": 4.0}
    one = USUAL | {"policy": "static", "device": DEVICE, "slo": {"itl_ms": 6.0}, "workload": workload} | changes
    return FleetSettings(instances=instances, router="least-loaded", instance=SimulationSettings.model_validate(one))


def fleet(chosen: FleetSettings, workload: Workload | None = None) -> Fleet:
    return Fleet(chosen, None, workload or make_workload(chosen.instance.workload, 8192))


def rows(folder: Path) -> list[Row]:
    found: list[Row] = pq.read_table(folder / INSTANCES_FILE).to_pylist()
    return found


def test_a_fleet_is_the_sum_of_its_instances(tmp_path: Path) -> None:
    made, heard = fleet(settings(3)), []
    info = made.execute(tmp_path / "fleet", 1, heard.append)
    instances = rows(tmp_path / "fleet")
    assert heard == [1, 2, 3]
    assert read_info(tmp_path / "fleet" / FLEET_FILE, FleetInfo) == info
    assert [row["instance"] for row in instances] == [0, 1, 2]
    requests = made.workload.requests
    assert sum(row["requests"] for row in instances) == len(requests) == info.summary["decode/requests_completed"]
    assert sum(row["gaps"] for row in instances) == sum(request.output_tokens - 1 for request in requests)
    tokens = sum(row["finetune/tokens_per_s"] for row in instances)
    assert info.summary["finetune/tokens_per_s"] == pytest.approx(tokens)
    alone = info.summary["finetune/tokens_per_s_dedicated"]
    assert alone is not None
    assert info.summary["finetune/gpu_hours_per_day"] == pytest.approx(24.0 * tokens / alone)
    within = sum(row["slo/itl_attainment"] * row["gaps"] for row in instances)
    assert info.summary["slo/itl_attainment"] == pytest.approx(within / sum(row["gaps"] for row in instances))
    assert info.summary["slo/tpot_attainment"] is None


def test_the_number_of_processes_changes_nothing_and_every_instance_has_its_own_chance(tmp_path: Path) -> None:
    chosen = settings(2)
    apart = [Request(float(number // 2), 100, 50) for number in range(6)]  # in pairs, one for each
    for jobs in (1, 2):
        fleet(chosen, Workload("pairs", tuple(apart))).execute(tmp_path / str(jobs), jobs, lambda done: None)
    one, two = rows(tmp_path / "1")
    assert [one, two] == rows(tmp_path / "2")
    assert one["requests"] == two["requests"]
    assert one["decode/itl_p50_ms"] != two["decode/itl_p50_ms"]


def test_a_fleet_of_one_without_noise_is_one_simulation(tmp_path: Path) -> None:
    chosen = settings(1, noise={"sigma": 0.0})
    made = fleet(chosen)
    made.execute(tmp_path / "fleet", 1, lambda done: None)
    one = chosen.instance
    info, _ = Simulation(one, make_device(DEVICE, None, one.finetune, one.noise, 0), made.workload).measure()
    assert {name: rows(tmp_path / "fleet")[0][name] for name in METRICS} == info.summary


def test_a_short_trace_begins_again(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("timestamp,input_length,output_length\n0,10,5\n500,20,6\n1000,30,7\n")
    workload = {"trace": str(trace), "duration_s": 4.0}
    requests = fleet(
        settings(1, workload=workload), make_workload(settings(1, workload=workload).instance.workload, 99)
    )
    found = requests.workload.requests
    assert [request.prompt_tokens for request in found] == [10, 20, 30, 10, 20, 30, 10, 20]
    assert {later.arrival_s - earlier.arrival_s for earlier, later in pairwise(found)} == {0.5}


def test_an_instance_without_requests_finetunes_alone(tmp_path: Path) -> None:
    changes = {"params": {"work_conserving": True}, "noise": {"sigma": 0.0}}
    info = fleet(settings(2, **changes), Workload("one", (Request(0.0, 10, 5),))).execute(
        tmp_path / "fleet", 1, lambda done: None
    )
    busy, idle = rows(tmp_path / "fleet")
    assert (busy["requests"], idle["requests"]) == (1, 0)
    assert idle["finetune/tokens_per_s"] == pytest.approx(info.summary["finetune/tokens_per_s_dedicated"], rel=0.02)
    assert idle["slo/itl_attainment"] is None
    assert info.summary["slo/itl_attainment"] == busy["slo/itl_attainment"]


def test_a_fleet_that_is_stopped_leaves_nothing_and_a_folder_in_use_is_refused_at_once(tmp_path: Path) -> None:
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fleet(settings(2)).execute(tmp_path / "fleet", 1, stop)
    assert not (tmp_path / "fleet").exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(HarliError, match="not empty"):
        fleet(settings(2)).execute(tmp_path / "used", 1, stop)


def test_attainment_counts_tokens_and_not_instances() -> None:
    def row(attainment: float | None, gaps: int) -> Row:
        return dict.fromkeys(METRICS) | {"slo/itl_attainment": attainment, "gaps": gaps, "several": 0}

    metrics = summarise_fleet([row(1.0, 900), row(0.5, 100), row(None, 0)], 1000.0)
    assert metrics["slo/itl_attainment"] == pytest.approx(0.95)
    assert metrics["slo/itl_attainment_worst"] == 0.5


# The command


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    monkeypatch.chdir(tmp_path)
    found = typer.Typer()
    found.command()(simulate)
    return found


def invoke(app: typer.Typer, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--policy", "static", "--duration", "2", *arguments, "--quiet"])


def test_the_usual_rate_is_per_instance_and_a_rate_that_is_given_is_the_fleets(app: typer.Typer) -> None:
    for out, *rate in (("usual",), ("given", "--requests-per-s", "11")):
        result = invoke(app, "--instances", "2", "--jobs", "1", "--slo-itl-ms", "9", *rate, "--out", out, "--json")
        assert result.exit_code == 0, result.output
    usual, given = ([row["requests"] for row in rows(Path(out))] for out in ("usual", "given"))
    assert usual == given
    assert json.loads(result.stdout)["fleet/instances"] == 2.0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--router", "least-loaded"], "--instances"),
        (["--jobs", "2"], "--instances"),
        (["--instances", "2", "--router", "random"], "round-robin"),
        (["--instances", "2", "--like", "somewhere"], "--like"),
        (["--instances", "2", "--param", "share=1/1"], "1/1"),
    ],
)
def test_what_a_user_can_mend_is_one_line(app: typer.Typer, arguments: list[str], named: str) -> None:
    result = invoke(app, *arguments, "--out", "refused")
    assert isinstance(result.exception, HarliError)
    assert named in str(result.exception)
    assert len(str(result.exception).splitlines()) == 1
    assert not Path("refused").exists()
