from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harli.records.profile import PROFILE_STEPS, SEGMENTS, UNITS, ProfileInfo
from harli.rows import StepRecord
from harli.types import Costs, HarliError
from predictor.dataset import MIN_POINTS, Dataset, differences, read_datasets, states
from tests.predictor.builders import MENU, UNIT_TIMES, synthetic, write_plain
from tests.records.builders import STEP, run_info, small_run


def steps_of(data: Dataset) -> list[tuple[int, StepRecord]]:
    """``data`` as (point, step) rows."""
    rows = []
    for index in range(len(data)):
        row = STEP._replace(step=index, time_s=0.1 * index, latency_ms=20.0, gap_ms=float(data.gap_ms[index]))
        row = row._replace(decode_cpu_ms=row.gap_ms * float(data.decode_units[index]))
        names = ("batch", "context_sum", "context_max", "admitted", "decode_units", "finetune_units")
        changes = {name: int(getattr(data, name)[index]) for name in (*names, "microbatch_tokens", "kept_layers")}
        rows.append((int(data.point[index]), row._replace(**changes)))
    return rows


def write_profile(folder: Path, rows: list[tuple[int, StepRecord]], **changes: object) -> Path:
    """A profile folder of these rows."""
    folder.mkdir()
    given = {
        "profile_id": "p", "model": "some/model", "role": "decode", "menu": [str(share) for share in MENU.shares],
        "device": {"kind": "cpu", "cores": 4}, "versions": {"vllm": "0.32.0"}, "settings": {}, "plan": {"seed": 0},
        "started_at": "2026-01-31T12:00:00+00:00", "status": "finished", "costs": Costs(switch_ms=2.0),
        "unit_times": UNIT_TIMES, "finetune_alone_tokens_per_s": {"0/4 256": 900.0, "0/4 512": 1100.0},
    }  # fmt: skip
    info = ProfileInfo(**{**given, **changes})  # type: ignore[arg-type]
    (folder / "profile.json").write_text(info.model_dump_json())
    pq.write_table(PROFILE_STEPS.table([(0, point, *row) for point, row in rows]), folder / PROFILE_STEPS.file)
    pq.write_table(SEGMENTS.schema.empty_table(), folder / SEGMENTS.file)
    pq.write_table(UNITS.schema.empty_table(), folder / UNITS.file)
    return folder


def test_a_plain_table_comes_back_as_it_was(tmp_path: Path) -> None:
    data = synthetic(30, 5)
    read = read_datasets([write_plain(tmp_path / "steps.parquet", data)])
    assert read.menu == MENU
    np.testing.assert_allclose(read.gap_ms, data.gap_ms)
    np.testing.assert_array_equal(read.share, data.share)
    assert read.sha256 == read_datasets([tmp_path / "steps.parquet"]).sha256


def test_a_profile_brings_costs_and_rates_and_its_other_steps_as_points_of_their_own(tmp_path: Path) -> None:
    data = synthetic(40, 5)
    rows = [(-1 if index % 50 < 2 else point, row) for index, (point, row) in enumerate(steps_of(data))]
    read = read_datasets([write_profile(tmp_path / "profile", rows)])
    assert (read.costs, read.unit_times) == (Costs(switch_ms=2.0), UNIT_TIMES)
    assert read.finetune_alone_tokens_per_s in (900.0, 1100.0)
    assert len(read) == len(data)
    assert read.point.min() == 0
    assert read.point[~read.repeats].min() > read.point[read.repeats].max()
    assert (~read.repeats).sum() == 8


def test_steps_without_a_meaning_are_left_out(tmp_path: Path) -> None:
    rows = steps_of(synthetic(40, 5))
    point, split = next(item for item in rows if item[1].finetune_units)
    bad = [
        split._replace(gap_ms=float("nan")),
        split._replace(gap_ms=5100.0, window_ms=5050.0),
        split._replace(finetune_units=0),
        split._replace(decode_units=1, finetune_units=1),
    ]
    window = split._replace(gap_ms=90.0, window_ms=40.0, exclusive_ms=40.0, finetune_tokens=99.0)
    read = read_datasets(
        [write_profile(tmp_path / "profile", [*rows, *((point, row) for row in bad), (point, window)])]
    )
    assert len(read) == len(rows) + 1
    assert read.gap_ms[-1] == 50.0
    assert np.isnan(read.finetune_tokens[-1])


def test_runs_are_cut_into_blocks_of_one_share_and_weighted(tmp_path: Path) -> None:
    menu = ["2/0", "1/1", "0/2"]
    profile = [
        (point, row._replace(decode_units=1 + (not row.finetune_units), finetune_units=min(row.finetune_units, 1)))
        for point, row in steps_of(synthetic(30, 4))
    ]
    info = run_info()
    small_run(tmp_path / "run")
    folder = write_profile(
        tmp_path / "profile", profile, menu=menu, model=info.model, role=info.role, device=info.device,
        versions=info.versions, finetune_alone_tokens_per_s={},
    )  # fmt: skip
    read = read_datasets([folder], [tmp_path / "run"], run_weight=0.25)
    of_run = read.take(~read.repeats)
    assert len(of_run) == 638  # 640 steps, two of them the first after idling
    assert set(of_run.weight) == {0.25}
    assert np.unique(of_run.point, return_counts=True)[1].max() <= 64
    assert of_run.point.min() > read.point[read.repeats].max()


def test_data_that_cannot_be_trained_on_is_refused(tmp_path: Path) -> None:
    data = synthetic(30, 4)
    path = tmp_path / "steps.parquet"

    def refuse(part: Dataset, match: str) -> None:
        with pytest.raises(HarliError, match=match):
            read_datasets([write_plain(path, part)])

    refuse(data.take(np.zeros(0, dtype=int)), "no rows")
    refuse(data.take(~data.solo), "(?s)decode alone")
    refuse(data.take(data.point < MIN_POINTS - 1), f"{MIN_POINTS} are needed")
    data.gap_ms[:] = 25.0
    refuse(data, "every gap is 25 ms")
    data.gap_ms[:] = np.nan
    refuse(data, "NaN everywhere")
    with pytest.raises(HarliError, match="nothing to train on"):
        read_datasets([])


def test_one_share_is_not_enough(tmp_path: Path) -> None:
    data = synthetic(60, 4)
    path = write_profile(tmp_path / "profile", steps_of(data.take(data.solo)))
    with pytest.raises(HarliError, match="every step ran at the share 4/0"):
        read_datasets([path])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(HarliError, match="is not a profile"):
        read_datasets([tmp_path / "nothing"])
    garbage = tmp_path / "garbage.parquet"
    garbage.write_bytes(b"not parquet at all")
    with pytest.raises(HarliError, match=r"cannot read .*garbage\.parquet"):
        read_datasets([garbage])
    pq.write_table(pa.table({"point": [1], "batch": [1]}), garbage)
    with pytest.raises(HarliError, match="lacks the column context_sum"):
        read_datasets([garbage])
    folder = write_profile(tmp_path / "profile", steps_of(synthetic(30, 4)))
    content = json.loads((folder / "profile.json").read_text())
    (folder / "profile.json").write_text(json.dumps({**content, "schema_version": 99}))
    with pytest.raises(HarliError, match="newer Harli"):
        read_datasets([folder])
    (folder / "profile.json").write_text(json.dumps({**content, "menu": ["4/0", "0/4", "2/2"]}))
    with pytest.raises(HarliError, match="not a menu"):
        read_datasets([folder])


def test_sources_of_different_origin_are_not_mixed(tmp_path: Path) -> None:
    rows = steps_of(synthetic(30, 4))
    one, other = write_profile(tmp_path / "one", rows), write_profile(tmp_path / "other", rows, model="another")
    with pytest.raises(HarliError, match="do not belong together: model some/model is not another"):
        read_datasets([one, other])
    same = write_profile(tmp_path / "same", rows)
    both = read_datasets([one, same])
    assert len(np.unique(both.point)) == 2 * len(np.unique(read_datasets([one]).point))


def test_differences_name_what_differs() -> None:
    identity = {"model": "m", "role": "decode", "menu": ["2/0"], "device": {"cores": 2}, "versions": {"vllm": "1"}}
    assert differences(identity, identity) == []
    assert differences(identity, {**identity, "versions": {"vllm": "2", "mlflow": "3"}}) == ["vllm 1 is not 2"]
    assert len(differences(identity, {})) == 5


def test_states_are_broadcast() -> None:
    data = states(MENU, [0, 1, 2], 8, 4000, admitted=[0, 0, 1])
    assert data.solo.tolist() == [True, False, False]
    assert data.context_max.tolist() == [500.0] * 3
    assert data.finetune_units.tolist() == [0.0, 1.0, 2.0]
