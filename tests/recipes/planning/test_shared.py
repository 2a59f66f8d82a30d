"""Plans that are made together are those made alone, and build a model of one source once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmconvert.engine.skeleton import Skeleton
from llmconvert.recipes.loading import load_recipe
from llmconvert.recipes.planning import shared
from llmconvert.recipes.planning.planner import plan_run
from llmconvert.recipes.planning.shared import SharedWork


def test_plans_made_together_are_those_made_alone(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the one before has left: a cache's watchers, fewer heads, another dtype, another format."""
    sections: list[dict[str, Any]] = [
        {"quantize": {"method": "gptq", "scheme": "w4a16-g32", "kv_cache": "fp8"}},
        {"quantize": {"method": "gptq", "scheme": "w8a16-g32"}},
        {"quantize": {"method": "rtn", "scheme": "w4a16-g32"}, "attention": {"kv_heads": 1}},
        {"quantize": {"method": "rtn", "scheme": "w4a16-g32"}, "convert": {"dtype": "float16"}},
        {"quantize": {"method": "rtn", "scheme": "q8_0", "format": "gguf"}},
    ]
    recipes = [load_recipe(write_recipe(f"r{number}", **one)) for number, one in enumerate(sections)]
    work = tmp_path / "work"
    alone = [plan_run(recipe, work).steps for recipe in recipes]
    built: list[Skeleton] = []

    def build(*args: Any, **kwargs: Any) -> Skeleton:
        built.append(Skeleton(*args, **kwargs))
        return built[-1]

    monkeypatch.setattr(shared, "Skeleton", build)
    with SharedWork() as common:
        together = [plan_run(recipe, work, shared=common).steps for recipe in recipes]
        assert together == alone
        count = len(built)
        assert [plan_run(recipe, work, shared=common).steps for recipe in recipes[1:3]] == alone[1:3]
        assert len(built) == count, "nothing is built twice, of a source or with fewer heads"
