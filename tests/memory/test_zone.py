"""Taking blocks from vLLM's real block pool, and giving them back."""

from __future__ import annotations

from typing import Any

import pytest

from harli.memory.loan import Loan
from harli.memory.zone import Zone

TOTAL = 50


@pytest.fixture
def pool() -> Any:
    from vllm.v1.core.block_pool import BlockPool

    return BlockPool(TOTAL, enable_caching=True, hash_block_size=16)


@pytest.fixture
def zone(pool: Any) -> Zone:
    return Zone(pool, Loan(TOTAL))


def lend(zone: Zone, floor: int) -> None:
    zone.aim(floor)
    zone.extend(TOTAL, TOTAL)
    zone.extend(0, 0)


def test_blocks_are_lent_by_the_call_after_the_one_that_took_them(pool: Any, zone: Zone) -> None:
    zone.aim(20)
    zone.extend(10, 10)
    assert (zone.owned, zone.loan.line, pool.get_num_free_blocks()) == (10, TOTAL, TOTAL - 11)
    zone.extend(10, 5)
    assert (zone.owned, zone.loan.line) == (15, TOTAL - 10)


def test_the_line_stays_above_a_block_in_use_and_passes_it_when_it_is_free(pool: Any, zone: Zone) -> None:
    used = pool.get_new_blocks(40)
    pool.free_blocks(used[:-1])  # all but block 40
    lend(zone, 20)
    assert (zone.owned, zone.loan.line) == (29, 41)
    pool.free_blocks(used[-1:])
    zone.extend(TOTAL, TOTAL)
    zone.extend(0, 0)
    assert (zone.owned, zone.loan.line) == (30, 20)


def test_blocks_that_are_not_lent_yet_come_back_first(pool: Any, zone: Zone) -> None:
    pool.touch([pool.blocks[40]])
    lend(zone, 20)
    zone.recall(5)
    assert (zone.loan.line, zone.collect(TOTAL), zone.owned) == (41, 20, 9)
    zone.recall(4)
    assert (zone.loan.line, zone.collect(TOTAL), zone.owned) == (45, 4, 5)


def test_what_the_borrower_holds_comes_back_when_it_lets_go(pool: Any, zone: Zone) -> None:
    lend(zone, 20)
    assert zone.loan.claim(30)
    zone.recall(25)
    assert (zone.collect(TOTAL), zone.owned) == (10, 20)
    assert not zone.loan.claim(40)
    zone.loan.settle(zone.loan.line)
    assert (zone.collect(TOTAL), zone.owned) == (15, 5)
    assert pool.get_num_free_blocks() == TOTAL - 1 - 5


def test_a_recall_that_is_called_off_lends_what_was_not_back_yet(zone: Zone) -> None:
    lend(zone, 20)
    zone.loan.claim(30)
    zone.aim(40)
    zone.collect(TOTAL)
    zone.aim(20)
    zone.extend(0, 0)
    assert (zone.loan.line, zone.owned) == (30, 20)


def test_blocks_come_back_in_pieces_the_lowest_first(pool: Any, zone: Zone) -> None:
    lend(zone, 20)
    zone.aim(TOTAL)
    assert [zone.collect(12), zone.collect(12), zone.collect(12), zone.collect(12)] == [12, 12, 6, 0]
    assert pool.get_num_free_blocks() == TOTAL - 1
    lend(zone, 20)
    zone.aim(TOTAL)
    zone.collect(TOTAL)
    assert [block.block_id for block in pool.get_new_blocks(3)] == [20, 21, 22]


def test_more_than_the_whole_cache_cannot_be_recalled(zone: Zone) -> None:
    """A line beyond the end could never be vacated."""
    zone.extend(10, 10)
    zone.extend(0, 0)
    assert zone.loan.claim(zone.loan.line)
    zone.aim(zone.loan.total + 7)
    assert (zone.floor, zone.loan.line) == (zone.loan.total, zone.loan.total)
    zone.loan.settle(zone.loan.total)
    assert zone.loan.vacated
