"""The table of runtimes: what it names exists, and README shows it as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmconvert.quantize.formats.base import FORMATS, load_format
from llmconvert.quantize.runtimes import RUNTIMES, TESTED, Pair, markdown_table, pairs, runtimes_of

ROOT = Path(__file__).parent.parent.parent


def test_readme_shows_the_table() -> None:
    readme = (ROOT / "README.md").read_text()
    match = re.search(r"<!-- runtimes -->\n(.*?)\n<!-- /runtimes -->", readme, re.DOTALL)
    assert match is not None and match[1] == markdown_table()
    assert f"Run on {TESTED}" in readme


@pytest.mark.parametrize("pair", pairs(), ids=lambda pair: f"{pair.runtime.format}-{pair.scheme}")
def test_formats_hold_what_the_table_says(pair: Pair) -> None:
    load_format(pair.runtime.format).check(pair.scheme)


def test_every_format_of_directories_has_a_runtime() -> None:
    for name in ("compressed-tensors", "gptq", "awq", "bitsandbytes"):
        assert name in FORMATS and runtimes_of(name)


def test_readme_shows_what_the_tests_run() -> None:
    """The two lines for each runtime are those of the script that the readers' tests start, but for the directory."""
    readme = (ROOT / "README.md").read_text()
    for name in {runtime.script for runtime in RUNTIMES}:
        script = (ROOT / "tests" / "readers" / "runtimes" / f"run_{name}.py").read_text()
        call = re.search(r"= (\w+(?:\.\w+)?)\((?:model=)?directory", script)
        assert call is not None
        lines = re.search(rf"(from \S+ import {call[1].split('.')[0]})\n+\w+ = {re.escape(call[1])}\(", readme)
        assert lines is not None, name
        assert re.search(rf"from {lines[1].split()[1]} import .*{call[1].split('.')[0]}", script), name
