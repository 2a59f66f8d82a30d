"""Freed tensors leave the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys
import torch
from llmconvert.memory import map_large_tensors, release_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

large = sys.argv[1] == "large"
size = (2 << 20) if large else 100_000
assert not large or map_large_tensors()
before = resident()
# What is kept between the pieces that go would hold the heap up.
kept, freed = [], []
for index in range(200):
    freed.append(torch.ones(size, dtype=torch.uint8))
    kept.append(torch.ones(64, dtype=torch.uint8))
full = resident()
freed.clear()
assert large or release_freed_memory()
assert full - before > 150 * size, (before, full)
assert resident() - before < 40 * size, (before, full, resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="settings of glibc")
@pytest.mark.parametrize("kind", ["large", "small"])
def test_freed_tensors_leave_the_process(kind: str) -> None:
    """In a process of its own: the setting stays for as long as a process lives."""
    subprocess.run([sys.executable, "-c", PROGRAM, kind], check=True)


KEEPING = """
import torch
from llmconvert.memory import keeping_freed_memory, map_large_tensors, release_freed_memory, resident_nbytes

SIZE, COUNT = 2 << 20, 60
map_large_tensors()

def come_and_go():
    before = resident_nbytes()
    freed = [torch.ones(SIZE, dtype=torch.uint8) for _ in range(COUNT)]
    assert resident_nbytes() - before > 0.9 * SIZE * COUNT
    del freed
    return resident_nbytes() - before

def kept(allowed):
    with keeping_freed_memory(allowed):
        left = come_and_go()
        inside = release_freed_memory()
    return left > 0.9 * SIZE * COUNT, inside

assert come_and_go() < SIZE
before = resident_nbytes()
assert kept(before + 2 * SIZE * COUNT) == (True, False)
assert resident_nbytes() - before < SIZE * COUNT // 4, "it goes when the work is done"
assert kept(before + SIZE) == (True, True), "what is above goes when it is looked for"
kept(0)
assert resident_nbytes() - before < SIZE * COUNT // 4, "holes that the heap has left may be filled, but are given back"
with keeping_freed_memory(before + 2 * SIZE * COUNT):
    assert kept(before + SIZE) == (True, True)
    assert come_and_go() > 0.9 * SIZE * COUNT and not release_freed_memory(), "the outer one counts again"
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="settings of glibc")
def test_freed_tensors_stay_where_that_is_allowed() -> None:
    subprocess.run([sys.executable, "-c", KEEPING], check=True)
