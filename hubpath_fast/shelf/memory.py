"""Memory that is freed at every step and asked for again at the next.

A step on features writes a gradient for each expert with rows: 52 MB at 256 experts with heads of
100 x 512. They are freed before the next step, and glibc then gives the top of its heap back to the
system, which hands it out again page by page: 15,000 page faults a step took longer than the rest
of it.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT = 2**30  # bytes at the top of the heap that stay with the process
LARGEST = 2**25  # the largest block that comes from the heap; glibc allows no more


def keep_freed_memory() -> bool:
    """Has the process keep what it frees, for as long as it lives; whether the C library can."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # of another C library than glibc
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT) and mallopt(M_MMAP_THRESHOLD, LARGEST))
