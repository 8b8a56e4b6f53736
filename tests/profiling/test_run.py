"""Profiles of a real engine: whole, interrupted and resumed, damaged."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

from harli.config import FinetuneSettings
from harli.records.profile import PROFILE_STEPS, Profile, read_profile
from harli.types import HarliError
from profiling import plan, sitting
from profiling.folder import ProfileFolder
from profiling.run import Profiling, plan_of
from profiling.settings import ProfileSettings
from profiling.sitting import Progress, report_on
from tests.conftest import EngineHost


@pytest.fixture
def settings(host: EngineHost, monkeypatch: pytest.MonkeyPatch) -> ProfileSettings:
    """Six groups of at most three short requests."""
    monkeypatch.setattr(plan, "SECONDS_PER_GROUP", 100.0)
    monkeypatch.setattr(sitting, "LONGEST_ALONE_S", 0.3)
    small = host.settings.model_copy(update={"max_num_seqs": 3, "max_model_len": 224})
    return ProfileSettings(engine=small, finetune=FinetuneSettings(microbatch_tokens=64), budget_s=600.0)


@pytest.fixture
def job(host: EngineHost, tmp_path: Path) -> Iterator[None]:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": "many short words " * n}) for n in range(1, 20)))
    host.command("finetune", FinetuneSettings(data=data, microbatch_tokens=64).model_dump_json(), None, None)
    yield
    host.command("finish")


def measure(host: EngineHost, settings: ProfileSettings, folder: Path, enough: Callable[[Progress], bool]) -> Profile:
    """Profile into ``folder``, on from what it holds, until ``enough``."""
    before = read_profile(folder) if folder.exists() else None
    profiling = Profiling(settings, folder if before else None)

    async def stopped() -> None:
        task = asyncio.current_task()
        assert task is not None

        def on_progress(progress: Progress) -> None:
            if enough(progress):
                task.cancel()

        await profiling.sitting(host.engine, ProfileFolder(folder, before), on_progress).run()

    with pytest.raises(CancelledError):
        host.run(stopped())
    return read_profile(folder)


def in_repeats(progress: Progress) -> bool:
    return progress.phase.startswith("repeats")


@pytest.mark.usefixtures("job")
def test_a_profile_stopped_and_resumed_measures_the_same_points(
    host: EngineHost, settings: ProfileSettings, tmp_path: Path
) -> None:
    whole = measure(host, settings, tmp_path / "whole", in_repeats)
    calls = iter(range(100))
    stopped = measure(host, settings, tmp_path / "stopped", lambda progress: next(calls) == 2)
    assert stopped.info.status == "interrupted"
    assert len(stopped.segments) >= 3 * 4  # what was measured is there
    resumed = measure(host, settings, tmp_path / "stopped", in_repeats)
    assert resumed.info.profile_id == stopped.info.profile_id
    kept = ["segment", "point", "time_s", "latency_ms"]
    assert resumed.steps.slice(0, len(stopped.steps)).select(kept).equals(stopped.steps.select(kept))
    for profile in (whole, resumed):
        planned = plan_of(profile)
        groups = [*planned.groups, planned.reference]
        expected = {group.point(share, planned.menu) for group in groups for share in group.shares}
        assert set(profile.segments["point"].to_pylist()) == expected
        check_rows(profile)
    assert np.all(np.diff(resumed.segments["time_s"].to_numpy()) > 0)


def check_rows(profile: Profile) -> None:
    """Shares, shapes, units and admissions are in the rows as planned."""
    rows = [row for row in profile.steps.to_pylist() if row["segment"] >= 0]
    segments = {row["segment"]: row for row in profile.segments.to_pylist()}
    for row in rows:
        segment = segments[row["segment"]]
        assert row["wanted_finetune"] == segment["finetune_units"]
        assert row["exclusive_ms"] <= segment["exclusive_ms"]  # the controller charges what windows overran
        assert row["point"] == segment["point"]
    beside = {row["microbatch_tokens"] for row in rows if row["finetune_units"]}  # alone, the shape means nothing
    assert beside >= {group.microbatch_tokens for group in plan_of(profile).groups}
    assert sum(row["decode_units"] == 1 and row["finetune_units"] == 1 for row in rows) > len(rows) / 4
    assert sum(row["finetune_tokens"] for row in rows) > 0
    assert any(row["prefill_tokens"] for row in profile.steps.to_pylist())  # mixed role: visitors and admissions
    cpu = np.array([[row["decode_cpu_ms"], row["latency_ms"]] for row in rows])
    assert np.nanmedian(cpu[:, 0] / cpu[:, 1]) == pytest.approx(1.5, abs=0.8)
    kinds = {row["kind"] for row in profile.units.to_pylist()}
    assert kinds == {"embed", "forward", "forward_kept", "loss", "backward", "backward_kept", "optimizer"}
    assert len({unit.kept_layers for unit in profile.info.unit_times}) > 1
    assert any(unit.kind == "backward" and unit.mean_ms > 0 for unit in profile.info.unit_times)
    report = report_on(profile.steps, profile.segments, plan_of(profile))
    assert report.summary() == profile.info.summary


@pytest.mark.usefixtures("job")
def test_a_budget_too_short_for_the_corners_says_how_much_it_takes(
    host: EngineHost, settings: ProfileSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = settings.model_copy(update={"budget_s": 1e-3})
    profiling = Profiling(short)
    with pytest.raises(HarliError, match="too short for one pass over the corners; give it --budget-minutes"):
        host.run(profiling.sitting(host.engine, ProfileFolder(tmp_path / "p"), lambda progress: None).run())
    assert read_profile(tmp_path / "p").info.status == "failed"


@pytest.fixture
def folder(host: EngineHost, settings: ProfileSettings, tmp_path: Path) -> Path:
    """A profile without any rows yet."""
    profiling = Profiling(settings)
    target = ProfileFolder(tmp_path / "profile")
    target.write(profiling.info(profiling.plan(host.engine)))
    return tmp_path / "profile"


def test_another_model_is_refused(folder: Path, settings: ProfileSettings) -> None:
    other = settings.model_copy(update={"engine": settings.engine.model_copy(update={"model": "small"})})
    with pytest.raises(HarliError, match="cannot be resumed here: model tiny is not small"):
        Profiling(other, folder)


def test_another_menu_or_a_finished_profile_is_refused(folder: Path, settings: ProfileSettings) -> None:
    path = folder / "profile.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "menu": ["4/0", "2/2", "0/4"]}))
    with pytest.raises(HarliError, match="menu 4/0, 2/2, 0/4 is not"):
        Profiling(settings, folder)
    path.write_text(json.dumps({**info, "status": "finished"}))
    with pytest.raises(HarliError, match="is finished"):
        Profiling(settings, folder)


def test_damage_is_named(folder: Path, settings: ProfileSettings) -> None:
    path = folder / PROFILE_STEPS.file
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(HarliError, match=r"steps.parquet is damaged"):
        Profiling(settings, folder)
    path.unlink()
    with pytest.raises(HarliError, match=r"steps.parquet is missing"):
        Profiling(settings, folder)


def test_a_share_that_does_not_exist(settings: ProfileSettings) -> None:
    with pytest.raises(HarliError, match="no share '7/9'"):
        Profiling(settings.model_copy(update={"shares": ("7/9",)}))


def test_a_new_profile_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("")
    with pytest.raises(HarliError, match="not empty"):
        ProfileFolder(tmp_path)
