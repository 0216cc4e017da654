"""What a process does with memory it has freed: one that trains keeps it, a driver gives it back.

glibc gives large blocks, and the free end of its heap, back to the system at once. A training step takes the same
gigabytes again, and gets them page by page, each cleared first: with long sequences that is a quarter of the step.

A tokenizer of a hundred thousand entries is a million small blocks. When it has gone, its part of the heap lies between
others', and glibc does not give it back by itself.

Left out: processes that should shrink when they have let go of something (rollout workers, hosts of teachers).
"""

from __future__ import annotations

import contextlib
import ctypes

# Parameters of mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
NEVER = (1 << 31) - 1  # the largest number that mallopt takes


def keep_freed_memory() -> bool:
    """From now on freed CPU memory stays with this process, whose resident size therefore stays at its peak. Says
    whether the C library can do it; those that are not glibc cannot, and nothing changes."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, NEVER)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))


def give_back_freed_memory() -> None:
    """What lies free in the heap goes back to the system, which takes as long as the heap is large: milliseconds. Does
    nothing where the C library is not glibc."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
