"""The kernels for GPUs do what their plain torch counterparts do, without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "support" / "interpreted_kernels.py"
#: Where the Makefile puts Triton.
APART = Path(sys.prefix) / "triton"


@pytest.mark.skipif(not APART.exists() and importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_agree_with_torch() -> None:
    path = os.pathsep.join((str(APART), str(SCRIPT.parents[1])))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    found = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["solve_columns"] * 3 + ["descend_columns"] * 3
