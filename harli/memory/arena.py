"""Memory carved out of lent KV blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from harli.memory.loan import Loan

ALIGNMENT = 64
"""Bytes; a cache line, and the widest vector register of a CPU."""

Mark = tuple[int, ...]
"""How far an arena was filled: per region, the offset from which on bytes are in use."""


class Arena:
    """A stack of pieces that grows from the end of the cache downwards, evenly over the cache's regions.

    So the blocks that are recalled first are used last, and what was allocated last is freed first. Free
    bytes read as zero once they have been used: a value left in a block could be NaN, which attention would
    carry into a request's output. For the finetuning thread alone.
    """

    def __init__(self, regions: Sequence[Tensor], loan: Loan, wait: Callable[[], None] = lambda: None) -> None:
        """``regions``: as ``layout.block_regions`` returns them, of ``loan.total`` blocks.

        ``wait`` returns when the device has done what the calling thread gave it.
        """
        self._wait = wait
        self.loan = loan
        self.peak_bytes = 0
        """Most bytes in use at a time."""
        self._regions = regions
        self._bases = [region.data_ptr() for region in regions]
        self._end = regions[0].numel()
        self._page = self._end // loan.total
        self._tops = [self._end] * len(regions)

    @property
    def used_bytes(self) -> int:
        return self._end * len(self._tops) - sum(self._tops)

    @property
    def free_bytes(self) -> int:
        """Lent and not in use; a single piece has to fit into one region."""
        floor = self.loan.line * self._page
        return sum(max(0, top - floor) for top in self._tops)

    def mark(self) -> Mark:
        """The present filling, to go back to with ``release``."""
        return tuple(self._tops)

    def allocate(self, size: int) -> Tensor | None:
        """``size`` bytes, uint8 and aligned, in lent memory; None if they do not fit (any more)."""
        tops, loan = self._tops, self.loan
        region = max(range(len(tops)), key=tops.__getitem__)
        base = self._bases[region]
        begin = (base + tops[region] - size) // ALIGNMENT * ALIGNMENT - base
        block = begin // self._page
        if block < loan.line or (block < loan.held and not loan.claim(block)):
            return None
        tops[region] = begin
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return self._regions[region][begin : begin + size]

    def release(self, mark: Mark | None = None) -> None:
        """Clean what was allocated since ``mark`` (all of it without one) and let go of its blocks."""
        ends = [self._end] * len(self._tops) if mark is None else list(mark)
        if self._tops != ends:
            for region, top, end in zip(self._regions, self._tops, ends, strict=True):
                if top < end:
                    region[top:end].zero_()
            self._wait()  # a block is clean only then
        self._tops = ends
        self.loan.settle(min(ends) // self._page)
