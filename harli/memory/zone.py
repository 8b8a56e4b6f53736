"""The lendable zone: takes blocks at the top of vLLM's block pool out of requests' reach, and gives them back."""

from __future__ import annotations

from itertools import compress, islice
from typing import TYPE_CHECKING

from harli.memory.loan import Loan

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool


class Zone:
    """Blocks ``[floor, total)``: those that no request uses are owned, and from the loan's line on all are.

    The line cannot pass a block that a request uses. Free blocks below such a block are taken all the
    same, so that no new request gets them and the zone is contiguous again when the old ones have finished.
    Only vLLM's public calls are used: an owned block has lost its prefix-cache hashes and has one reference.
    """

    def __init__(self, pool: BlockPool, loan: Loan) -> None:
        self.loan = loan
        self.floor = loan.total
        """Owned blocks below this one are on their way back to requests."""
        self.owned = 0
        """Blocks out of requests' reach."""
        self._pool = pool
        self._owns = bytearray(loan.total)
        self._looked_at = loan.total

    def aim(self, floor: int) -> None:
        """Let the zone begin at ``floor`` (1 or more, block 0 is vLLM's own). Recalls what is lent below it."""
        self.floor = floor = min(floor, self.loan.total)
        if floor > self.loan.line:
            self.loan.move(floor)

    def recall(self, count: int) -> None:
        """Get ``count`` blocks back: first those that are not lent, then from the line upwards."""
        line = self.loan.line
        lent = self.loan.total - line
        self.aim(line + max(0, count - self.owned + lent))

    def extend(self, count: int, most: int) -> None:
        """Lend what is contiguous by now, and take up to ``most`` of the next ``count`` blocks below it.

        What is taken is lent by the next call at the earliest, when no step is under way that began
        before it was taken.
        """
        loan, floor = self.loan, self.floor
        line = max(self._owns.rfind(0, 0, loan.line) + 1, floor)
        if line < loan.line:
            loan.move(line)
        if most <= 0 or floor >= line:
            return
        if not floor < self._looked_at <= line:
            self._looked_at = line
        begin = max(floor, self._looked_at - count)
        blocks = [block for block in self._pool.blocks[begin : self._looked_at] if not block.ref_cnt][-most:]
        self._looked_at = begin
        if blocks:
            ids = [block.block_id for block in blocks]
            self._pool.evict_blocks(set(ids))
            self._pool.touch(blocks)
            for block_id in ids:
                self._owns[block_id] = 1
            self.owned += len(blocks)

    def collect(self, most: int) -> int:
        """Give requests up to ``most`` owned blocks from below the floor that the borrower does not hold; how many."""
        end = min(self.floor, self.loan.held)
        begin = self._owns.find(1, 0, end)
        if begin < 0:
            return 0
        owned = compress(self._pool.blocks[begin:end], self._owns[begin:end])
        blocks = list(islice(owned, most))
        end = blocks[-1].block_id + 1
        self._owns[begin:end] = bytes(end - begin)
        self._pool.free_blocks(blocks)  # the lowest are used first
        self.owned -= len(blocks)
        return len(blocks)
