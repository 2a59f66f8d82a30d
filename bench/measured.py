"""Running a program and learning what it cost: wall-clock time, and the peak memory the kernel recorded for it.

A child inherits its parent's memory mark at ``exec``, so whoever measures has to stay small: nothing here, and nothing
in the scripts that use it, imports torch.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cost", "markdown_table", "megabytes", "run_measured"]


@dataclass(frozen=True, slots=True)
class Cost:
    """Wall-clock seconds of a whole process, start-up included, its peak resident bytes and CPU seconds (``wait4``)."""

    seconds: float
    peak_rss: int
    cpu: float = 0.0


def run_measured(command: Sequence[str | Path], *, threads: int, log: Path, extra: Mapping[str, str] = {}) -> Cost:
    """Run a command to its end; what it prints goes to ``log``.

    Raises:
        SystemExit: it failed; shows the end of its output.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), **extra}
    begin = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=output, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = log.read_text(errors="replace")[-3000:]
        raise SystemExit(f"{' '.join(map(str, command))}\nfailed with {process.returncode}:\n{tail}")
    return Cost(seconds, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime)


def megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.0f} MB"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        _line(header, widths),
        "|" + "|".join(("-" * (w + 1)) + ("-" if not i else ":") for i, w in enumerate(widths)) + "|",
    ]
    return "\n".join(lines + [_line(row, widths) for row in rows])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (
        cell.ljust(width) if not i else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "| " + " | ".join(padded) + " |"
