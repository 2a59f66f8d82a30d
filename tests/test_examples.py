"""The examples, run on a tiny model as they stand."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(
    script: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path), str(tiny_llama)])
    runpy.run_path(str(script), run_name="__main__")
    *_, last = capsys.readouterr().out.splitlines()
    page = Path(last.split(": ")[1])
    assert page.parent == tmp_path and "<svg" in page.read_text()
