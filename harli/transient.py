"""Errors of the machine rather than of a job: they pass, so what met one is tried again."""

from __future__ import annotations

import errno

TRANSIENT = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO}


def is_transient(error: BaseException | None) -> bool:
    """Whether ``error``, or what led to it, is such an error: libraries wrap theirs, with or without a cause."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in TRANSIENT):
            return True
        error = error.__cause__ or error.__context__
    return False
