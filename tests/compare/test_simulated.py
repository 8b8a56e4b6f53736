"""Simulated comparisons: the same plan, folder and table as on an engine, whatever number of processes they take."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from harli.compare.base import Progress
from harli.compare.plan import PlannedRun
from harli.compare.results import ComparisonFolder
from harli.compare.settings import ComparisonSettings
from harli.compare.simulated import SimulatedComparison
from harli.records.reader import read_record
from harli.simulate import analytic
from harli.types import HarliError
from tests.simulate.builders import SMALL

LENGTHS = ("prompt_tokens", "output_tokens")


@pytest.fixture(autouse=True)
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(analytic.ROOFLINES, "small", SMALL)


def settings(*policies: str, **changes: Any) -> ComparisonSettings:
    run: dict[str, Any] = {
        "policy": "separate",
        "engine": {"max_model_len": 256, "max_num_seqs": 8},
        "finetune": {"microbatch_tokens": 64},
        "workload": {"requests_per_s": 1.0, "duration_s": 15.0},
        "slo": {"itl_ms": 40.0},
    }
    own = {"policies": policies, "rounds": 2, "simulation": {"device": "small"}, "run": run | changes.pop("run", {})}
    return ComparisonSettings.model_validate(own | changes)


def simulate(chosen: ComparisonSettings, folder: Path, jobs: int = 1) -> tuple[ComparisonFolder, list[PlannedRun]]:
    """Go on with ``folder`` until it is complete; the runs that were simulated for it."""
    done: list[Progress] = []
    SimulatedComparison(chosen, folder if folder.exists() else None).execute(folder, jobs, done.append)
    assert all(0.0 < now.done_s <= now.total_s for now in done)
    return ComparisonFolder(folder), [now.planned for now in done]


def lengths(folder: Path) -> list[tuple[int, ...]]:
    """Of the requests of a run, by arrival."""
    table = read_record(folder).requests.sort_by("arrival_s")
    return list(zip(*(table[name].to_pylist() for name in LENGTHS), strict=True))


def test_what_is_missing_is_simulated_again_and_gives_the_same(tmp_path: Path) -> None:
    chosen, folder = settings("qos", "static", "oracle", dedicated=True), tmp_path / "one"
    results, done = simulate(chosen, folder)
    assert results.is_complete()
    assert len(done) == len(set(done)) == len(results.planned())
    rows = results.rows()
    assert {row["policy"] for row in rows} == {"separate", "qos", "static", "oracle"}
    assert all(row["simulated"] and row["rounds"] == 2 for row in rows)
    lost = [planned for planned in done if planned.round == 2][:3]
    for planned in lost:
        shutil.rmtree(folder / planned.folder)
    again, repeated = simulate(chosen, folder)
    assert sorted(map(str, repeated)) == sorted(map(str, lost))
    assert again.rows() == rows
    with pytest.raises(HarliError, match="begun with other settings"):
        simulate(settings("qos", "static", "oracle", dedicated=True, rounds=1), folder)


def test_the_oracle_is_what_others_are_held_against_and_nobodys_rival(tmp_path: Path) -> None:
    results, _ = simulate(settings("stepwise", "oracle", rounds=1), tmp_path / "one")
    rows = {row["policy"]: row for row in results.rows()}
    tokens = {name: row["finetune/tokens_per_s"] for name, row in rows.items()}
    assert rows["stepwise"]["finetune/tokens_per_s_vs_oracle"] == pytest.approx(tokens["stepwise"] / tokens["oracle"])
    assert rows["stepwise"]["best_rival"] is None
    assert rows["oracle"]["best_rival"] == "stepwise"


def test_rounds_differ_in_noise_and_lengths_and_policies_in_neither(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{place * 0.4},{20 + place},{5 + 3 * place}\n" for place in range(30))
    trace.write_text(f"Timestamp,Request tokens,Response tokens\n{rows}")
    for name, workload in (
        ("generated", {"requests_per_s": 2.0, "duration_s": 10.0}),
        ("trace", {"trace": trace, "duration_s": 10.0}),
    ):
        folder = tmp_path / name
        simulate(settings("stepwise", "unmanaged", run={"workload": workload}), folder)
        first, second = ({path.name: lengths(path) for path in folder.glob(f"round-{number}/*")} for number in (1, 2))
        assert len(first) == len(second) == 3
        assert len(set(map(tuple, first.values()))) == len(set(map(tuple, second.values()))) == 1
        assert first["separate"] != second["separate"]
    assert sorted(first["separate"]) == sorted(second["separate"])  # a trace's lengths only change places
    assert first["separate"] == [(20 + place, 5 + 3 * place) for place in range(25)]


def test_processes_do_not_change_the_result(tmp_path: Path) -> None:
    on = {"simulation": {"device": "h200/llama-3-8b"}, "run": {"slo": {"itl_ms": 12.0}}}
    chosen = settings("unmanaged", "timeslice", rounds=1, **on)
    alone, _ = simulate(chosen, tmp_path / "alone")
    spread, _ = simulate(chosen, tmp_path / "spread", jobs=2)
    assert spread.rows() == alone.rows()


def test_what_cannot_be_simulated_is_told_before_anything_is_written(tmp_path: Path) -> None:
    for chosen, message in (
        (settings("statik"), "did you mean 'static'"),
        (settings("stepwise", simulation={"device": "abacus"}), "abacus"),
        (settings("stepwise", simulation={"device": "small", "kv_blocks": 4}), "raise --kv-blocks"),
    ):
        with pytest.raises(HarliError, match=message):
            simulate(chosen, tmp_path / "one")
    assert not (tmp_path / "one").exists()
