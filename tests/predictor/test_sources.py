"""What groups the rows of a source belong to, and what a row must have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harli.records.profile import PROFILE_STEPS, SEGMENTS
from harli.types import HarliError
from predictor.sources import GROUP_IDS, read_profiled, read_run
from tests.predictor.builders import MENU, synthetic, write_plain
from tests.predictor.test_dataset import write_profile
from tests.profiling.builders import make_plan, tables
from tests.records.builders import small_run


def profiled(folder: Path, segments: int, profile_id: str = "p") -> Path:
    """The first ``segments`` of a profile on a machine that is slow in the second half of it."""
    plan = make_plan()
    visits = 2 * len(plan.groups)
    steps, rows = tables(plan, speed=[1.0] * (visits // 2) + [0.6] * (visits - visits // 2))
    steps, rows = steps.filter(pa.array(steps["segment"].to_numpy() < segments)), rows.slice(0, segments)
    group = rows["group"].to_numpy()[steps["segment"].to_numpy()]
    begins = np.append(True, group[1:] != group[:-1])  # a visit begins after idling
    spread = {
        "gap_ms": np.where(begins, np.nan, steps["gap_ms"].to_numpy()),
        "time_s": 10.0 * steps["time_s"].to_numpy(),
    }
    for name, column in spread.items():
        steps = steps.set_column(steps.schema.get_field_index(name), steps.schema.field(name), pa.array(column))
    times = pa.array(10.0 * rows["time_s"].to_numpy())
    rows = rows.set_column(rows.schema.get_field_index("time_s"), rows.schema.field("time_s"), times)
    write_profile(folder, [], profile_id=profile_id, menu=["2/0", "1/1", "0/2"])
    pq.write_table(steps, folder / PROFILE_STEPS.file)
    pq.write_table(rows, folder / SEGMENTS.file)
    return folder


def test_a_profile_that_is_gone_on_with_keeps_its_groups(tmp_path: Path) -> None:
    everything = 8 * len(make_plan().groups)
    short, whole = (read_profiled(profiled(tmp_path / str(size), size)) for size in (everything // 2, everything))
    same = len(short.group)
    assert len(np.unique(short.group)) > 20
    assert (
        np.nanmax(np.abs(short.columns["gap_ms"] / whole.columns["gap_ms"][:same] - 1.0)) > 0.05
    )  # another usual speed
    np.testing.assert_array_equal(short.group, whole.group[:same])


def test_other_profiles_and_runs_have_other_groups(tmp_path: Path) -> None:
    one = read_profiled(profiled(tmp_path / "one", 40))
    other = read_profiled(profiled(tmp_path / "other", 40, profile_id="q"))
    assert set(one.group).isdisjoint(other.group)
    small_run(tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert len(np.unique(run.group)) == 2
    np.testing.assert_array_equal(run.group, read_run(tmp_path / "run").group)


def test_ids_are_spread_evenly(tmp_path: Path) -> None:
    ids = np.unique(read_profiled(write_plain(tmp_path / "steps.parquet", synthetic(2000, 1))).group)
    assert len(ids) > 1900
    assert np.mean(ids < 0.2 * GROUP_IDS) == pytest.approx(0.2, abs=0.03)


def states_at_shares() -> pa.Table:
    """Points 0 to 5: three batches alone, then the same three beside finetuning; contexts grow by the batch."""
    point = np.repeat(np.arange(6), 4)
    batch = 1 + point % 3
    units = np.where(point < 3, 0, 1)
    return pa.table(
        {
            "point": point,
            "batch": batch,
            "context_sum": 100 * batch + batch * (np.arange(24) % 4 + units),
            "decode_units": 2 - units,
            "finetune_units": units,
            "gap_ms": 20.0 + batch,
        }
    )


def test_a_state_is_one_group_at_every_share(tmp_path: Path) -> None:
    path = tmp_path / "steps.parquet"
    pq.write_table(states_at_shares(), path)
    source = read_profiled(path)
    groups = [set(source.group[source.columns["batch"] == batch]) for batch in (1, 2, 3)]
    assert [len(group) for group in groups] == [1, 1, 1]
    assert len(set.union(*groups)) == 3
    pq.write_table(states_at_shares().slice(4), path)  # without the first point
    np.testing.assert_array_equal(read_profiled(path).group[:8], source.group[4:12])


def test_a_table_may_name_its_groups(tmp_path: Path) -> None:
    path = tmp_path / "steps.parquet"
    named = np.arange(24) // 6
    pq.write_table(states_at_shares().append_column("group", pa.array(named)), path)
    group = read_profiled(path).group
    assert len(np.unique(group)) == 4
    assert all(len(set(group[named == number])) == 1 for number in range(4))


@pytest.mark.parametrize(
    "name", ["prefill_tokens", "admitted", "context_max", "microbatch_tokens", "window_ms", "group"]
)
def test_a_step_without_a_number_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "steps.parquet"
    for nothing in (None, np.inf):
        column = pa.array([nothing, *[1.0] * 23])
        pq.write_table(states_at_shares().append_column(name, column), path)
        with pytest.raises(HarliError, match=f"{name} of a step is missing or infinite"):
            read_profiled(path)


def test_gaps_and_tokens_may_be_unknown(tmp_path: Path) -> None:
    path = write_plain(tmp_path / "steps.parquet", synthetic(30, 4))
    table = pq.read_table(path)
    unknown = pa.array([None, *table["gap_ms"].to_pylist()[1:]], pa.float64())
    pq.write_table(table.set_column(table.schema.get_field_index("gap_ms"), "gap_ms", unknown), path)
    source = read_profiled(path)
    assert np.isnan(source.columns["gap_ms"][0])
    assert source.menu == MENU
