"""Which runs there are, in which order, and what a short pass leaves of variants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import pytest

from harli.compare.cell import SEPARATE, Entrant, Group, Objective, groups
from harli.compare.plan import PRUNING, PlannedRun, expected_s, planned_runs
from harli.compare.settings import ComparisonSettings
from harli.compare.verdict import Run
from harli.types import HarliError, Menu, Slo
from tests.compare.builders import comparison_settings, shown

TWO_CORES = Menu.parse(["2/0", "1/1", "0/2"])
EIGHT_CORES = Menu.parse(["8/0", "6/2", "4/4", "3/5", "2/6", "0/8"])
QOS = Entrant("qos")
THRESHOLDS: Group = tuple(Entrant("reactive", (("low", low), ("high", 0.8))) for low in (0.4, 0.5, 0.6))
SPLITS: Group = tuple(Entrant("static", (("share", share),), slo_aware=False) for share in ("6/2", "4/4", "2/6"))


class Shown:
    """Runs that are complete as soon as they were asked for, as ``of`` has them."""

    def __init__(self, of: Callable[[PlannedRun, Slo], Run] = lambda planned, slo: shown(10.0)) -> None:
        self.of = of
        self.missing: set[PlannedRun] = set()

    def run(self, planned: PlannedRun, slo: Slo) -> Run | None:
        return None if planned in self.missing else self.of(planned, slo)


def plan(settings: ComparisonSettings, variants: Iterable[Group], results: Shown | None = None) -> list[PlannedRun]:
    return list(planned_runs(settings, tuple(variants), EIGHT_CORES, results or Shown()))


def test_decode_alone_comes_first_and_each_round_has_everyone_once_in_an_order_of_its_own() -> None:
    settings = comparison_settings("x", slo_scales=(1.25, 1.5), rounds=6)
    static = (SPLITS[0],)
    runs = plan(settings, [(QOS,), static])
    assert runs[0] == PlannedRun(1, SEPARATE)
    assert [run.round for run in runs] == sorted(run.round for run in runs)
    slos = [Objective(Slo(itl_ms=scale * 80.0), scale) for scale in (1.25, 1.5)]
    everyone = {(SEPARATE, None), (SPLITS[0], None), (QOS, slos[0]), (QOS, slos[1])}
    orders = set()
    for number in range(1, 7):
        order = [(run.entrant, run.objective) for run in runs if run.round == number]
        assert len(order) == 4
        assert set(order) == everyone
        orders.add(tuple(order))
    assert len(orders) > 2
    assert runs == plan(settings, [(QOS,), static])
    assert len({run.folder for run in runs}) == len(runs)


def test_an_slo_in_ms_needs_no_base() -> None:
    runs = plan(comparison_settings("x", itl_ms=70.0), [(QOS,)])
    assert {run.objective for run in runs if run.entrant == QOS} == {Objective(Slo(itl_ms=70.0))}


def test_the_best_variant_that_keeps_an_slo_goes_into_the_rounds() -> None:
    """Tokens and gaps grow with `low`, and with the part of the split; the looser SLO has room for more."""
    tokens = {entrant: 10.0 + number for group in (THRESHOLDS, SPLITS) for number, entrant in enumerate(group)}

    def of(planned: PlannedRun, slo: Slo) -> Run:
        level = tokens.get(planned.entrant, 0.0)
        kept = level <= (11.0 if slo.itl_ms is not None and slo.itl_ms < 110.0 else 12.0)
        return shown(level, itl_attainment=1.0 if kept else 0.9)

    settings = comparison_settings("x", slo_scales=(1.25, 1.5), rounds=2)
    runs = plan(settings, [(QOS,), THRESHOLDS, SPLITS], Shown(of))
    pruning = Counter(run.entrant.policy for run in runs if run.round == PRUNING)
    assert pruning == {"separate": 1, "reactive": 6, "static": 3}
    tight, loose = (Objective(Slo(itl_ms=scale * 80.0), scale) for scale in (1.25, 1.5))
    for number in (1, 2):
        mine = {(run.entrant, run.objective) for run in runs if run.round == number and run.entrant.params}
        assert mine == {(THRESHOLDS[1], tight), (THRESHOLDS[2], loose), (SPLITS[1], None), (SPLITS[2], None)}


def test_without_a_variant_that_keeps_the_slo_the_nearest_one_represents_them() -> None:
    def of(planned: PlannedRun, slo: Slo) -> Run:
        near = planned.entrant == SPLITS[0]
        return shown(5.0 if near else 50.0, itl_attainment=1.0 if planned.entrant == SEPARATE else 0.3 + 0.5 * near)

    runs = plan(comparison_settings("x", itl_ms=70.0, rounds=1), [SPLITS], Shown(of))
    assert [run.entrant for run in runs if run.round == 1] == [SEPARATE, SPLITS[0]]


def test_the_plan_ends_where_the_rest_follows_from_a_missing_run() -> None:
    settings, results = comparison_settings("x", slo_scales=(1.5,)), Shown()
    whole = plan(settings, [SPLITS, (QOS,)], results)
    results.missing = {run for run in whole if run.entrant == SPLITS[1] and run.round == PRUNING}
    assert plan(settings, [SPLITS, (QOS,)], results) == [run for run in whole if run == whole[0] or not run.round]
    results.missing = {whole[0]}
    assert plan(settings, [SPLITS, (QOS,)], results) == whole[:1]
    results.missing = {whole[-1]}
    assert plan(settings, [SPLITS, (QOS,)], results) == whole


def test_dedicated_adds_half_the_requests_and_finetuning_alone() -> None:
    settings = comparison_settings("x", slo_scales=(1.25, 1.5), rounds=2, dedicated=True)
    runs = plan(settings, [(QOS,), (SPLITS[0],)])
    for number in (1, 2):
        loads = Counter((run.entrant.policy, run.load) for run in runs if run.round == number)
        assert loads == {
            ("separate", "all"): 1,
            **{("qos", "all"): 2, ("qos", "half"): 2},
            **{("static", "all"): 1, ("static", "half"): 1, ("static", "none"): 1},
        }
    (alone,) = [run for run in runs if run.round == 1 and run.load == "none"]
    assert dict(alone.entrant.params) == {"share": "8/0", "work_conserving": True}
    assert len({run.folder for run in runs}) == len(runs)


@pytest.mark.parametrize("dedicated", [False, True])
@pytest.mark.parametrize("variants", [[(QOS,)], [(QOS,), THRESHOLDS]])
def test_the_expected_time_is_that_of_the_plan(variants: list[Group], dedicated: bool) -> None:
    settings = comparison_settings("x", slo_scales=(1.25, 1.5), rounds=3, prune_s=7.0, dedicated=dedicated)
    lengths = [7.0 if run.round == PRUNING else settings.run.workload.duration_s for run in plan(settings, variants)]
    assert expected_s(settings, variants) == pytest.approx(sum(lengths))


def test_static_has_every_split_fixed_and_work_conserving() -> None:
    few = groups(["static"], TWO_CORES)
    assert [str(group[0]) for group in few] == [
        f"static share=1/1 work_conserving={word}" for word in ("false", "true")
    ]
    many = groups(["static"], EIGHT_CORES)
    assert [len(group) for group in many] == [4, 4]
    assert {dict(entrant.params)["share"] for entrant in many[0]} == {"6/2", "4/4", "3/5", "2/6"}


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        (["statik"], "did you mean 'static'"),
        (["separate"], "add a policy to --policies"),
        (["a.py:Half", "b.py:Half"], "two of the policies are called Half"),
    ],
)
def test_bad_policies_are_told(
    policies: list[str], message: str, tmp_path: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    for name in ("a.py", "b.py"):
        with open(name, "w") as file:
            file.write("from policies.separate import Separate\n\nclass Half(Separate):\n    pass\n")
    with pytest.raises(HarliError, match=message):
        groups(policies, TWO_CORES)


def test_names_of_folders_are_plain() -> None:
    run = PlannedRun(2, Entrant("my dir/p.py:Half", (("share", "1/1"), ("fast", True))), Objective(Slo(tpot_ms=62.5)))
    assert run.folder == "round-2/Half-share=1-1-fast=true-tpot-62.5ms"
    assert str(run) == "round 2: Half share=1/1 fast=true, tpot-62.5ms"
