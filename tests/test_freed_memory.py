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
