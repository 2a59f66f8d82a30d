"""``memory:`` of a recipe reaches every step that allocates."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llmconvert.errors import CapacityError
from llmconvert.quantize.mixed_precision import job as choice
from llmconvert.recipes.loading import load_recipe
from llmconvert.recipes.runner import run_recipe
from llmconvert.recipes.stages import attention, conversion, measurements, quantization
from llmconvert.recipes.stages.training import healing

PLANNERS: tuple[tuple[ModuleType, str], ...] = (
    (conversion, "plan_dtype"),
    (attention, "plan_attention"),
    (healing, "plan_heal"),
    (choice, "plan_choice"),
    (quantization, "plan_quantize"),
    (measurements, "plan_validation"),
)
ATTENTION = {"kv_heads": 1, "heal": {"steps": 1, "length": 32, "held_out": 1}}


def test_every_job_of_a_run_is_planned_within_it(
    write_recipe: Any, texts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: dict[str, int | None] = {}

    def watched(module: ModuleType, name: str) -> Any:
        plan = getattr(module, name)

        def planned(*arguments: Any, **options: Any) -> Any:
            allowed[name] = options["context"].memory
            return plan(*arguments, **options)

        return planned

    for module, name in PLANNERS:
        monkeypatch.setattr(module, name, watched(module, name))
    recipe = write_recipe(
        attention=ATTENTION,
        quantize={"method": "gptq", "budget": {"bits_per_weight": 5.5, "group_sizes": [16, 32]}},
        validate={"perplexity": {"dataset": str(texts[1]), "window": 64, "max_windows": 2}, "decoding": False},
        memory="3GB",
    )
    run_recipe(load_recipe(recipe))
    assert allowed == {name: 3_000_000_000 for _, name in PLANNERS}


def test_what_cannot_fit_is_refused_with_what_would(write_recipe: Any) -> None:
    """From headers: nothing was begun."""
    recipe = load_recipe(write_recipe(attention=ATTENTION, memory="20MB"))
    with pytest.raises(
        CapacityError, match=r"needs .* MB .*, 10 MB may be used, which .*allow more \(memory, --memory\)"
    ):
        run_recipe(recipe)
    assert not Path(recipe.work_dir).exists()
