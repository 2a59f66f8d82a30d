"""The attention section of a recipe, whole and by itself."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from llmconvert.cli import main
from llmconvert.context import Context
from llmconvert.convert.gqa.job import convert_attention
from llmconvert.convert.source import open_source
from llmconvert.errors import RecipeError
from llmconvert.recipes.loading import load_recipe, make_recipe
from llmconvert.recipes.runner import run_recipe
from llmconvert.recipes.schema.measuring import DecodingSettings
from llmconvert.recipes.schema.recipe import HealSettings
from llmconvert.recipes.stages.conversion import converted_view
from llmconvert.recipes.stages.stage import Finished, Place, Work
from llmconvert.recipes.stages.training.healing import heal_stage
from llmconvert.recipes.stages.windows import HEALING_TEXT
from llmconvert.report.steps import StepDetails
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.storage.contents import Contents
from llmconvert.text.tokens import TokenWindows


@pytest.fixture
def write_quick(write_recipe: Any, texts: tuple[Path, Path]) -> Any:
    """Recipes that leave out the speed of decoding, whose processes take seconds to start."""
    perplexity = {"dataset": str(texts[1]), "window": 64, "max_windows": 4}
    return partial(write_recipe, validate={"perplexity": perplexity, "decoding": False})


def decoding(recipe: Path) -> DecodingSettings | None:
    """What a recipe asks for about the speed of decoding."""
    asked = load_recipe(recipe).measured
    assert asked is not None
    return asked.decoding


def test_decoding_is_measured_where_attention_is_rewritten(write_recipe: Any, write_quick: Any) -> None:
    assert decoding(write_recipe(attention={"kv_heads": 1})) == DecodingSettings()
    assert decoding(write_quick(attention={"kv_heads": 1})) is None
    assert decoding(write_recipe()) is None


def test_merging_and_quantizing_in_one_run(write_quick: Any) -> None:
    recipe = load_recipe(write_quick(attention={"kv_heads": 1}))
    result = run_recipe(recipe)
    with SafetensorsCheckpoint(result.artifact) as checkpoint:
        assert checkpoint.config["num_key_value_heads"] == 1
        assert checkpoint.config["quantization_config"]["quant_method"] == "compressed-tensors"
        assert checkpoint.infos["model.layers.0.self_attn.k_proj.weight_shape"].shape == (2,)
    steps = {step.name: step.model_dump() for step in result.report.steps}
    layers = steps["attention"]["details"]["layers"]
    assert len(layers) == 2 and all(0 < layer["output_loss"] < 1 for layer in layers)
    assert steps["attention"]["details"]["kv_bytes_per_token"] == (256, 128)
    assert run_recipe(recipe).report == result.report  # nothing was done again


def test_merging_alone(write_quick: Any) -> None:
    result = run_recipe(load_recipe(write_quick(attention={"kv_heads": 1}, quantize=None)))
    with SafetensorsCheckpoint(result.artifact) as checkpoint:
        assert checkpoint.config["num_key_value_heads"] == 1
        assert checkpoint.infos["model.layers.1.self_attn.v_proj.weight"].shape == (16, 64)
    assert any(check.name == "perplexity" for check in result.report.checks)


def test_healing_between_merge_and_quantization(write_quick: Any) -> None:
    heal = {"steps": 6, "length": 32, "held_out": 4}
    recipe = load_recipe(write_quick(attention={"kv_heads": 1, "heal": heal}))
    result = run_recipe(recipe)
    steps = {step.name: step.model_dump() for step in result.report.steps}
    assert list(steps).index("attention") < list(steps).index("heal") < list(steps).index("quantize")
    details = steps["heal"]["details"]
    assert details["steps"] == 6 and len(details["history"]) == 6 and details["after"] <= details["before"]
    with SafetensorsCheckpoint(result.artifact) as checkpoint:
        assert checkpoint.config["num_key_value_heads"] == 1
    shares = result.report.check("perplexity.steps")
    total = result.report.check("perplexity")
    assert shares is not None and total is not None and total.value and total.reference
    (section,) = shares.sections
    assert [row[0] for row in section.rows] == ["original", "attention", "heal", "quantize"]
    added = [float(row[2] or 0) for row in section.rows]
    assert sum(added) == pytest.approx(math.log(total.value / total.reference))
    assert {section.name for section in result.report.sections} >= {"attention-layers", "kv-cache", "healing"}
    page = (result.artifact / "llmconvert" / "report.html").read_text()
    assert "Merged attention, layer by layer" in page and "while healing" in page
    assert run_recipe(recipe).report == result.report


def test_a_recipe_that_heals_names_text(write_recipe: Any) -> None:
    recipe = load_recipe(write_recipe(attention={"kv_heads": 1, "heal": {"steps": 3}}, calibrate=None, quantize=None))
    with pytest.raises(RecipeError, match=r"attention\.heal\.dataset"):
        run_recipe(recipe)


def test_a_finished_healing_is_not_done_again(tiny_llama: Path, tmp_path: Path) -> None:
    """Killed after its model was written: what there is counts if the report is there, and is written again if not."""
    ids = [torch.randint(0, 300, (1, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    with SafetensorsCheckpoint(tiny_llama) as original:
        convert_attention(original, tmp_path / "merged" / "model", kv_heads=1)
    recipe = make_recipe({"model": str(tiny_llama), "convert": {"dtype": "float32"}})
    source = open_source(recipe.model)
    work = Work(recipe, Context(), source, converted_view(recipe, source))
    work.texts[HEALING_TEXT] = TokenWindows(tuple(ids), 4, 64, "text", "", "", False, 16)
    work.finished["attention"] = Finished("attention", "", tmp_path / "merged", StepDetails(), Contents({}))
    stage = heal_stage(HealSettings(steps=2, length=16, held_out=1), after="attention")
    place = Place.stage(tmp_path / "stage")
    (tmp_path / "stage").mkdir()
    first = stage.build(work, place)
    written = (place.model / "model.safetensors").read_bytes()
    assert stage.build(work, place) == first
    (tmp_path / "stage" / "healing.json").unlink()
    assert stage.build(work, place).held_out == first.held_out
    assert (place.model / "model.safetensors").read_bytes() == written
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == ["healing.json", "model"]


def test_merging_from_the_command_line(tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = ["convert", str(tiny_llama), str(output), "--dtype", "float32", "--kv-heads", "1", "--heal-steps", "0"]
    text = ["--calibration", str(texts[0]), "--samples", "4", "--length", "64"]
    result = CliRunner().invoke(main, [*command, *text])
    assert result.exit_code == 0, result.output
    assert "2 → 1 key-value heads, 256 → 128 cache bytes per token" in result.output.replace("\n", " ")
    assert json.loads((output / "config.json").read_text())["num_key_value_heads"] == 1
    healed = tmp_path / "healed"
    lesson = [*command[:2], str(healed), *command[3:-1], "2", "--heal-train", "lora", *text]
    result = CliRunner().invoke(main, lesson)
    assert result.exit_code == 0, result.output
    assert "healed in 2 steps" in result.output.replace("\n", " ")
    assert json.loads((healed / "config.json").read_text())["num_key_value_heads"] == 1
    assert not (tmp_path / ".healed.healing").exists()
    refused = CliRunner().invoke(main, [*command[:-1], "7"])
    assert refused.exit_code == 2
