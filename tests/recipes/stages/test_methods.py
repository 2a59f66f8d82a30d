"""Recipes whose methods change more than linears: scales moved to norms, rotations of the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llmconvert.cli import main
from llmconvert.storage.checkpoint import SafetensorsCheckpoint


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "awq", "options": {"then": "gptq", "grid": 5}, "scheme": "w8a16-g32"},
        {"method": "smoothquant", "scheme": "w8a8"},
        {"method": "gptq", "scheme": "w8a16-g32", "rotate": True},
        {"method": "rtn", "scheme": "w8a16-g32", "rotate": {"residual": False, "seed": 3}},
    ],
    ids=["awq", "smoothquant", "rotated", "rotated values"],
)
def test_the_artifact_predicts_what_the_original_does(
    write_recipe: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """At 8 bits, whatever was folded wrong would show."""
    recipe = write_recipe(quantize=settings, publish={"to": f"file:{tmp_path}/out"})
    done = CliRunner().invoke(main, ["run", str(recipe)])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "llmconvert" / "report.json").read_text())
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["kl_mean"]["value"] < 2e-3 and checks["inventory"]["ok"]
    with SafetensorsCheckpoint(tmp_path / "out") as artifact:
        rotated = settings.get("rotate") is True
        assert ("lm_head.weight" in artifact) == rotated
        assert artifact.config["tie_word_embeddings"] is not rotated


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"quantize": {"method": "rtn", "scheme": "w4a16", "rotate": True}, "calibrate": None, "stream": True},
            "whole",
        ),
        ({"quantize": {"method": "rtn", "scheme": "q8_0", "format": "gguf", "rotate": True}}, "never seen to run"),
        ({"quantize": {"method": "awq", "scheme": "w4a16", "options": {"then": "rtn"}}}, "then is nearest or gptq"),
        (
            {"quantize": {"method": "rtn", "scheme": "w4a16-asym", "budget": {"bits_per_weight": 5}}},
            "can't load asymmetric weights of several schemes",
        ),
        (
            {
                "quantize": {
                    "method": "rtn",
                    "scheme": "w4a16-g32",
                    "overrides": [{"match": "*.v_proj", "scheme": "w8a16-g32-asym"}],
                }
            },
            "can't load asymmetric weights of several schemes",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(write_recipe: Any, sections: dict[str, Any], message: str) -> None:
    done = CliRunner().invoke(main, ["run", str(write_recipe(**sections))])
    assert done.exit_code == 2 and message in " ".join(done.output.split())


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "gptq"},
        {"method": "awq", "options": {"grid": 5}},
        {"method": "rtn", "rotate": True},
    ],
    ids=["gptq", "awq", "rotated"],
)
def test_what_a_budget_chose_outlasts_a_kill(write_recipe: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Killed after the artifact and before its stage was recorded: the report says the same as an uninterrupted one."""
    budget = {"bits_per_weight": 5.5, "group_sizes": [16, 32]}
    recipe = write_recipe(quantize={**settings, "budget": budget}, publish={"to": f"file:{tmp_path}/out"})
    report = tmp_path / "out" / "llmconvert" / "report.json"
    steps = []
    for _ in range(2):
        done = CliRunner().invoke(main, ["run", str(recipe)])
        assert done.exit_code == 0, done.output
        (step,) = [step for step in json.loads(report.read_text())["steps"] if step["name"] == "quantize"]
        steps.append(step)
        (stage,) = (tmp_path / "work").glob("quantize-*")
        (stage / "stage.json").unlink()
        left = stage / ".model.sensitivity"
        assert not left.exists()
        left.mkdir()
    first, second = (step["details"] for step in steps)
    assert first["budget"] == second["budget"] and first["linears"] == second["linears"]
    assert steps[0]["sections"] == steps[1]["sections"] and steps[0]["sections"][0]["name"] == "budget"
    assert 4 < first["budget"]["bits_per_weight"] <= 5.5
    assert len({linear["scheme"] for linear in first["linears"]}) > 1
