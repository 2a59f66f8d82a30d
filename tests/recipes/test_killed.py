"""Runs killed without warning: the same command continues and ends with the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny_models import tiny_llama_dir

from llmconvert.storage.stage_record import STAGE_FILE

pytestmark = pytest.mark.slow
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deep enough that quantization can be met in its midst."""
    return tiny_llama_dir(tmp_path_factory.mktemp("deep") / "llama", num_hidden_layers=8)


def command(recipe: Path, work: Path) -> list[str]:
    return [sys.executable, "-m", "llmconvert.cli", "run", str(recipe), "--work-dir", str(work)]


def finish(recipe: Path, work: Path) -> str:
    done = subprocess.run(command(recipe, work), capture_output=True, text=True, env=_ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stderr


def kill_when(recipe: Path, work: Path, ready: Any, delay: float = 0) -> bool:
    """Start a run and kill it ``delay`` seconds after ``ready()``; False if it ended before."""
    with subprocess.Popen(
        command(recipe, work), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_ENVIRONMENT
    ) as process:
        while process.poll() is None and not ready():
            time.sleep(0.002)
        time.sleep(delay)
        ended = process.poll() is not None
        process.kill()
    return not ended


def stages(work: Path) -> dict[str, int]:
    """Finished stage → when it was finished, in nanoseconds."""
    found = work.glob(f"*/{STAGE_FILE}") if work.exists() else ()
    return {path.parent.name.rpartition("-")[0]: path.stat().st_mtime_ns for path in found}


def kl_and_repair(work: Path) -> tuple[float, list[Any]]:
    """The artifact's divergence, and what its repair changed."""
    (report,) = work.glob("artifact-*/model/llmconvert/report.json")
    checks = {check["name"]: check for check in json.loads(report.read_text())["checks"]}
    return checks["kl_mean"]["value"], checks["repair"]["detail"]["changes"] if "repair" in checks else []


def artifact(work: Path) -> dict[str, bytes]:
    (directory,) = work.glob("artifact-*/model")
    return {name: (directory / name).read_bytes() for name in ("model.safetensors", "config.json", "tokenizer.json")}


def test_killed_in_the_midst_of_quantization(write_recipe: Any, model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(model=str(model), validate=None)
    finish(recipe, tmp_path / "whole")
    work = tmp_path / "work"

    def three_blocks_done() -> bool:
        journals = list(work.glob(".quantize-*.partial/.model.partial/.work/journal.jsonl"))
        return bool(journals) and journals[0].read_text().count('"block ') >= 3

    assert kill_when(recipe, work, three_blocks_done)
    before = stages(work)
    assert set(before) == {"convert", "calibrate"}
    log = finish(recipe, work)
    after = stages(work)
    assert "convert: unchanged, reusing" in log and "quantize: was interrupted, continuing" in log
    assert "continuing an interrupted run: " in log
    assert {name: after[name] for name in before} == before
    assert artifact(work) == artifact(tmp_path / "whole")


def test_killed_in_the_midst_of_repair(write_recipe: Any, model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": str(model), "quantize": {"method": "gptq", "scheme": "w2a16-g32"}}
    finish(write_recipe(**settings), tmp_path / "broken")
    broken, _ = kl_and_repair(tmp_path / "broken")
    text = yaml.safe_load(write_recipe().read_text())["validate"]["perplexity"]
    # Two rounds or more: the choice of the second rests on what the first reported.
    recipe = write_recipe(**settings, validate={"perplexity": text, "max_kl": broken / 3, "repair": True})
    finish(recipe, tmp_path / "whole")
    _, expected = kl_and_repair(tmp_path / "whole")
    work = tmp_path / "work"

    def some_blocks_done() -> bool:
        journals = list(work.glob(".repair-1-*.partial/.model.partial/.work/.changed.partial/.work/journal.jsonl"))
        return bool(journals) and journals[0].read_text().count('"block ') >= 3

    assert kill_when(recipe, work, some_blocks_done)
    assert set(stages(work)) == {"convert", "calibrate", "evaluation-text", "quantize", "validate"}
    # Again, when the parts are about to be put together, if that is slow enough to be met.
    kill_when(recipe, work, lambda: bool(list(work.glob(".repair-1-*.partial/.model.partial/.work/changed"))))
    log = finish(recipe, work)
    assert "repair-1: was interrupted, continuing" in log or "repair-1: unchanged, reusing" in log
    assert artifact(work) == artifact(tmp_path / "whole") != artifact(tmp_path / "broken")
    assert kl_and_repair(work)[1] == expected
    assert not list(work.glob(".*.partial"))
