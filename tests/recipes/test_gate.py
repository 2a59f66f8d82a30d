"""The gate: a limit missed ends with exit code 3, publishes nothing, keeps the artifact and names the layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llmconvert.cli import main


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ("validate.perplexity.max_increase=0%", "perplexity rose by"),
        ("validate.max_kl=1e-9", "nats per token on average, allowed are 1e-09"),
        ("validate.min_top1=100%", "of the most likely next tokens are the original's, required are 100 %"),
        ("validate.max_bytes=1kB", "allowed are 1,000"),
    ],
)
def test_every_limit_can_close_it(write_recipe: Any, tmp_path: Path, limit: str, reason: str) -> None:
    # Two bits, so that every number gets worse even on a random model.
    recipe = write_recipe(quantize={"method": "rtn", "scheme": "w2a16-g32"}, publish={"to": f"file:{tmp_path}/out"})
    result = CliRunner().invoke(main, ["run", str(recipe), "--set", limit])
    assert result.exit_code == 3, result.output
    assert reason in result.output and not (tmp_path / "out").exists()
    artifact = Path(result.output.rsplit("the artifact is in ", 1)[1].strip().replace("\n", ""))
    report = json.loads((artifact / "llmconvert" / "report.json").read_text())
    assert [check["ok"] for check in report["checks"]].count(False) == 1
    assert (artifact / "README.md").is_file() and (artifact / "model.safetensors").is_file()
    assert ("To blame: the blocks that err most by themselves are model.layers." in result.output) == (
        "max_bytes" not in limit
    )


def test_calibrated_methods_are_blamed_by_their_output_errors(write_recipe: Any) -> None:
    recipe = write_recipe(quantize={"method": "gptq", "scheme": "w2a16-g32"})
    result = CliRunner().invoke(main, ["run", str(recipe), "--set", "validate.max_kl=1e-9"])
    assert (
        result.exit_code == 3 and "the largest errors of a linear's output are those of model.layers." in result.output
    )
