"""What lender and borrower agree on: KV blocks from ``line`` to the end of the cache are lent.

Two threads: the lender (the engine's, at the scheduler's hook) moves the line, the borrower (finetuning's)
claims memory above it and lets go of it between units. Blocks below the line go back to decode only when
``vacated`` says that the borrower holds none of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Loan:
    """Lent blocks ``[line, total)``, and the lowest of them that the borrower uses."""

    def __init__(self, total: int) -> None:
        """``total``: KV blocks of the engine; nothing is lent at first."""
        self.total = total
        self._line = total
        self._held = total
        self._changed = threading.Condition()
        self.on_recall: Callable[[], None] = lambda: None
        """Wakes the borrower when blocks that it holds are recalled."""

    @property
    def line(self) -> int:
        """The first block that is lent; ``total`` when none is."""
        return self._line

    @property
    def held(self) -> int:
        """The borrower uses no block below this one."""
        return self._held

    @property
    def vacated(self) -> bool:
        """The borrower holds nothing below the line."""
        return self._held >= self._line

    # The lender's side

    def move(self, line: int) -> bool:
        """Lend from ``line`` on: downwards to lend more, upwards to recall. Returns ``vacated``."""
        with self._changed:
            self._line = line
        if self.vacated:
            return True
        self.on_recall()
        return False

    def wait_vacated(self, timeout_s: float) -> bool:
        """Wait until the borrower has let go of what was recalled; False if it has not within ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: self.vacated, timeout_s)

    # The borrower's side

    def claim(self, lowest: int) -> bool:
        """Announce the use of blocks from ``lowest`` on, before touching them; False if they are not lent any more."""
        with self._changed:
            if lowest < self._line:
                return False
            self._held = min(self._held, lowest)
            return True

    def settle(self, lowest: int) -> None:
        """Let go of everything below ``lowest``, which is clean: ``total`` lets go of all."""
        with self._changed:
            self._held = max(self._held, lowest)
            self._changed.notify_all()
