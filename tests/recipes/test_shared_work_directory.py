"""Runs at once over one work directory: each stage is built once, by whoever comes first, and all end right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SHARED = {"convert", "calibrate", "evaluation-text"}


def start(recipe: Path, work: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llmconvert.cli", "run", str(recipe), "--work-dir", str(work)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=_ENVIRONMENT)


def weights(work: Path) -> list[bytes]:
    return sorted(path.read_bytes() for path in work.glob("artifact-*/model/model.safetensors"))


def built(work: Path) -> list[str]:
    return sorted(path.name.rpartition("-")[0] for path in work.iterdir() if path.name != "runs")


def test_two_recipes_and_one_of_them_twice(write_recipe: Any, tmp_path: Path) -> None:
    schemes = {"one": "w4a16-g32", "two": "w8a16-g32"}
    recipes = {
        name: write_recipe(name, quantize={"method": "gptq", "scheme": scheme}) for name, scheme in schemes.items()
    }
    expected = []
    for name, recipe in recipes.items():
        with start(recipe, tmp_path / name) as process:
            errors = process.communicate()[1]
        assert process.returncode == 0, errors
        expected += weights(tmp_path / name)
    work = tmp_path / "work"
    running = [start(recipes[name], work) for name in ("one", "two", "one")]
    logs = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], logs
    assert weights(work) == sorted(expected)
    stages = built(work)
    assert {name for name in stages if stages.count(name) == 1} == SHARED
    assert {name for name in stages if stages.count(name) == 2} == {"quantize", "validate", "artifact"}
    for name in SHARED:
        said = [any(line.startswith(f"{name}: done in") for line in log.splitlines()) for log in logs]
        assert said.count(True) == 1, f"{name} was built once"
        assert sum(f"{name}: unchanged, reusing" in log for log in logs) == 2
