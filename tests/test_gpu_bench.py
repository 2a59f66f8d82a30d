"""The script that is run where a GPU is at hand does all that is asked of it; here on a CPU, in shapes as small."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    return importlib.import_module("gpu")


def test_what_is_asked_for(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = script.parse(["--work", str(tmp_path)])
    assert options.parts == ["gptq", "gptaq", "signround", "distil", "attention", "healing", "mixture"]
    assert (options.samples, options.length, str(options.scheme)) == (128, 2048, "w4a16-g128-sym")
    assert options.device == torch.device("cuda")
    assert script.parse(["--work", str(tmp_path), "--parts", "mixture,gptq"]).parts == ["mixture", "gptq"]
    with pytest.raises(SystemExit):
        script.parse(["--work", str(tmp_path), "--parts", "gptq,everything"])
    assert "everything: not one of gptq" in capsys.readouterr().err


@pytest.mark.slow
def test_every_part_runs(script: ModuleType, tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    small = ["--tiny", "--device", "cpu", "--samples", "4", "--length", "64", "--scheme", "w4a16-g64", "--steps", "2"]
    script.main(["--work", str(tmp_path / "work"), *small, "--markdown", str(table)])
    lines = [line.split("|")[1:] for line in table.read_text().splitlines()[2:]]
    times = {line[0].strip(): float(line[1]) for line in lines}
    assert {"gptq", "gptaq", "signround", "rounded", "distil", "healing", "mixture", "eager, 16 tokens"} < times.keys()
    assert not any("failed" in line[-2] for line in lines)
