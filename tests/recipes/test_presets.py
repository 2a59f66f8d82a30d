"""Presets: the sections that they stand for, what a recipe says itself, and commands that say nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import llmconvert
from llmconvert.errors import UsageError
from llmconvert.recipes.loading import make_recipe
from llmconvert.recipes.options import quantize_recipe
from llmconvert.recipes.schema.presets import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_recipe_that_it_stands_for(preset: str) -> None:
    short = make_recipe({"model": "org/name", "preset": preset})
    whole = make_recipe({"model": "org/name", **PRESETS[preset]})
    assert short.to_mapping() == {**whole.to_mapping(), "preset": preset}
    assert make_recipe(short.to_mapping()).to_mapping() == short.to_mapping()


def test_what_a_recipe_says_itself_counts_and_what_does_not_go_with_it_is_left_out() -> None:
    def quantize(**given: Any) -> Any:
        recipe = make_recipe({"model": "org/name", "preset": "best", "quantize": given})
        assert recipe.quantize is not None
        return recipe.quantize, recipe.calibrate

    settings, text = quantize(scheme="w3a16-g32", distil=False)
    assert (settings.method, str(settings.scheme), settings.distil) == ("gptaq", "w3a16-g32-sym", None)
    settings, text = quantize(scheme="nf4")
    assert (settings.method, settings.format, settings.distil, text) == ("rtn", "bitsandbytes", None, None)
    settings, text = quantize(scheme="q4_k_m")
    assert (settings.method, settings.format) == ("gptaq", "gguf") and settings.distil.steps == 120
    settings, text = quantize(scheme="f16", method="rtn")
    assert (settings.format, settings.distil, text) == ("gguf", None, None)
    settings, text = quantize(budget={"bits_per_weight": 4})
    assert settings.distil is not None and text.samples == 64


def test_a_command_with_nothing_else_gives_four_bits(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quantize_recipe(_options(model="org/name"), tmp_path / "out")
    assert recipe.preset == "balanced" and recipe.quantize is not None and recipe.quantize.method == "gptaq"
    with pytest.raises(UsageError, match="preset"):
        quantize_recipe(_options(model="org/name", method="gptq"), tmp_path / "out")
    made = llmconvert.quantize_model(tiny_llama, tmp_path / "out", samples=2, length=32)
    assert made.details.linears[0].scheme == "w4a16-g64-sym" and made.distilled is None


def _options(**given: Any) -> dict[str, Any]:
    from llmconvert.recipes.options import _QUANTIZE

    return dict.fromkeys((*_QUANTIZE, "overrides", "calibration")) | given
