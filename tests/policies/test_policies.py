"""What the two simplest policies decide."""

from __future__ import annotations

import pytest

from harli.types import Decision, DecodeState, FinetuneState, HarliError, Menu, Share, Slo
from policies.base import PolicyContext
from policies.separate import Separate
from policies.static import Static

MENU = Menu((Share(4, 0), Share(3, 1), Share(2, 2), Share(1, 3), Share(0, 4)))
CONTEXT = PolicyContext(MENU, Slo(itl_ms=50.0))
STATES = [
    (DecodeState(), FinetuneState()),
    (DecodeState(batch=1, slack_ms=1000.0), FinetuneState(ready=True)),
    (DecodeState(batch=32, waiting=5, slack_ms=-3.0), FinetuneState(ready=True)),
]
TRAINING, DONE = FinetuneState(ready=True), FinetuneState(ready=False)


@pytest.mark.parametrize(("decode", "finetune"), STATES)
def test_separate_never_finetunes(decode: DecodeState, finetune: FinetuneState) -> None:
    policy = Separate(CONTEXT)
    assert policy.decide(decode, finetune) == Decision(Share(4, 0), 0.0)
    assert policy.idle(finetune) == Share(4, 0)


@pytest.mark.parametrize(("decode", "finetune"), STATES)
def test_static_keeps_its_split_whatever_happens(decode: DecodeState, finetune: FinetuneState) -> None:
    policy = Static(CONTEXT, share="3/1")
    assert policy.decide(decode, finetune) == Decision(Share(3, 1), 0.0)
    assert policy.idle(finetune) == Share(3, 1)


def test_static_takes_the_middle_split_by_default() -> None:
    assert Static(CONTEXT).decide(DecodeState(), TRAINING).share == Share(2, 2)
    two_cores = PolicyContext(Menu((Share(2, 0), Share(1, 1), Share(0, 2))), Slo())
    assert Static(two_cores).decide(DecodeState(), TRAINING).share == Share(1, 1)


def test_work_conserving_static_wastes_nothing() -> None:
    policy = Static(CONTEXT, share="3/1", work_conserving=True)
    assert policy.decide(DecodeState(batch=8), TRAINING) == Decision(Share(3, 1))
    assert policy.decide(DecodeState(batch=8), DONE) == Decision(Share(4, 0))
    assert policy.idle(TRAINING) == Share(0, 4)


def test_static_may_be_decode_alone_but_never_finetuning_alone() -> None:
    assert Static(CONTEXT, share="4/0").decide(DecodeState(), TRAINING).share == Share(4, 0)
    with pytest.raises(HarliError, match="share '0/4' leaves decode nothing"):
        Static(CONTEXT, share="0/4")


def test_static_refuses_a_share_that_the_device_lacks() -> None:
    with pytest.raises(HarliError, match="no share '5/5' on this device; it has 4/0, 3/1, 2/2, 1/3, 0/4"):
        Static(CONTEXT, share="5/5")


def test_static_needs_a_device_that_can_be_split() -> None:
    whole = PolicyContext(Menu((Share(4, 0), Share(0, 4))), Slo())
    with pytest.raises(HarliError, match="cannot be split"):
        Static(whole)
    assert Static(whole, share="4/0").idle(TRAINING) == Share(4, 0)
