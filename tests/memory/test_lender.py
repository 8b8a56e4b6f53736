"""What the lender does before steps of vLLM's real scheduler."""

from __future__ import annotations

import math
import threading
from itertools import pairwise
from typing import Any

import pytest

from harli.engine.support import why_not_lent
from harli.memory import lender as lender_module
from harli.memory.lender import PIECE, Lender
from tests.memory.builders import BLOCK, Borrower, check, request, scheduler, step

BLOCKS = 200


@pytest.fixture
def engine() -> Any:
    return scheduler(BLOCKS)


@pytest.fixture
def lender(engine: Any) -> Lender:
    lender = Lender(engine)
    assert lender.open(0.9) is not None
    return lender


def borrower_of(lender: Lender) -> Borrower:
    assert lender.loan is not None
    return Borrower(lender.loan)


def test_an_idle_engine_lends_up_to_the_limit_at_once(engine: Any, lender: Lender) -> None:
    lender.idle(wanted=True)
    assert lender.loan is not None
    assert (lender.owned, lender.loan.line) == (int(0.9 * BLOCKS), BLOCKS - int(0.9 * BLOCKS))
    check(engine, lender)
    lender.idle(wanted=False)
    assert lender.owned == 0


def test_a_busy_engine_lends_in_pieces_and_leaves_what_is_needed_soon(engine: Any, lender: Lender) -> None:
    engine.add_request(request("a", range(40), 50))
    lender.arrived(40)
    owned = [0]
    for _ in range(20):
        step(engine, lender)
        owned.append(lender.owned)
        check(engine, lender)
    assert 0 < max(now - before for before, now in pairwise(owned)) <= PIECE
    kept = engine.kv_cache_manager.block_pool.get_num_free_blocks()
    assert owned[-1] > BLOCKS // 2
    assert kept > engine.max_num_scheduled_tokens // BLOCK


def test_a_request_that_needs_lent_memory_is_admitted_at_once_when_nobody_uses_it(engine: Any, lender: Lender) -> None:
    lender.idle(wanted=True)
    free = engine.kv_cache_manager.block_pool.get_num_free_blocks()
    for index in range(8):
        engine.add_request(request(str(index), [index] * (free * BLOCK // 8 + 4 * BLOCK), 4))
    before = lender.owned
    lender.before_step(True)
    assert lender.owned < before
    assert math.isfinite(lender.reclaim_ms)
    assert lender.waited_ms == 0.0
    assert engine.kv_cache_manager.block_pool.get_num_free_blocks() >= free + 4 * 8


def waiting_request(engine: Any, lender: Lender) -> Borrower:
    """All that is lent is held, and a request arrives that needs some of it."""
    lender.idle(wanted=True)
    borrower = borrower_of(lender)
    assert borrower.claim(lender.owned)
    free = engine.kv_cache_manager.block_pool.get_num_free_blocks()
    engine.add_request(request("waiting", range(free * BLOCK + 50), 4))
    return borrower


def test_a_waiting_request_waits_for_the_unit_only_from_the_second_step_on(engine: Any, lender: Lender) -> None:
    borrower = waiting_request(engine, lender)
    assert lender.loan is not None
    first = step(engine, lender)
    assert math.isnan(lender.reclaim_ms)
    assert lender.waited_ms == 0.0
    timer = threading.Timer(0.05, borrower.between_units)
    timer.start()
    second = step(engine, lender)
    timer.join()
    assert (len(first.scheduled_new_reqs), len(second.scheduled_new_reqs)) == (0, 1)
    assert lender.reclaim_ms >= lender.waited_ms > 10.0
    check(engine, lender, borrower)


def test_a_unit_that_never_ends_is_waited_for_once(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lender_module, "PATIENCE_S", 0.05)
    lender = Lender(engine)
    lender.open(0.9)
    waiting_request(engine, lender)
    step(engine, lender)
    step(engine, lender)
    assert lender.waited_ms >= 50.0
    step(engine, lender)
    assert lender.waited_ms < 50.0


def test_a_unit_that_ended_after_all_is_waited_for_again(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lender_module, "PATIENCE_S", 0.05)
    lender = Lender(engine)
    lender.open(0.9)
    borrower = waiting_request(engine, lender)
    for _ in range(2):
        step(engine, lender)
    borrower.between_units()
    step(engine, lender)
    assert lender._patience_s == 0.05


def test_nothing_is_lent_while_a_loan_ends(engine: Any, lender: Lender) -> None:
    lender.idle(wanted=True)
    borrower = borrower_of(lender)
    borrower.claim(5)
    assert not lender.close()
    left = lender.owned
    lender.idle(wanted=True)
    lender.before_step(True)
    assert lender.owned == left
    borrower.between_units()
    assert lender.close()


def test_a_running_request_is_not_preempted_while_blocks_are_lent() -> None:
    engine = scheduler(30, max_requests=2, max_tokens=2 * BLOCK)
    lender = Lender(engine)
    lender.open(1.0)
    lender.idle(wanted=True)
    borrower = borrower_of(lender)
    for index in range(2):
        engine.add_request(request(str(index), range(1 + index, BLOCK), 13 * BLOCK))
    steps = 0
    while engine.has_unfinished_requests():
        borrower.claim(lender.owned)
        timer = threading.Timer(0.002, borrower.between_units)
        timer.start()
        scheduled = step(engine, lender)
        timer.join()
        assert not scheduled.preempted_req_ids
        steps += 1
    assert steps >= 13 * BLOCK


def test_the_prefix_cache_can_be_reset_and_lending_goes_on(engine: Any, lender: Lender) -> None:
    lender.idle(wanted=True)
    assert not engine.reset_prefix_cache()
    assert lender.give_back()
    assert engine.reset_prefix_cache()
    lender.idle(wanted=True)
    assert lender.owned


def test_a_loan_ends_when_its_borrower_has_let_go_and_nobody_waits_for_that(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lender = Lender(engine)
    loan = lender.open(0.9)
    assert loan is not None
    monkeypatch.setattr(loan, "wait_vacated", None)  # to be called by nobody
    lender.idle(wanted=True)
    borrower = borrower_of(lender)
    borrower.claim(10)
    assert not lender.close()
    assert lender.open(0.9) is None
    assert lender.owned == 10
    borrower.between_units()
    assert lender.close()
    assert (lender.owned, lender.loan) == (0, None)


def test_only_a_cache_of_plain_attention_is_lent(engine: Any) -> None:
    config = engine.kv_cache_manager.kv_cache_config
    assert why_not_lent(config) == ""
    groups = [*config.kv_cache_groups, *config.kv_cache_groups]
    assert "2 groups" in why_not_lent(type(config)(BLOCKS, [], groups))
