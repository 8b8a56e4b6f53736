"""The controller: whatever a policy does, decode goes on."""

from __future__ import annotations

import math
from typing import Any

import pytest

from harli.rows import StepRecord
from harli.runtime.controller import DECISION_LIMIT_MS, Controller
from harli.types import Decision, DecodeState, FinetuneState, Menu, Share, Slo
from policies.base import Policy, PolicyContext

MENU = Menu((Share(2, 0), Share(1, 1), Share(0, 2)))
ALONE, SPLIT, FINETUNE = MENU.shares


class Scripted(Policy):
    """Answers what it is told to, and raises what it is told to."""

    def __init__(self) -> None:
        super().__init__(PolicyContext(MENU, Slo()))
        self.decision: Any = Decision(SPLIT)
        self.idle_share: Any = FINETUNE
        self.seen: list[StepRecord] = []
        self.calls = 0
        self.error: Exception | None = None

    def decide(self, decode: DecodeState, finetune: FinetuneState) -> Any:
        return self._answer(self.decision)

    def idle(self, finetune: FinetuneState) -> Any:
        return self._answer(self.idle_share)

    def observe(self, step: StepRecord) -> None:
        self.seen.append(self._answer(step))

    def _answer(self, answer: Any) -> Any:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return answer


@pytest.fixture
def policy() -> Scripted:
    return Scripted()


@pytest.fixture
def controller(policy: Scripted) -> Controller:
    return Controller(policy, "scripted")


def decide(controller: Controller) -> Decision:
    return controller.decide(DecodeState(), FinetuneState())


def row(*, exclusive_ms: float = 0.0, window_ms: float = 0.0) -> StepRecord:
    fields: dict[str, Any] = dict.fromkeys(StepRecord._fields, 0)
    return StepRecord(**fields | {"exclusive_ms": exclusive_ms, "window_ms": window_ms})


def assert_switched_off(controller: Controller, policy: Scripted, reason: str) -> None:
    assert controller.failure.startswith("policy scripted ")
    assert reason in controller.failure
    assert "\n" not in controller.failure
    failure, calls = controller.failure, policy.calls
    policy.error = RuntimeError("another")
    assert decide(controller) == Decision(ALONE)
    assert controller.idle(FinetuneState()) == ALONE
    kept = len(controller.rows)
    controller.observe(row())
    controller.decided(10 * DECISION_LIMIT_MS)
    assert len(controller.rows) == kept + 1
    assert (controller.failure, policy.calls) == (failure, calls)


def test_a_good_policy_has_its_way(controller: Controller, policy: Scripted) -> None:
    policy.decision = Decision(SPLIT, 7.0)
    assert decide(controller) == Decision(SPLIT, 7.0)
    assert controller.idle(FinetuneState()) == FINETUNE
    controller.decided(DECISION_LIMIT_MS)
    controller.observe(row())
    assert list(controller.rows) == policy.seen == [row()]
    assert controller.failure == ""


@pytest.mark.parametrize(
    ("decision", "reason"),
    [
        (Decision(Share(7, 7)), "7/7"),
        (Decision(FINETUNE), "0/2"),
        (Decision(SPLIT, -1.0), "-1.0 ms"),
        (Decision(SPLIT, math.inf), "inf ms"),
        (Decision(SPLIT, math.nan), "nan ms"),
        (Decision(SPLIT, 1e300), "1e+300 ms"),
        (SPLIT, "AttributeError"),
        (None, "AttributeError"),
    ],
    ids=str,
)
def test_a_bad_decision_is_contained(controller: Controller, policy: Scripted, decision: Any, reason: str) -> None:
    policy.decision = decision
    assert decide(controller) == Decision(ALONE)
    assert_switched_off(controller, policy, reason)


def test_a_raising_decide_is_contained(controller: Controller, policy: Scripted) -> None:
    policy.error = KeyError("first line\nsecond line")
    assert decide(controller) == Decision(ALONE)
    assert_switched_off(controller, policy, "KeyError")


@pytest.mark.parametrize("share", [Share(7, 7), None, [1]], ids=str)
def test_a_bad_idle_share_is_contained(controller: Controller, policy: Scripted, share: Any) -> None:
    policy.idle_share = share
    assert controller.idle(FinetuneState()) == ALONE
    assert_switched_off(controller, policy, "")


def test_a_raising_idle_is_contained(controller: Controller, policy: Scripted) -> None:
    policy.error = ValueError("no idea\nat all")
    assert controller.idle(FinetuneState()) == ALONE
    assert_switched_off(controller, policy, "ValueError: no idea")


def test_a_raising_observe_is_contained_and_the_row_is_kept(controller: Controller, policy: Scripted) -> None:
    policy.error = ZeroDivisionError("by zero")
    controller.observe(row())
    assert len(controller.rows) == 1
    assert_switched_off(controller, policy, "ZeroDivisionError: by zero")


def test_a_slow_decision_is_the_last(controller: Controller, policy: Scripted) -> None:
    controller.decided(DECISION_LIMIT_MS + 2.5)
    assert_switched_off(controller, policy, f"took {DECISION_LIMIT_MS + 2.5:.1f} ms")


def test_an_overrun_is_charged_to_the_next_windows(controller: Controller, policy: Scripted) -> None:
    policy.decision = Decision(SPLIT, 10.0)
    controller.observe(row(exclusive_ms=10.0, window_ms=25.0))
    assert decide(controller) == Decision(SPLIT, 0.0)
    assert decide(controller) == Decision(SPLIT, 5.0)
    assert decide(controller) == Decision(SPLIT, 10.0)


def test_steps_without_a_window_neither_pay_nor_owe(controller: Controller, policy: Scripted) -> None:
    controller.observe(row(exclusive_ms=10.0, window_ms=14.0))
    controller.observe(row(window_ms=50.0))  # waited for a unit of before
    controller.observe(row(exclusive_ms=10.0, window_ms=2.0))  # ended early: nothing is saved up
    assert decide(controller) == Decision(SPLIT)
    policy.decision = Decision(SPLIT, 10.0)
    assert decide(controller) == Decision(SPLIT, 6.0)
    assert decide(controller) == Decision(SPLIT, 10.0)
