"""Settings that make no comparison, and folders of another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harli.compare.settings import COMPARISON_FILE, ComparisonInfo, check_identity, check_same
from harli.records.reader import read_info
from harli.types import HarliError, Slo
from tests.compare.builders import comparison_settings

MENU = ["2/0", "1/1", "0/2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "--rounds must be 1 or more, not 0"),
        ({"prune_s": 0.0}, "--prune-s"),
        ({"itl_ms": None}, "needs an SLO"),
        ({"slo_scales": (1.5,)}, "given twice"),
        ({"itl_ms": None, "slo_scales": (1.5, -1.0)}, "--slo-scale must be a positive"),
        ({"itl_ms": None, "slo_scales": (1.5, 1.25, 1.5)}, "same number twice"),
    ],
)
def test_impossible_settings_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HarliError, match=message):
        comparison_settings("static", **{"itl_ms": 50.0} | changes)
    with pytest.raises(HarliError, match="give --policies"):
        comparison_settings(itl_ms=50.0)


def test_scales_multiply_what_decode_alone_shows() -> None:
    alone = {"decode/itl_p99_ms": 40.0, "decode/tpot_p99_ms": 30.0}
    itl = comparison_settings("static", slo_scales=(1.25, 2.0)).objectives(alone)
    assert [(one.slo, one.scale) for one in itl] == [(Slo(itl_ms=50.0), 1.25), (Slo(itl_ms=80.0), 2.0)]
    (tpot,) = comparison_settings("static", slo_scales=(2.0,), slo_on="tpot").objectives(alone)
    assert (tpot.slo, tpot.label, str(tpot)) == (Slo(tpot_ms=60.0), "2x", "TPOT 60 ms (2 times decode alone's P99)")
    with pytest.raises(HarliError, match="no latency to scale"):
        comparison_settings("static", slo_scales=(1.5,)).objectives({"decode/itl_p99_ms": None})


def test_a_comparison_is_gone_on_with_under_its_own_settings_only(tmp_path: Path) -> None:
    settings = comparison_settings("static", slo_scales=(1.5,))
    info = ComparisonInfo(
        settings=settings, menu=MENU, device={"kind": "cpu"}, versions={}, started_at="2026-01-31T12:00:00+00:00"
    )
    (tmp_path / COMPARISON_FILE).write_text(info.model_dump_json())
    recorded = read_info(tmp_path / COMPARISON_FILE, ComparisonInfo)
    assert recorded == info
    check_same(recorded, settings, MENU)
    check_same(recorded, settings.model_copy(update={"rounds": 5}), MENU)
    with pytest.raises(HarliError, match=r"other settings \(rounds\)"):
        check_same(recorded, settings.model_copy(update={"rounds": 2}), MENU)
    with pytest.raises(HarliError, match="this one has 4/0, 0/4"):
        check_same(recorded, settings, ["4/0", "0/4"])
    with pytest.raises(HarliError, match="is not a comparison"):
        read_info(tmp_path / "elsewhere" / COMPARISON_FILE, ComparisonInfo)


def test_what_was_measured_elsewhere_is_not_mixed_with_what_is_measured_here() -> None:
    device, versions = {"kind": "cpu", "cores": 2}, {"vllm": "0.26", "torch": "2.9", "mlflow": "3.1"}
    recorded = ComparisonInfo(
        settings=comparison_settings("static", itl_ms=50.0),
        menu=MENU,
        device=device,
        versions=versions,
        started_at="2026-01-31T12:00:00+00:00",
    )
    check_identity(recorded, device, versions | {"mlflow": "3.2"})
    with pytest.raises(HarliError, match=r"vllm 0\.26 is not 0\.27; begin a new one"):
        check_identity(recorded, device, versions | {"vllm": "0.27"})
    with pytest.raises(HarliError, match=r"cores 2\) is not \(kind cpu, cores 4"):
        check_identity(recorded, device | {"cores": 4}, versions)
