"""What artifacts are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmconvert.convert.source import open_source
from llmconvert.recipes.loading import load_recipe
from llmconvert.recipes.stages.artifact import artifact_name


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "llama-w4a16-g32-sym"),
        ({"attention": {"kv_heads": 1}}, "llama-kv1-w4a16-g32-sym"),
        ({"quantize": None}, "llama-bfloat16"),
        ({"publish": {"to": "file:out"}}, "llama-w4a16-g32-sym"),
        ({"publish": {"to": "me/tiny"}}, "tiny"),
        ({"publish": {"to": "me/tiny", "revision": "main"}}, "tiny"),
        ({"publish": {"to": "me/tiny", "folder": "w4"}}, "tiny-w4"),
        ({"publish": {"to": "me/tiny", "folder": "gqa/w4"}}, "tiny-gqa-w4"),
        ({"publish": {"to": "me/tiny", "revision": "gqa-w4"}}, "tiny-gqa-w4"),
    ],
    ids=repr,
)
def test_variants_of_one_model_have_names_of_their_own(
    write_recipe: Any, tiny_llama: Path, settings: dict[str, Any], expected: str
) -> None:
    recipe = load_recipe(write_recipe(**settings))
    source = open_source(str(tiny_llama))
    assert artifact_name(recipe, source) == expected.replace("llama", tiny_llama.name)
