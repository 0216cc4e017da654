"""Freed memory is taken again without the system's help."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from opd import memory

FAULTS = """
import resource, sys, torch
from opd.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.ones(1 << 25)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for turn in range(1, 9):  # each a little smaller: aligned blocks are asked for with a little room
    torch.ones((1 << 25) - (turn << 16))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(what: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, what], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="not glibc")
def test_blocks_of_any_size_are_kept() -> None:
    assert page_faults("keep") < 1000 < page_faults("leave")  # 128 MiB are 32768 pages


SMALL_BLOCKS = """
import psutil
from opd.memory import give_back_freed_memory
def resident(): return psutil.Process().memory_info().rss >> 20
before = resident()
blocks = [bytes(600) for _ in range(200_000)]  # too large for Python's own pools
last = bytes(600)  # above them on the heap, and stays
del blocks
held = resident() - before
give_back_freed_memory()
print(held, resident() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="not glibc")
def test_freed_small_blocks_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", SMALL_BLOCKS], capture_output=True, text=True, check=True)
    held, after = map(int, done.stdout.split())
    assert after < 20 < 100 < held  # MiB


def test_without_glibc_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    assert not memory.keep_freed_memory()
    memory.give_back_freed_memory()
