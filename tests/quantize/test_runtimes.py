"""The table of runtimes: what it names exists and was run."""

from __future__ import annotations

import pytest

from llmconvert.quantize.catalog.formats import FORMATS
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.matrix import check_format
from llmconvert.quantize.runtimes import RUNTIMES, Pair, pairs, recorded_runs, runtimes_of


def test_every_row_was_run() -> None:
    assert set(recorded_runs()) == {runtime.key for runtime in RUNTIMES}
    for runtime in RUNTIMES:
        assert set(recorded_runs()[runtime.key].versions) == set(runtime.packages)


@pytest.mark.parametrize("pair", pairs(), ids=lambda pair: f"{pair.runtime.format}-{pair.scheme}")
def test_formats_hold_what_the_table_says(pair: Pair) -> None:
    check_format(load_format(pair.runtime.format), pair.scheme)


def test_every_format_has_a_runtime() -> None:
    assert all(runtimes_of(name) for name in FORMATS)
