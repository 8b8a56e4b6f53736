"""Unit times, rates and costs from rows."""

from __future__ import annotations

import pytest

from harli.records.profile import UNITS
from harli.rows import UnitRecord
from profiling.measure import alone_tokens_per_s, costs, unit_times
from tests.profiling.builders import steps_table
from tests.records.builders import STEP

LAYERS = 4


def unit(kind: str, duration_ms: float, *, beside: bool = False, units: int = 2) -> UnitRecord:
    return UnitRecord(0.0, kind, units, beside, 256, 0, duration_ms, 0.0 if kind == "optimizer" else 25.0)


def all_units(*, beside: bool = False) -> list[UnitRecord]:
    times = {"embed": 1.0, "forward": 5.0, "loss": 4.0, "backward": 10.0, "optimizer": 2.0}
    return [unit(kind, duration, beside=beside) for kind, duration in times.items() for _ in range(4)]


def test_unit_times_and_the_rate_that_follows() -> None:
    table = UNITS.table(all_units())
    times = {time.kind: time for time in unit_times(table, LAYERS, accumulation=2)}
    assert times["forward"].mean_ms == 5.0
    assert times["backward"].per_pass == LAYERS
    assert times["optimizer"].per_pass == LAYERS / 2
    pass_ms = 1 + 4 * 5 + 4 + 4 * 10 + 2 * 2
    assert alone_tokens_per_s(tuple(times.values()), table) == {(2, 256): pytest.approx(1e3 * 250.0 / pass_ms)}


def test_units_beside_decode_count_only_where_there_are_none_alone() -> None:
    beside = [unit("forward", 50.0, beside=True)] * 5
    both = unit_times(UNITS.table([*all_units(), *beside]), LAYERS, 1)
    assert {time.kind: time.mean_ms for time in both}["forward"] == 5.0
    (only,) = unit_times(UNITS.table(beside), LAYERS, 1)
    assert only.mean_ms == 50.0


def test_units_with_kept_activations_are_a_shape_of_their_own() -> None:
    rows = all_units()
    for kind, duration in {"forward_kept": 6.0, "backward_kept": 7.0, "backward": 10.0}.items():
        rows += [unit(kind, duration)._replace(kept_layers=3)] * 4
    rows += [unit("backward_kept", 7.0)] * 4  # of a pass that began with another shape
    table = UNITS.table(rows)
    found = unit_times(table, LAYERS, 1)
    per_pass = {time.kind: time.per_pass for time in found if time.kept_layers == 3}
    assert per_pass == {"forward_kept": 3.0, "backward_kept": 3.0, "backward": 1.0}
    assert {time.kind for time in found if not time.kept_layers} == {row.kind for row in all_units()}
    plain = UNITS.table(all_units())
    assert alone_tokens_per_s(found, table) == alone_tokens_per_s(unit_times(plain, LAYERS, 1), plain)


def test_too_few_units_say_nothing() -> None:
    assert unit_times(UNITS.table([unit("forward", 5.0)] * 2), LAYERS, 1) == ()
    assert unit_times(UNITS.table([]), LAYERS, 1) == ()


def test_costs_of_windows() -> None:
    plain = [(0, 0, *STEP._replace(gap_ms=20.0))] * 20
    opened = [(1, 0, *STEP._replace(exclusive_ms=50.0, window_ms=49.0, gap_ms=72.0, finetune_tokens=12.0))] * 20
    found = costs(steps_table(plain + opened), 2)
    assert found.window_overhead_ms == pytest.approx(2.0)
    assert found.switch_ms == 0.0


def test_cost_of_switching_back_to_decode_alone() -> None:
    split = STEP._replace(decode_units=1, finetune_units=1, gap_ms=40.0)
    first, alone = STEP._replace(gap_ms=23.0), STEP._replace(gap_ms=20.0)
    rows = [(0, 0, *row) for _ in range(3) for row in (split, split, first, *[alone] * 4)]
    assert costs(steps_table(rows), 2).switch_ms == pytest.approx(3.0)
    faster = [(0, 0, *row) for row in (split, STEP._replace(gap_ms=19.0), *[alone] * 4)]
    assert costs(steps_table(faster), 2).switch_ms == 0.0
