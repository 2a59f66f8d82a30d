"""Lists of values for keys of a recipe become recipes, and what can't be meant is refused by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llmconvert.errors import RecipeError
from llmconvert.recipes.sweep.expand import load_sweep, make_sweep, require_places

BASE: dict[str, Any] = {
    "name": "base",
    "model": "org/model",
    "calibrate": {"dataset": "pydoc-topics:train"},
    "quantize": {"method": "gptq", "scheme": "w4a16-g64"},
}


def names(matrix: dict[str, Any], **more: Any) -> list[str]:
    return [variant.name for variant in make_sweep({**BASE, **more, "matrix": matrix}).variants]


def test_every_combination_is_a_recipe_of_its_own() -> None:
    sweep = make_sweep(
        {
            **BASE,
            "matrix": {
                "quantize.method": ["gptq", "gptaq"],
                "quantize.scheme": ["w4a16-g64", "w3a16-g64"],
                "exclude": [{"quantize.method": "gptaq", "quantize.scheme": "w3a16-g64"}],
            },
        }
    )
    assert [variant.name for variant in sweep.variants] == [
        "base-gptq-w4a16-g64",
        "base-gptq-w3a16-g64",
        "base-gptaq-w4a16-g64",
    ]
    recipes = [variant.recipe for variant in sweep.variants]
    found = [(one.quantize.method, str(one.quantize.scheme)) for one in recipes if one is not None and one.quantize]
    assert found == [("gptq", "w4a16-g64-sym"), ("gptq", "w3a16-g64-sym"), ("gptaq", "w4a16-g64-sym")]
    assert all(
        one is not None and one.name == variant.name for one, variant in zip(recipes, sweep.variants, strict=True)
    )


def test_sections_and_lists_are_values_too() -> None:
    budgets = [{"bits_per_weight": 4.25}, {"bits_per_weight": 3.5, "bits": [3, 4]}]
    assert names({"quantize.budget": budgets}, quantize={"method": "gptq"}) == ["base-4.25", "base-3.5-3-4"]
    assert names({"attention.kv_heads": [1, 3], "quantize.scheme": ["w8a16"]}) == ["base-1", "base-3"]


def test_a_variant_that_is_none_keeps_its_reason() -> None:
    sweep = make_sweep({**BASE, "matrix": {"quantize.scheme": ["w4a16-g64", "w99a16"]}})
    good, bad = sweep.variants
    assert good.recipe is not None and bad.recipe is None
    assert "variant base-w99a16" in str(bad.problem) and "quantize.scheme" in str(bad.problem)


def test_text_that_one_method_does_not_read_is_no_mistake_where_another_does() -> None:
    both = make_sweep({**BASE, "matrix": {"quantize.method": ["rtn", "gptq"]}})
    assert all(variant.recipe is not None for variant in both.variants)
    with pytest.raises(RecipeError, match=r"calibrate\.dataset: .* leave it out"):
        make_sweep({**BASE, "matrix": {"quantize.method": ["rtn", "hqq"]}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"matrix": ["a"]}, "matrix: expected keys with lists"),
        ({"matrix": {"quantize.scheme": "w4a16"}}, r"matrix\.quantize\.scheme: expected a list of values"),
        ({"matrix": {"quantize.scheme": []}}, r"matrix\.quantize\.scheme: expected a list of values"),
        ({"matrix": {"quantise.scheme": ["w4a16", "w8a16"]}}, "did you mean quantize"),
        (
            {"matrix": {"quantize.scheme": ["w8a16"], "exclude": [{"quantize.scheme": "w4a16"}]}},
            "no value of the matrix",
        ),
        ({"matrix": {"quantize.scheme": ["w8a16"], "exclude": [{"quantize.scheme": "w8a16"}]}}, "leaves no variant"),
        ({"matrix": {"quantize.scheme": ["w8a16", "w8a16"]}}, "two variants would be called"),
        ({"matrix": {"calibrate.seed": list(range(20)), "calibrate.samples": list(range(1, 21))}}, "400 variants"),
        ({"pick": "smallest within 2%"}, "nothing to choose from"),
        ({"matrix": {"quantize.scheme": ["w8a16"]}, "pick": "cheapest"}, "pick: 'cheapest' is not understood"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_sweep({**BASE, **values}, "it.yaml")


def test_one_of_them_may_go_where_all_would() -> None:
    matrix = {"quantize.scheme": ["w8a16", "w4a16"]}
    picked = make_sweep(
        {**BASE, "matrix": matrix, "publish": {"to": "user/model", "unmeasured": True}, "pick": "best under 1GB"}
    )
    assert picked.pick is not None
    require_places(picked)
    apart = make_sweep(
        {**BASE, "matrix": matrix, "publish": {"to": "user/model", "folder": "{name}", "unmeasured": True}}
    )
    require_places(apart)
    together = make_sweep({**BASE, "matrix": matrix, "publish": {"to": "user/model", "unmeasured": True}})
    with pytest.raises(RecipeError, match="would both be published to user/model"):
        require_places(together)


def test_settings_of_the_command_line_can_be_lists(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(BASE))
    assert load_sweep(path) is None
    assert load_sweep(path, ["card.base_model=org/one", "publish.message=first, second", "publish.to=a/b"]) is None
    sweep = load_sweep(path, ["quantize.scheme=w4a16-g64,w3a16-g64", "quantize.method=gptq,gptaq", "calibrate.seed=7"])
    assert sweep is not None
    assert [variant.name for variant in sweep.variants][:2] == ["base-w4a16-g64-gptq", "base-w4a16-g64-gptaq"]
    assert all(one.recipe is not None and one.recipe.calibrate.seed == 7 for one in sweep.variants)  # type: ignore[union-attr]
