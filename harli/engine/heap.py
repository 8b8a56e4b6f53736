"""Memory that was freed and that the C library keeps for itself."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """Give it back to the system (glibc's ``malloc_trim``, of milliseconds; the GIL is free meanwhile).

    A training job leaves a heap with many holes, and the next one, of another size, does not fit into all of them, so
    that a server's resident memory would rise from job to job.
    """
    ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
