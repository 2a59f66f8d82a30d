"""Folders for the tests of formats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Hypothesis runs many examples in one test; each makes a folder of its own below this one."""
    return iter(tmp_path_factory.mktemp("example") / str(index) for index in range(10_000))
