"""Peak memory of a piece of Python, seen from outside as that of a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

__all__ = ["on_linux", "peak"]

#: Where a process's peak is given in kilobytes.
on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident sizes are in other units")

# A process begins with the peak of the one that it was forked from, which here may hold a model: one lies in between.
_WATCH = """
import os, subprocess, sys
process = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss * 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def peak(program: str, *arguments: str) -> list[int]:
    """The numbers that a program prints, and last the peak resident bytes of the process that ran it."""
    command = [sys.executable, "-c", _WATCH, program, *arguments]
    return [int(line) for line in subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()]
