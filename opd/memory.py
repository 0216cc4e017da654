"""What a process does with memory it has freed: one that trains keeps it, one that only judges gives it back.

glibc gives large blocks, and the free end of its heap, back to the system at once. A training step takes the same
gigabytes again, and gets them page by page, each cleared first: with long sequences that is a quarter of the step.
Small blocks it never gives back as long as one above them is in use. A process that loads one model after another is
left with the holes of all of them: of forty teachers, more than the weights of one.

A tokenizer of a hundred thousand entries is such blocks too, a million of them.

Left out: when (`opd.learner`, `teachers.shelf`).
"""

from __future__ import annotations

import ctypes

# Parameters of mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
NEVER = (1 << 31) - 1  # the largest number that mallopt takes

_keeps = False  # malloc's settings are the process's, and cannot be asked for


def keep_freed_memory() -> bool:
    """From now on freed CPU memory stays with this process, whose resident size therefore stays at its peak. Says
    whether the C library can do it; those that are not glibc cannot, and nothing changes."""
    global _keeps
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    _keeps = bool(mallopt(M_MMAP_THRESHOLD, NEVER)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
    return _keeps


def give_back_freed_memory() -> bool:
    """Every whole page that is free goes back to the system now. Does nothing in a process that keeps its freed memory,
    such as one that trains and hosts teachers too. Says whether the C library was asked; only glibc can be."""
    if _keeps:
        return False
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        return False
    return True
