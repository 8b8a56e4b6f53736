"""The search for a policy's parameters: judged like a comparison, taken up again, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
from rich.console import Console

from harli.commands.tuning import tuned_settings
from harli.compare import tune
from harli.compare.cell import Entrant, groups
from harli.compare.settings import ComparisonSettings, SimulatedDevice
from harli.compare.simulated import SimulatedComparison
from harli.compare.tune import Search, Tried, best
from harli.config import RunSettings
from harli.simulate.device import Device
from harli.simulate.devices import USUAL
from harli.simulate.run import Simulation, SimulationSettings
from harli.types import Decision, DecodeState, FinetuneState, HarliError, Menu
from harli.workload.base import Workload
from policies.base import Policy, PolicyContext, Range

SLO_MS = 12.0
DECODE_MS = 3.5
"""The least that the simulated device's decode takes."""


class Windowed(Policy):
    """A window of one length before every step: the more the better, until decode is late."""

    def __init__(
        self, context: PolicyContext, *, window_ms: Annotated[float, Range(0.5, 12.0)] = 1.5, every: int = 1
    ) -> None:
        super().__init__(context)
        if window_ms > 11.0:
            raise HarliError("too long a window")
        self.decision = Decision(context.menu.decode_alone, window_ms)
        self.every = every

    def decide(self, decode: DecodeState, finetune: FinetuneState) -> Decision:
        return self.decision


POLICY = f"{__file__}:Windowed"


def comparison(**changes: Any) -> ComparisonSettings:
    given = {"policy": "separate", "engine": USUAL["engine"], "finetune": {"microbatch_tokens": 256}}
    given |= {"workload": {"requests_per_s": 3.0, "duration_s": 3.0}, "slo": {"itl_ms": SLO_MS}}
    run = RunSettings.model_validate(given | changes.pop("run", {}))
    device = SimulatedDevice(device="h200/llama-3-8b")
    return ComparisonSettings(policies=("separate",), run=run, simulation=device, **changes)


def search(policy: str = POLICY, **changes: Any) -> Search:
    return Search(comparison(**changes), policy)


@pytest.fixture(scope="module")
def tried() -> list[Tried]:
    heard: list[Tried] = []
    found = search().run(12, on_trial=heard.append)
    assert heard == found
    return found


def test_the_best_finetunes_more_than_the_defaults_and_harms_nobody(tried: list[Tried]) -> None:
    assert len(tried) == 13
    assert tried[0].params == {}
    assert all(set(one.params) == {"window_ms"} for one in tried[1:])
    found = best(tried)
    assert found.tokens_per_s > tried[0].tokens_per_s
    assert not found.reason
    assert found.attainment >= 0.99
    assert 1.5 < float(found.params["window_ms"]) < SLO_MS - DECODE_MS + 0.5


def test_what_harms_decode_is_worth_nothing_however_much_it_finetunes(tried: list[Tried]) -> None:
    late = [one for one in tried if one.reason.startswith("attains")]
    assert max(one.tokens_per_s for one in late) > best(tried).tokens_per_s
    assert all(one.value < 0.0 for one in late)
    refused = [one for one in tried if "too long" in one.reason]
    assert all(one.value == -2.0 and float(one.params["window_ms"]) > 11.0 for one in refused)
    assert best([*late, *refused, tried[0]]) == tried[0]


def test_a_search_in_two_sittings_finds_the_same(tried: list[Tried], tmp_path: Path) -> None:
    storage = tmp_path / "mlruns" / "optuna.db"
    assert search().run(2, storage=storage) == tried[:3]
    assert search().run(4, storage=storage) == tried[:5]
    other = search(run={"slo": {"itl_ms": 5.0}}).run(1, storage=storage)
    assert other[1] != tried[1]


@pytest.mark.parametrize("traced", [False, True])
def test_the_search_sees_neither_requests_nor_noise_of_any_round(
    traced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, Workload]] = []

    class Watched(Simulation):
        def __init__(self, settings: SimulationSettings, device: Device, workload: Workload) -> None:
            seen.append((settings.workload.seed, workload))
            super().__init__(settings, device, workload)

    monkeypatch.setattr(tune, "Simulation", Watched)
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{place * 0.2},{20 + place},{5 + 3 * place}\n" for place in range(10))
    trace.write_text(f"Timestamp,Request tokens,Response tokens\n{rows}")
    workload = {"requests_per_s": 3.0, "duration_s": 3.0, "trace": trace if traced else None}
    settings = comparison(run={"workload": workload}).model_copy(update={"policies": (POLICY,)})
    Search(settings, POLICY).run(0)
    confirmed = SimulatedComparison(settings)
    known = [confirmed.round_workload(number).requests for number in range(1, 10)]
    assert seen
    assert all(seed not in range(10) and searched.requests not in known for seed, searched in seen)


def test_what_was_found_takes_part_beside_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = comparison().model_copy(update={"policies": (POLICY,)})
    tuned = tuned_settings(settings, POLICY, 4, Console(quiet=True))
    (found,) = tuned.tuned.values()
    assert settings.model_copy(update={"tuned": tuned.tuned}) == tuned
    assert (tmp_path / "mlruns" / "optuna.db").exists()
    entrants = groups(tuned.policies, Menu.parse(["132/0", "0/132"]), tuned.tuned)
    assert entrants == ((Entrant(POLICY),), (Entrant(POLICY, tuple(found.items())),))


def test_a_scaled_slo_is_a_multiple_of_decode_alone_in_the_simulator() -> None:
    (only,) = search(run={"slo": {}}, slo_scales=(2.0,)).run(0)
    assert only.attainment == 1.0
    (only,) = search(run={"slo": {}}, slo_scales=(1.05,)).run(0)
    assert only.attainment < 0.5


@pytest.mark.parametrize(
    ("policy", "changes", "named"),
    [
        ("separate", {}, "Range"),
        (POLICY, {"run": {"slo": {}}, "slo_scales": (1.5, 2.0)}, "one SLO"),
        ("nobody", {}, "nobody"),
    ],
)
def test_what_a_user_can_mend_is_one_line(policy: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(HarliError) as refused:
        search(policy, **changes)
    assert named in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_file_that_is_no_study_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "optuna.db").write_text("not a database, though it has the name of one")
    with pytest.raises(HarliError, match="cannot keep the search"):
        search().run(1, storage=tmp_path / "optuna.db")
