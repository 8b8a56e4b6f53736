"""Comparisons on a real engine: interleaved, stopped and resumed, scored, published."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from harli.compare import cell, verdict
from harli.compare.base import Progress
from harli.compare.plan import PlannedRun
from harli.compare.results import ComparisonFolder
from harli.compare.run import EngineComparison, Sitting
from harli.compare.settings import ComparisonSettings
from harli.config import FinetuneSettings, RunSettings, SloSettings, WorkloadSettings
from harli.records.reader import read_record
from harli.tracking.comparison import COMPARISON_ID, publish_comparison
from harli.tracking.publish import EXPERIMENT
from harli.tracking.store import open_store
from harli.types import HarliError
from tests.conftest import EngineHost


@pytest.fixture
def run_settings(host: EngineHost, tmp_path: Path) -> RunSettings:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": "many short words " * n}) for n in range(1, 20)))
    return RunSettings(
        policy="separate",
        engine=host.settings.model_copy(update={"max_model_len": 96}),
        finetune=FinetuneSettings(data=data, microbatch_tokens=64),
        workload=WorkloadSettings(duration_s=2.0, requests_per_s=4.0),
    )


def compare(
    host: EngineHost, settings: ComparisonSettings, folder: Path, stop_after: int | None = None
) -> tuple[ComparisonFolder, list[PlannedRun]]:
    """Compare into ``folder``, on from what it holds, until so many runs have ended; and the runs that did."""
    comparison = EngineComparison(settings, folder if folder.exists() else None)
    comparison.prepare(folder)
    ended: list[PlannedRun] = []

    async def sitting() -> None:
        task = asyncio.current_task()
        assert task is not None

        def on_progress(progress: Progress) -> None:
            assert 0.0 < progress.done_s <= progress.total_s
            if progress.live is None:
                ended.append(progress.planned)
            elif len(ended) == stop_after:
                task.cancel()

        data = settings.run.finetune.data
        assert data is not None
        await Sitting(comparison, folder, data, on_progress).run(host.engine)

    if stop_after is None:
        host.run(sitting())
    else:
        with pytest.raises(CancelledError):
            host.run(sitting())
    return ComparisonFolder(folder), ended


def test_policies_are_interleaved_on_the_same_requests_and_an_interrupted_comparison_goes_on(
    host: EngineHost, run_settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ComparisonSettings(
        policies=("separate", "static"), rounds=2, slo_scales=(1.5, 20.0), dedicated=True, run=run_settings
    )
    folder = tmp_path / "comparison"
    stopped, before = compare(host, settings, folder, stop_after=2)
    assert not stopped.is_complete()
    assert before[0] == PlannedRun(1, cell.SEPARATE)
    (interrupted,) = [
        path for path in folder.glob("round-*/*") if read_record(path).info.status == "interrupted"
    ]  # its record will give way to a whole one
    untouched = {run.folder: (folder / run.folder / "run.json").read_text() for run in before}

    results, after = compare(host, settings, folder)
    assert results.is_complete()
    assert {name: (folder / name / "run.json").read_text() for name in untouched} == untouched
    assert read_record(interrupted).info.status == "finished"
    runs = [*before, *after]
    assert len(set(runs)) == len(runs) == len(results.planned())
    assert [run.round for run in runs] == sorted(run.round for run in runs)

    records = {run: read_record(folder / run.folder) for run in runs}
    began = [record.info.started_at for record in records.values()]
    assert began == sorted(began)
    lengths = {
        load: {
            tuple(sorted(zip(*(record.requests[name].to_pylist() for name in COLUMNS), strict=True)))
            for run, record in records.items()
            if run.load == load
        }
        for load in ("all", "half", "none")
    }
    assert [len(same) for same in lengths.values()] == [1, 1, 1]
    (everything,), (half,), (nothing,) = lengths.values()
    assert len(half) == (len(everything) + 1) // 2
    assert set(half) <= set(everything)
    assert not nothing

    base_ms = records[before[0]].info.summary["decode/itl_p99_ms"]
    assert base_ms is not None
    tight, loose = results.scored()
    assert (tight.objective.slo.itl_ms, loose.objective.slo.itl_ms) == (1.5 * base_ms, 20.0 * base_ms)
    for scored in (tight, loose):
        rows = {str(row.entrant): row for row in scored.rows}
        assert set(rows) == {"separate", *(f"static share=1/1 work_conserving={word}" for word in ("false", "true"))}
        assert all(len(row.points) == 2 for row in rows.values())
        assert rows["separate"].metrics["finetune/tokens_per_s"] == 0.0
        fixed, conserving = (row for name, row in rows.items() if name != "separate")
        assert all((row.metrics["finetune/tokens_per_s"] or 0.0) > 0.0 for row in (fixed, conserving))
        gains = [row.gain for row in (fixed, conserving) if row.gain]
        assert [gain.value is None for gain in gains] == [not gain.attainment.kept for gain in gains]
        assert len(gains) == 2
    attained = [{row.entrant: row.attainment for row in one.rows} for one in (tight, loose)]
    assert all(attained[0][entrant] <= attained[1][entrant] for entrant in attained[0])

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    parent = publish_comparison(results, results.scored())
    assert publish_comparison(ComparisonFolder(folder), results.scored()) == parent
    client, experiment = open_store(EXPERIMENT)
    found = client.search_runs([experiment])
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent]
    assert len(found) == 1 + len(children) == 1 + 2 * 2 * 3  # two SLOs, two rounds, three rows
    assert {float(run.data.params["slo.itl_ms"]) for run in children} == {1.5 * base_ms, 20.0 * base_ms}
    assert all("slo/itl_attainment" in run.data.metrics for run in children)
    assert "round 2: separate" in {run.info.run_name for run in children}
    assert {file.path for file in client.list_artifacts(parent)} == {"comparison.png", "rows.json"}
    assert client.get_run(parent).data.tags[COMPARISON_ID] == results.info.comparison_id


COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")


def test_a_short_pass_chooses_among_variants(
    host: EngineHost, run_settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cell, "_variants", lambda name, menu: [[(("share", "2/0"),), (("share", "1/1"), ("work_conserving", True))]]
    )
    monkeypatch.setattr(verdict, "SERVED", 0.1)  # in seconds, a few ms more or less would decide
    workload = WorkloadSettings(duration_s=3.0, requests_per_s=4.0)
    run = run_settings.model_copy(update={"slo": SloSettings(itl_ms=2000.0), "workload": workload})
    settings = ComparisonSettings(policies=("static",), rounds=1, prune_s=1.5, run=run)
    results, ended = compare(host, settings, tmp_path / "comparison")
    assert [run.round for run in ended] == [1, 0, 0, 0, 1]
    assert dict(ended[-1].entrant.params)["share"] == "1/1"  # the other one trains nothing
    for planned in ended:
        record = results.record(planned)
        assert record is not None
        assert len(record.requests) > 0
        assert max(record.requests["arrival_s"].to_pylist()) < (3.0 if planned.round else 1.5)
    ((row,),) = ([row for row in one.rows if row.entrant != cell.SEPARATE] for one in results.scored())
    assert row.rival is None


@pytest.mark.usefixtures("host")
def test_what_cannot_be_compared_is_told_before_an_engine_starts(run_settings: RunSettings, tmp_path: Path) -> None:
    with pytest.raises(HarliError, match="did you mean 'static'"):
        EngineComparison(ComparisonSettings(policies=("statik",), slo_scales=(1.5,), run=run_settings))
    nothing = run_settings.model_copy(update={"predictor": str(tmp_path / "none")})
    (tmp_path / "p.py").write_text(
        "from policies.separate import Separate\n\nclass Needs(Separate):\n"
        "    def __init__(self, context):\n        super().__init__(context)\n        context.need_predictor()\n"
    )
    with pytest.raises(HarliError, match="none"):
        EngineComparison(ComparisonSettings(policies=(f"{tmp_path}/p.py:Needs",), slo_scales=(1.5,), run=nothing))
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "file").touch()
    comparison = EngineComparison(ComparisonSettings(policies=("static",), slo_scales=(1.5,), run=run_settings))
    with pytest.raises(HarliError, match="not empty"):
        comparison.prepare(occupied)
    with pytest.raises(HarliError, match="is not a comparison"):
        EngineComparison(ComparisonSettings(policies=("static",), slo_scales=(1.5,), run=run_settings), occupied)
