"""Freed memory is taken again without the system's help, or given back to it, as the process's work asks."""

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


HOLES = """
import sys
from pathlib import Path
from opd import memory

def resident():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024

if sys.argv[1] == "keep":
    assert memory.keep_freed_memory()
blocks = [bytes(20000) for _ in range(5000)]  # of the heap; the last one holds the others up
last = blocks.pop()
before = resident()
del blocks
assert resident() > before - (20 << 20)
assert memory.give_back_freed_memory() is (sys.argv[1] != "keep")
print(before - resident())
"""


def page_faults(what: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, what], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="not glibc")
def test_blocks_of_any_size_are_kept() -> None:
    assert page_faults("keep") < 1000 < page_faults("leave")  # 128 MiB are 32768 pages


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="not glibc")
@pytest.mark.parametrize("what", ["keep", "leave"])
def test_holes_between_blocks_are_given_back_unless_they_are_kept(what: str) -> None:
    done = subprocess.run([sys.executable, "-c", HOLES, what], capture_output=True, text=True, check=True)
    given_back = int(done.stdout)
    assert given_back > 80 << 20 if what == "leave" else given_back < 20 << 20


def test_without_glibc_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    assert not memory.keep_freed_memory() and not memory.give_back_freed_memory()
