"""Peak memory of a piece of work: exact when it sets a new mark, sampled when it doesn't."""

from __future__ import annotations

import time
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmconvert.memory import PeakMemory, row_slices, rows_at_once

SIZE = 96 << 20
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def test_a_new_mark_is_exact() -> None:
    before = resident("VmRSS")
    size = resident("VmHWM") - before + SIZE
    with PeakMemory() as peak:
        numpy.ones(size, dtype=numpy.uint8)
    assert peak.method == "exact"
    assert before + 0.9 * size <= peak.nbytes <= before + size + (32 << 20)


def test_below_the_mark_it_is_sampled() -> None:
    numpy.ones(4 * SIZE, dtype=numpy.uint8)
    before = resident("VmRSS")
    with PeakMemory() as peak:
        held = numpy.ones(SIZE, dtype=numpy.uint8)
        time.sleep(0.3)
        del held
    assert peak.method == "sampled"
    assert before + 0.9 * SIZE <= peak.nbytes < before + 2 * SIZE


@given(rows=st.integers(0, 50), width=st.integers(0, 9), limit=st.integers(1, 60), together=st.integers(1, 4))
def test_slices_are_all_rows_in_order_and_within_the_limit(rows: int, width: int, limit: int, together: int) -> None:
    slices = list(row_slices((rows, width), limit, together=together))
    assert [row for part in slices for row in range(part.start, part.stop)] == list(range(rows))
    for part in slices:
        taken = part.stop - part.start
        assert 0 < taken <= max(1, rows_at_once(rows, width, limit, together=together))
        assert taken * width <= limit or taken <= together
        assert part.start % together == 0
