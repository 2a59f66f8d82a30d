"""What artifacts are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llmconvert.convert.source import open_source
from llmconvert.recipes.loading import load_recipe
from llmconvert.recipes.stages.artifact import artifact_name, resolved_recipe
from llmconvert.report.report import ModelInfo, Report


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


def test_a_published_recipe_names_no_place_on_this_machine(write_recipe: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """Nor the Python that a runtime was timed with, texts that were trained on, or a directory of tasks."""
    text = str(tmp_path / "more.txt")
    recipe = load_recipe(
        write_recipe(
            attention={"kv_heads": 1, "heal": {"steps": 1, "dataset": text}},
            quantize={"method": "gptq", "scheme": "w4a16-g32", "distil": {"steps": 1, "dataset": text}},
            validate={
                "perplexity": {"dataset": str(tmp_path / "other.txt"), "window": 64},
                "serve": ["transformers", f"mlx={tmp_path}/bin/python"],
                "tasks": {"names": ["mine"], "include": str(tmp_path / "tasks")},
            },
        )
    )
    report = Report(model=ModelInfo(name="a", source="b"), environment={})
    published = resolved_recipe(recipe, open_source(str(tiny_llama)), report)
    assert str(tmp_path) not in published and str(tiny_llama.parent) not in published
    values = yaml.safe_load(published)
    assert values["validate"]["serve"]["runtimes"] == ["transformers", "mlx"]
    assert values["validate"]["tasks"]["include"] == "tasks"
    assert values["quantize"]["distil"]["dataset"] == values["attention"]["heal"]["dataset"] == "more.txt"
