"""What a folder shows of its records: rates over one window, gains, and variants that were chosen before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harli.compare.cell import SEPARATE, Entrant
from harli.compare.plan import PlannedRun
from harli.compare.results import ComparisonFolder
from harli.compare.settings import COMPARISON_FILE, ComparisonInfo
from harli.config import RunSettings, SloSettings, WorkloadSettings
from harli.records.writer import RecordWriter
from harli.rows import UpdateRecord
from tests.compare.builders import comparison_settings
from tests.records.builders import REQUEST, run_info

WINDOW_S = 10.0
TWO_CORES, FOUR_CORES = ["2/0", "1/1", "0/2"], ["4/0", "3/1", "2/2", "1/3", "0/4"]


def comparison(folder: Path, menu: list[str], **changes: Any) -> ComparisonFolder:
    """One of `static` that has but its first run, decode alone."""
    run = RunSettings(policy="separate", slo=SloSettings(itl_ms=30.0), workload=WorkloadSettings(duration_s=WINDOW_S))
    info = ComparisonInfo(
        settings=comparison_settings("static", rounds=1, run=run, **changes),
        menu=menu,
        device={"kind": "cpu"},
        versions={},
        started_at="2026-01-31T12:00:00+00:00",
    )
    folder.mkdir()
    (folder / COMPARISON_FILE).write_text(info.model_dump_json())
    record(folder / PlannedRun(1, SEPARATE).folder, [])
    return ComparisonFolder(folder)


def record(folder: Path, committed_s: Sequence[float], *, duration_s: float = WINDOW_S, gap_ms: float = 20.0) -> None:
    """A run with one request, and an update of 100 tokens at each of these times."""
    info = run_info(duration_s=duration_s)
    writer = RecordWriter(folder, info)
    writer.add_requests([REQUEST._replace(output_tokens=3, tpot_ms=gap_ms, itl_ms=(gap_ms, gap_ms))])
    writer.add_updates(UpdateRecord(number, time_s, 5.0, 100, 1e-4) for number, time_s in enumerate(committed_s))
    writer.write(info)


def test_how_long_a_run_takes_to_end_is_not_in_its_tokens_per_s(tmp_path: Path) -> None:
    before = comparison(tmp_path / "one", TWO_CORES)
    for planned in before.planned()[1:]:
        if dict(planned.entrant.params)["work_conserving"]:
            record(before.folder / planned.folder, [2.0, 5.0, WINDOW_S])
        else:  # slower, so that it finetunes on when the last request is nearly alone
            record(before.folder / planned.folder, [4.0, 8.0, 11.0, 12.0, 13.0, 14.0], duration_s=14.0)
    results = ComparisonFolder(before.folder)
    assert results.is_complete()
    rows = {row["params"].get("work_conserving"): row for row in results.rows()}
    assert rows[True]["finetune/tokens_per_s"] == pytest.approx(30.0)
    assert rows[False]["finetune/tokens_per_s"] == pytest.approx(20.0)
    assert list(rows) == [None, True, False]


@pytest.mark.parametrize(("gap_ms", "gain"), [(20.0, -0.2), (40.0, None)])
def test_gains_are_over_the_window_too_and_only_while_the_half_keeps_the_slo(
    tmp_path: Path, gap_ms: float, gain: float | None
) -> None:
    before = comparison(tmp_path / "one", TWO_CORES, dedicated=True)
    for planned in before.planned()[1:]:
        committed_s = {"all": [5.0], "half": [3.0, 6.0, 12.0], "none": [2.0, 4.0, 6.0, 8.0, 9.0, 11.0]}[planned.load]
        half_ms = gap_ms if planned.load == "half" else 20.0
        record(before.folder / planned.folder, committed_s, duration_s=15.0, gap_ms=half_ms)
    (scored,) = ComparisonFolder(before.folder).scored()
    rows = [row.as_json() for row in scored.rows if row.entrant.policy == "static"]
    assert len(rows) == 2
    for row in rows:
        assert row["finetune/gain_vs_dedicated"] == (gain if gain is None else pytest.approx(gain))
        assert row["finetune/gain_vs_dedicated_keeps_slo"] is (gain is not None)
    assert sum("no gain over dedicated" in mark for mark in scored.marks) == (2 if gain is None else 0)


def test_variants_are_chosen_within_the_window(tmp_path: Path) -> None:
    before = comparison(tmp_path / "one", FOUR_CORES)
    for planned in before.planned()[1:]:
        share = dict(planned.entrant.params).get("share")
        committed_s = {"3/1": [1.0, 2.0, 3.0], "2/2": [4.0, 8.0, *(12.0 + n for n in range(6))]}.get(str(share), [])
        record(before.folder / planned.folder, committed_s, duration_s=20.0 if share == "2/2" else 10.0)
    runs = [run for run in ComparisonFolder(before.folder).planned() if run.round == 1]
    wanted = [
        Entrant("static", (("share", "3/1"), ("work_conserving", conserving)), slo_aware=False)
        for conserving in (False, True)
    ]
    assert {run for run in runs if run.entrant.params} == {PlannedRun(1, entrant) for entrant in wanted}
