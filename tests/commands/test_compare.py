"""``harli compare`` as a user runs it, up to the engine; and what it prints of a comparison that is complete."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from harli.cli import main
from harli.commands.comparison_view import print_scored
from harli.compare.cell import SEPARATE, Entrant, Objective
from harli.compare.plan import PlannedRun
from harli.compare.results import ComparisonFolder, Scored
from harli.compare.run import EngineComparison
from harli.compare.score import marks, score
from harli.compare.settings import COMPARISON_FILE, ComparisonSettings
from harli.config import RunSettings
from harli.records.summary import METRICS
from harli.tracking.publish import EXPERIMENT
from harli.tracking.store import open_store
from harli.types import Slo
from tests.compare.builders import rounds, shown
from tests.records.builders import small_run

Command = Any


@pytest.fixture
def harli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs ``harli compare`` in an empty folder: its exit code, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["harli", "compare", *arguments])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        printed = capfd.readouterr()
        return code, printed.out, printed.err

    return command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slo-scale", "1.5"], "give --policies"),
        (["--policies", "static"], "needs an SLO"),
        (["--policies", "statik", "--slo-scale", "1.5"], "did you mean 'static'"),
        (["--policies", "separate", "--slo-scale", "1.5"], "add a policy"),
        (["--policies", "static", "--slo-scale", "1.5", "--rounds", "0"], "--rounds"),
        (["--policies", "static", "--slo-scale", "1.5", "--prune-s", "0"], "--prune-s"),
        (["--policies", "static", "--slo-scale", "0"], "--slo-scale"),
        (["--policies", "static", "--slo-scale", "1.5", "--slo-on", "ttft"], "--slo-on"),
        (["--policies", "static", "--slo-scale", "1.5", "--slo-itl-ms", "50"], "given twice"),
        (["--policies", "static", "--slo-scale", "1.5", "--trace", "missing.csv"], "missing.csv"),
        (["--policies", "static", "--slo-itl-ms", "50", "--finetune-data", "missing.jsonl"], "missing.jsonl"),
        (["--policies", "static", "--slo-itl-ms", "50", "--duration", "0"], "duration_s"),
        (["--policies", "oracle", "--slo-itl-ms", "50"], "only a simulation does"),
        (["--policies", "static", "--slo-itl-ms", "50", "--simulate"], "no use for --model"),
        (["--policies", "static", "--slo-itl-ms", "50", "--device", "h200/llama-3-8b"], "only with --simulate"),
        (
            ["--policies", "static", "--slo-itl-ms", "50", "--rate-scale", "1", "--rate-scale", "2"],
            "only with --simulate",
        ),
        (["--resume", "nowhere"], "is not a comparison"),
        (["--resume", "nowhere", "--out", "here"], "leave out --config"),
        (["--resume", "nowhere", "--simulate"], "is resumed has its own --simulate; leave it out"),
        (["--resume", "nowhere", "--device", "h200/llama-3-8b"], "has its own --device"),
        (["--resume", "nowhere", "--kv-blocks", "9"], "has its own --kv-blocks"),
        (["--resume", "nowhere", "--noise", "0.1"], "has its own --noise"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    harli: Command, arguments: list[str], message: str, tmp_path: Path
) -> None:
    code, out, err = harli("--model", "tiny", "--kv-cache-gib", "0.5", *arguments)
    lines = [line for line in err.splitlines() if line.startswith("harli: ")]
    assert (code, out, len(lines)) == (2, "", 1)
    assert message in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.fixture
def complete(tmp_path: Path) -> Path:
    """A comparison of `separate` and `static` at 1.2 times its P99, each of whose runs is the same synthetic record."""
    run = RunSettings.model_validate({"policy": "separate", "engine": {"model": "tiny", "kv_cache_gib": 0.5}})
    settings = ComparisonSettings(policies=("static",), rounds=2, slo_scales=(1.2,), run=run)
    folder = tmp_path / "done"
    EngineComparison(settings).prepare(folder)
    for planned in ComparisonFolder(folder).planned():
        small_run(folder / planned.folder, **_changes(planned))
    while not ComparisonFolder(folder).is_complete():
        for planned in ComparisonFolder(folder).planned():
            if not (folder / planned.folder).exists():
                small_run(folder / planned.folder, **_changes(planned))
    return folder


def _changes(planned: PlannedRun) -> dict[str, Any]:
    return {"name": str(planned), "slo": Slo(itl_ms=30.0)}


def test_a_complete_comparison_is_printed_and_published_without_an_engine(
    harli: Command, complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    code, out, err = harli("--resume", str(complete), "--json")
    assert code == 0, err
    rows = json.loads(out)
    assert {row["policy"] for row in rows} == {"separate", "static"}
    for row in rows:
        assert row.keys() >= {"slo_scale", *METRICS}
        assert row.keys() >= {"finetune/tokens_per_s_vs_best_rival", "finetune/gain_vs_dedicated"}
        assert (row["rounds"], row["slo_scale"]) == (2, 1.2)
    assert f"comparison in {complete}" in err
    code, out, _ = harli("--resume", str(complete), "--quiet")
    assert code == 0
    assert "(1.2 times decode alone's P99), 2 rounds" in out
    assert "note: " not in out  # all runs are the same, so no policy does harm
    assert "static share=1/1 work_conserving=true" in out


def test_loads_are_simulated_without_an_engine_each_in_a_folder_that_can_be_gone_on_with(
    harli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    loads = ("--rate-scale", "1", "--rate-scale", "2")
    wanted = ("--simulate", "--policies", "stepwise,oracle", "--slo-itl-ms", "12", "--rounds", "1", "--duration", "5")
    code, out, err = harli(*wanted, *loads, "--jobs", "1", "--out", "two", "--json")
    assert code == 0, err
    rows = json.loads(out)
    assert {(row["rate_scale"], row["policy"]) for row in rows} == {
        (scale, policy) for scale in (1.0, 2.0) for policy in ("separate", "stepwise", "oracle")
    }
    assert all(row["simulated"] for row in rows)
    assert "two/rate-2 (simulated)" in err
    client, experiment = open_store(EXPERIMENT)
    runs = client.search_runs([experiment])
    assert len(runs) == 2 * (1 + 3)
    assert all(run.data.tags["simulated"] == "true" and "(simulated)" in run.info.run_name for run in runs)
    code, out, err = harli("--resume", "two/rate-2")
    assert code == 0, err
    assert "simulated at 2 times the rate, 1 round" in out
    assert "vs oracle" in out
    code, out, err = harli("--resume", "two/rate-2", "--rounds", "2")
    assert code == 0, err
    assert "simulated at 2 times the rate, 2 rounds" in out
    assert {run.data.tags.get("rounds") for run in client.search_runs([experiment])} == {None, "1", "2"}


def test_a_complete_comparison_is_scored_again_from_its_records_alone(
    harli: Command, complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it was measured, and whatever has become of the predictor; a window of 10 s leaves out half of it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    file = complete / COMPARISON_FILE
    content = json.loads(file.read_text())
    content["settings"]["run"]["workload"] |= {"duration_s": 10.0, "trace": "gone.csv"}
    file.write_text(json.dumps(content | {"menu": ["64/0", "32/32", "0/64"], "device": {}, "versions": {}}))
    for planned in complete.glob("round-*/static*1-1*"):
        planned.rename(planned.with_name(planned.name.replace("1-1", "32-32")))
    before = {path: path.read_bytes() for path in complete.rglob("*") if path.is_file()}
    code, out, err = harli("--resume", str(complete), "--json", "--rounds", "2")
    assert code == 0, err
    assert [row["finetune/tokens_per_s"] for row in json.loads(out)] == [pytest.approx(101.0)] * 3
    assert {path: path.read_bytes() for path in complete.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"versions": {"vllm": "0.1"}}, "vllm 0.1 is not"), ({"device": {"kind": "cpu"}}, "device (kind cpu) is not")],
)
def test_more_rounds_are_not_measured_elsewhere(
    harli: Command, complete: Path, changes: dict[str, Any], named: str
) -> None:
    file = complete / COMPARISON_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    code, _, err = harli("--resume", str(complete), "--rounds", "3")
    assert code == 2
    assert f"begun with another device or version: {named}" in err


def test_a_measured_comparison_has_no_use_for_processes(harli: Command, complete: Path) -> None:
    code, _, err = harli("--resume", str(complete), "--jobs", "2")
    assert code == 2
    assert "only a simulated comparison has a use for --jobs; leave it out" in err


def test_the_table_marks_what_is_undecided(capsys: pytest.CaptureFixture[str]) -> None:
    attained = ([1.0, 0.984, 0.992], [0.97, 0.971, 0.969])
    qos, fixed = (rounds(*(shown(9.0, itl_attainment=one) for one in values)) for values in attained)
    at = Objective(Slo(itl_ms=50.0))
    runs = {SEPARATE: rounds(shown(), shown(), shown()), Entrant("qos"): qos, Entrant("stepwise"): fixed}
    rows = score(at, runs, {})
    print_scored(Scored(at, rows, marks(rows)), "")
    table, *notes = capsys.readouterr().out.split("note: ")
    assert [line.split()[-1] for line in table.splitlines()[2:]] == ["unharmed", "unharmed?", "harmed"]
    assert "qos is undecided: its attainment less decode alone's is -0.80 points (-2.79 to +1.19), the limit -1.00" in (
        " ".join(notes)
    )


def test_other_settings_do_not_go_on(harli: Command, complete: Path) -> None:
    code, _, err = harli("--resume", str(complete), "--rounds", "1")
    assert code == 2
    assert "begun with other settings (rounds)" in err
    code, _, err = harli("--resume", str(complete), "--rounds", "2", "--policies", "static", "--duration", "61")
    assert code == 2
    assert "(run)" in err


def test_a_damaged_record_is_told(harli: Command, complete: Path) -> None:
    (complete / "round-1" / "separate" / "steps.parquet").write_bytes(b"nothing")
    code, _, err = harli("--resume", str(complete), "--json")
    assert code == 2
    assert "steps.parquet is damaged" in err


def test_another_predictor_does_not_go_on(harli: Command, complete: Path) -> None:
    file = complete / "round-2" / "separate" / "run.json"
    content = json.loads(file.read_text())
    content["predictor"] = {"source": "models:/harli-decode-latency@champion", "data_sha256": "abc", "correction": {}}
    file.write_text(json.dumps(content))
    code, _, err = harli("--resume", str(complete), "--rounds", "3")
    assert code == 2
    assert "round 2: separate ran with another predictor" in err
