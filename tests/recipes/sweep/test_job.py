"""Sweeps over the tiny model: shared work, the same artifacts as alone, killed and continued, picked and published."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmconvert.cli.summary import print_batch
from llmconvert.errors import RecipeError
from llmconvert.progress import SILENT
from llmconvert.recipes.batch.run import run_batch
from llmconvert.recipes.loading import load_recipe
from llmconvert.recipes.runner import RunResult, run_recipe
from llmconvert.recipes.sweep.expand import load_sweep
from llmconvert.recipes.sweep.job import run_sweep, with_statistics
from llmconvert.recipes.sweep.result import SweepResult
from llmconvert.report.report import Check


class Log:
    """Progress whose lines are kept."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)

    def task(self, description: str, total: float) -> Any:
        return SILENT.task(description, total)


def made_of(result: RunResult) -> tuple[bytes, tuple[Check, ...]]:
    return weights(result.artifact), result.report.checks


MATRIX = {
    "quantize.method": ["gptq", "gptaq", "rtn"],
    "quantize.scheme": ["w4a16-g32", "w8a16-g32", "w4a16-g48"],
    "exclude": [
        {"quantize.method": "gptaq", "quantize.scheme": "w8a16-g32"},
        {"quantize.method": "gptaq", "quantize.scheme": "w4a16-g48"},
        {"quantize.method": "rtn", "quantize.scheme": "w4a16-g48"},
    ],
}


def swept(path: Path, log: Any) -> SweepResult:
    sweep = load_sweep(path)
    assert sweep is not None
    return run_sweep(sweep, progress=log)


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def test_variants_share_a_pass_are_compared_and_one_is_published(
    write_recipe: Any, tmp_path: Path, texts: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate = {"dataset": str(texts[0]), "samples": 4, "length": 64}
    path = write_recipe(
        "many",
        matrix=MATRIX,
        pick="smallest within 300%",
        calibrate=calibrate,
        publish={"to": f"file:{tmp_path / 'best'}"},
    )
    log = Log()
    result = swept(path, log)
    names = ["many-gptq-w4a16-g32", "many-gptq-w8a16-g32", "many-gptaq-w4a16-g32", "many-rtn-w4a16-g32"]
    assert list(result.results) == [*names, "many-rtn-w8a16-g32"]
    assert list(result.failures) == ["many-gptq-w4a16-g48"]
    assert "does not divide" in str(result.failures["many-gptq-w4a16-g48"])
    together = [line for line in log.lines if "quantized in one pass" in line]
    assert len(together) == 1 and "many-gptq-w8a16-g32" in together[0] and "gptaq" not in together[0]
    assert sum(line.startswith("convert: done") for line in log.lines) == 1
    compared = [line for line in log.lines if "compared with the original in one pass" in line]
    assert len(compared) == 1 and all(name in compared[0] for name in names)

    # Each is what it is alone, and says what it was made from.
    for name, statistics in (("many-gptq-w4a16-g32", "original"), ("many-gptaq-w4a16-g32", "sequential")):
        settings = {"method": name.split("-")[1], "scheme": "w4a16-g32"}
        alone = write_recipe(
            "alone",
            quantize=settings,
            work_dir=str(tmp_path / "other"),
            calibrate={**calibrate, "statistics": statistics},
        )
        made = run_recipe(load_recipe(alone))
        assert weights(made.artifact) == weights(result.results[name].artifact)
        assert made.report.checks == result.reports[name].checks
        said = result.reports[name].model.calibration or ""
        assert said.endswith("activations of the original") == (statistics == "original")

    # The smallest, and of these the best, is published.
    sizes = {name: one["size_bytes"].value or 0 for name, one in result.reports.items()}
    assert result.picked is not None and sizes[result.picked] == min(sizes.values())
    assert weights(tmp_path / "best") == weights(result.results[result.picked].artifact)
    assert result.page is not None
    page, summary = result.page.read_text(), json.loads((result.page.parent / "summary.json").read_text())
    assert "Left out: many-gptq-w4a16-g48: scheme" in page and result.picked in page
    assert "does not divide" in summary["variants"]["many-gptq-w4a16-g48"]["left_out"]
    assert summary["picked"] == result.picked and summary["variants"][result.picked]["measured"]["perplexity"] > 1
    links = [line.split('"')[1] for line in page.split("<a href=")[1:]]
    assert len(links) == len(result.reports) and all((result.page.parent / link).is_file() for link in links)

    # Once more, nothing is done again; and as one of a batch it shows a line for each.
    log = Log()
    outcomes = run_batch([str(path)], progress=log)
    assert not any("done in" in line for line in log.lines)
    assert [(outcome.exit_code, outcome.left_out) for outcome in outcomes] == [(0, number == 2) for number in range(6)]
    print_batch(outcomes)
    shown = capsys.readouterr().out
    assert "taken" in shown and "side by side" in shown and shown.count("left out: many-gptq-w4a16-g48: scheme") == 1
    assert "failed" not in shown and "many-gptaq-w4a16-g32" in shown


@pytest.mark.slow
def test_killed_anywhere_it_continues_to_the_same_bytes(write_recipe: Any, tmp_path: Path) -> None:
    matrix = {"quantize.method": ["gptq"], "quantize.scheme": ["w4a16-g32", "w8a16-g32", "w3a16-g32"]}
    whole = write_recipe("whole", matrix=matrix, work_dir=str(tmp_path / "whole"))
    path = write_recipe("killed", matrix=matrix)
    begin = time.monotonic()
    expected = {name.split("-", 1)[1]: made_of(one) for name, one in swept(whole, Log()).results.items()}
    took = time.monotonic() - begin
    command = [sys.executable, "-P", "-m", "llmconvert.cli", "run", str(path)]
    for share in (0.3, 0.7, 1.0):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(5 + took * share)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    result = swept(path, Log())
    assert not result.failures
    assert {name.split("-", 1)[1]: made_of(one) for name, one in result.results.items()} == expected


def test_a_caches_scales_are_taken_sequentially(write_recipe: Any, texts: tuple[Path, Path]) -> None:
    calibrate = {"dataset": str(texts[0]), "samples": 4, "length": 64}
    quantize = {"method": "gptq", "scheme": "w4a16-g32", "kv_cache": "fp8"}
    kept = with_statistics(load_recipe(write_recipe("cached", quantize=quantize, calibrate=calibrate)))
    assert kept.calibrate is not None and kept.calibrate.statistics == "sequential"
    asked = write_recipe("asked", quantize=quantize, calibrate={**calibrate, "statistics": "original"})
    with pytest.raises(RecipeError, match=r"calibrate\.statistics: a cache's scales .* are taken sequentially"):
        load_recipe(asked)
