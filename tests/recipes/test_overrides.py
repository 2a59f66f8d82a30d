"""Overrides of a recipe's keys: what they change, and that their mistakes are told as theirs."""

from __future__ import annotations

from support.recipe_texts import FULL, refusal

from llmconvert.quantize.numbers import Int
from llmconvert.quantize.scheme import Scheme
from llmconvert.recipes.loading import parse_recipe, read_override


def test_overrides_change_sections_lists_and_switches() -> None:
    recipe = parse_recipe(
        FULL,
        "x.yaml",
        overrides=[
            "quantize.scheme=w3a16-g64",
            "quantize.overrides.0.scheme=w4a16-g64",
            "validate.generation.max_new_tokens=8",
            "publish=null",
            "memory=4GB",
        ],
    )
    assert recipe.quantize is not None and recipe.quantize.scheme == Scheme(Int(3), 64)
    assert recipe.quantize.overrides[0].scheme == Scheme(Int(4), 64)
    assert recipe.validation is not None and recipe.validation.generation is not None
    assert recipe.validation.generation.max_new_tokens == 8
    assert recipe.publish is None and recipe.memory == 4_000_000_000


def test_mistakes_in_overrides_are_blamed_on_them() -> None:
    assert "x.yaml, --set quantize.metod=a: unknown key quantize.metod" in refusal(FULL, "quantize.metod=a")
    assert "--set calibrate.samples=none: calibrate.samples: found 'none'" in refusal(FULL, "calibrate.samples=none")
    assert "model is a value, not a section" in refusal(FULL, "model.x=1")
    assert "quantize.overrides is a list of 1, found 7" in refusal(FULL, "quantize.overrides.7.scheme=w8a16")
    for bad in ("quantize", "=1", "a..b=1", "a=["):
        assert f"--set {bad}" in refusal(FULL, bad)


def test_override_values_are_yaml() -> None:
    assert read_override("a.b=[1, x]") == (("a", "b"), [1, "x"])
    assert read_override("a.0.b=1=2") == (("a", 0, "b"), "1=2")
