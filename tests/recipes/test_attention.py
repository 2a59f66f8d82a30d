"""The attention section of a recipe, whole and by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llmconvert.checkpoint import SafetensorsCheckpoint
from llmconvert.cli import main
from llmconvert.errors import UnsupportedError
from llmconvert.recipes.loading import load_recipe
from llmconvert.recipes.runner import run_recipe


def test_merging_and_quantizing_in_one_run(write_recipe: Any) -> None:
    recipe = load_recipe(write_recipe(attention={"kv_heads": 1}))
    result = run_recipe(recipe)
    with SafetensorsCheckpoint(result.artifact) as checkpoint:
        assert checkpoint.config["num_key_value_heads"] == 1
        assert checkpoint.config["quantization_config"]["quant_method"] == "compressed-tensors"
        assert checkpoint.infos["model.layers.0.self_attn.k_proj.weight_shape"].shape == (2,)
    steps = {step.name: step.model_dump() for step in result.report.steps}
    layers = steps["attention"]["details"]["layers"]
    assert len(layers) == 2 and all(0 < layer["output_loss"] < 1 for layer in layers)
    assert steps["attention"]["details"]["kv_bytes_per_token"] == [256, 128]
    assert run_recipe(recipe).report == result.report  # nothing was done again


def test_merging_alone(write_recipe: Any) -> None:
    result = run_recipe(load_recipe(write_recipe(attention={"kv_heads": 1}, quantize=None)))
    with SafetensorsCheckpoint(result.artifact) as checkpoint:
        assert checkpoint.config["num_key_value_heads"] == 1
        assert checkpoint.infos["model.layers.1.self_attn.v_proj.weight"].shape == (16, 64)
    assert any(check.name == "perplexity" for check in result.report.checks)


def test_healing_is_refused_by_name(write_recipe: Any, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(attention={"kv_heads": 1, "heal": {"steps": 3}}))
    with pytest.raises(UnsupportedError, match=r"attention\.heal: 3 steps"):
        run_recipe(recipe)
    assert not (tmp_path / "work").exists() or not any((tmp_path / "work").glob("convert-*"))


def test_merging_from_the_command_line(tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = ["convert", str(tiny_llama), str(output), "--dtype", "float32", "--kv-heads", "1", "--heal-steps", "0"]
    text = ["--calibration", str(texts[0]), "--samples", "4", "--length", "64"]
    result = CliRunner().invoke(main, [*command, *text])
    assert result.exit_code == 0, result.output
    assert "2 → 1 key-value heads, 256 → 128 cache bytes per token" in result.output.replace("\n", " ")
    assert json.loads((output / "config.json").read_text())["num_key_value_heads"] == 1
    refused = CliRunner().invoke(main, [*command[:-1], "7"])
    assert refused.exit_code == 2
