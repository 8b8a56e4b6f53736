"""The arena: pieces lie in lent memory alone, and what it lets go of is clean."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from harli.memory.arena import ALIGNMENT, Arena
from harli.memory.loan import Loan

BLOCKS, PAGE, REGIONS = 10, 1024, 3
CANARY = 0x55
"""Two of them are a finite bfloat16, so a cache full of them stands for keys and values of requests."""
NAN = 0xFF
"""Bytes of this are NaN in every float type."""


@pytest.fixture
def regions() -> list[Tensor]:
    return [torch.full((BLOCKS * PAGE,), CANARY, dtype=torch.uint8) for _ in range(REGIONS)]


@pytest.fixture
def loan() -> Loan:
    return Loan(BLOCKS)


@pytest.fixture
def arena(regions: list[Tensor], loan: Loan) -> Arena:
    return Arena(regions, loan)


def take(arena: Arena, size: int) -> Tensor:
    piece = arena.allocate(size)
    assert piece is not None
    piece.fill_(NAN)
    return piece


def below(regions: list[Tensor], line: int) -> Tensor:
    return torch.stack([region[: line * PAGE] for region in regions])


def test_without_a_loan_there_is_no_memory(arena: Arena) -> None:
    assert arena.free_bytes == 0
    assert arena.allocate(1) is None


def test_pieces_are_aligned_and_apart_and_come_from_the_end_of_every_region(arena: Arena, loan: Loan) -> None:
    loan.move(2)
    pieces = [take(arena, size) for size in (100, 700, 64, 1, 500, 333)]
    assert all(piece.data_ptr() % ALIGNMENT == 0 for piece in pieces)
    spans = sorted((piece.data_ptr(), piece.data_ptr() + piece.numel()) for piece in pieces)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    assert loan.held == BLOCKS - 1  # 600 bytes of each region, which is within its last block


def test_what_is_not_lent_is_never_written(arena: Arena, loan: Loan, regions: list[Tensor]) -> None:
    loan.move(7)
    while (piece := arena.allocate(300)) is not None:
        piece.fill_(NAN)
    assert arena.free_bytes < 300 * REGIONS
    assert arena.peak_bytes == arena.used_bytes > 2 * PAGE * REGIONS
    arena.release()
    assert (below(regions, 7) == CANARY).all()
    assert loan.held == BLOCKS


def test_the_last_pieces_are_freed_first_and_clean(arena: Arena, loan: Loan, regions: list[Tensor]) -> None:
    loan.move(1)
    first = take(arena, 3000)
    mark = arena.mark()
    second = take(arena, 5000)
    assert loan.held == 5
    arena.release(mark)
    assert loan.held == 7
    assert not second.any()
    assert (first == NAN).all()
    arena.release()
    assert not first.any()
    assert arena.used_bytes == 0
    assert arena.peak_bytes >= 8000


def test_nothing_is_taken_below_a_line_that_has_moved_up(arena: Arena, loan: Loan) -> None:
    loan.move(1)
    take(arena, 2 * PAGE)
    assert not loan.move(9)
    assert arena.allocate(PAGE + 1) is None
    assert arena.allocate(PAGE) is not None


def test_blocks_that_are_vacated_hold_no_nan_whatever_the_order_of_events(
    arena: Arena, loan: Loan, regions: list[Tensor]
) -> None:
    rng = random.Random(0)
    marks = []
    freed = 0
    for _ in range(3000):
        event = rng.random()
        if event < 0.5:
            mark = arena.mark()
            if (piece := arena.allocate(rng.randint(1, 2000))) is not None:
                piece.fill_(NAN)
                marks.append(mark)
        elif event < 0.8:
            if marks:
                arena.release(marks.pop())
        elif event < 0.9:
            loan.move(rng.randint(1, BLOCKS))
        else:
            while marks and not loan.vacated:
                arena.release(marks.pop())
                freed += 1
            assert loan.vacated
        assert below(regions, loan.held).view(torch.bfloat16).isfinite().all()
    assert freed > 50


def test_blocks_are_given_back_only_when_the_device_has_cleaned_them(regions: list[Tensor], loan: Loan) -> None:
    seen: list[bool] = []
    arena = Arena(regions, loan, wait=lambda: seen.append(loan.vacated))
    loan.move(0)
    take(arena, PAGE)
    loan.move(BLOCKS)
    arena.release()
    assert seen == [False]
    assert loan.vacated
    arena.release()
    assert seen == [False]  # nothing to clean
