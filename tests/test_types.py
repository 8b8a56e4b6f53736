"""The vocabulary's few rules."""

from __future__ import annotations

import math

import pytest

from harli.types import LONGEST_GAP_MS, HarliError, Menu, Share, Slo


def test_a_share_names_itself_and_its_fraction() -> None:
    assert str(Share(3, 1)) == "3/1"
    assert Share(3, 1).finetune_share == 0.25
    assert (Share(4, 0).finetune_share, Share(0, 4).finetune_share) == (0.0, 1.0)


MENU = Menu((Share(4, 0), Share(3, 1), Share(1, 3), Share(0, 4)))


def test_a_menu_has_its_ends_and_splits() -> None:
    assert (MENU.decode_alone, MENU.finetune_alone) == (Share(4, 0), Share(0, 4))
    assert MENU.splits == (Share(3, 1), Share(1, 3))
    assert Menu((Share(1, 0), Share(0, 1))).splits == ()


def test_a_menu_finds_a_share_by_name() -> None:
    assert MENU.get("1/3") == Share(1, 3)
    with pytest.raises(HarliError, match=r"no share '2/2' on this device; it has 4/0, 3/1, 1/3, 0/4"):
        MENU.get("2/2")


@pytest.mark.parametrize(
    "shares",
    [
        (),
        (Share(4, 0),),
        (Share(4, 0), Share(2, 2)),
        (Share(2, 2), Share(0, 4)),
        (Share(0, 4), Share(4, 0)),
        (Share(4, 0), Share(1, 3), Share(3, 1), Share(0, 4)),
        (Share(4, 0), Share(2, 2), Share(2, 2), Share(0, 4)),
    ],
)
def test_what_is_not_a_menu(shares: tuple[Share, ...]) -> None:
    with pytest.raises(ValueError, match="not a menu"):
        Menu(shares)


@pytest.mark.parametrize(
    ("slo", "slack_ms", "budget_ms"),
    [
        (Slo(), 5.0, LONGEST_GAP_MS),
        (Slo(itl_ms=40.0), 5.0, 40.0),
        (Slo(itl_ms=40.0), -5.0, 40.0),
        (Slo(itl_ms=4000.0), 5.0, LONGEST_GAP_MS),
        (Slo(tpot_ms=30.0), 25.0, 25.0),
        (Slo(tpot_ms=30.0), 59.0, 59.0),
        (Slo(tpot_ms=30.0), 61.0, 60.0),
        (Slo(tpot_ms=30.0), math.inf, 60.0),
        (Slo(tpot_ms=30.0), -7.0, -7.0),
        (Slo(itl_ms=40.0, tpot_ms=30.0), 25.0, 25.0),
        (Slo(itl_ms=40.0, tpot_ms=30.0), 50.0, 40.0),
        (Slo(itl_ms=70.0, tpot_ms=30.0), 500.0, 60.0),
    ],
)
def test_the_budget_of_the_next_token(slo: Slo, slack_ms: float, budget_ms: float) -> None:
    assert slo.budget_ms(slack_ms) == budget_ms


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_an_slo_is_a_positive_number(value: float) -> None:
    with pytest.raises(HarliError, match="the ITL SLO must be a positive number"):
        Slo(itl_ms=value)
    with pytest.raises(HarliError, match="the TPOT SLO must be a positive number"):
        Slo(tpot_ms=value)
