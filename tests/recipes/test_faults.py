"""Whole runs that are killed and whose file operations fail, by seed: a short run of ``bench/faults.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "faults.py"


@pytest.mark.slow
def test_nothing_is_lost_wrong_or_left_behind(tmp_path: Path) -> None:
    report = tmp_path / "faults.json"
    command = [sys.executable, str(BENCH), str(tmp_path / "scratch"), "--kills", "6", "--errors", "6", "--seed", "7"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(BENCH.parent)}
    done = subprocess.run([*command, "--report", str(report)], env=environment, capture_output=True, text=True)
    found: Any = json.loads(report.read_text()) if report.exists() else {"findings": [done.stderr], "counts": {}}
    assert found["findings"] == [] and done.returncode == 0
    met = {row: counts["met"] for row, counts in found["counts"].items()}
    assert met["killed by time"] >= 3 and met["killed at an operation"] >= 3
    assert sum(met[name] for name in ("EIO", "ENOSPC", "EACCES")) >= 6
    assert sum(counts["refused clearly"] for counts in found["counts"].values() if "refused clearly" in counts) > 0
