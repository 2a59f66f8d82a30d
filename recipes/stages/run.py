"""Which stages a recipe's run has, in order. Repair adds its own where the gate fails.

A stage is loaded where a recipe has it, with all that it is built by: a plan of the others does not wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.recipes.stages.conversion import convert_stage, stream_stage
from llmconvert.recipes.stages.quantization import quantize_stage, statistics_of
from llmconvert.recipes.stages.stage import ORIGINAL, Stage
from llmconvert.recipes.stages.training.settings import (
    distil_request,
    distil_settings,
    heal_request,
    heal_settings,
)
from llmconvert.recipes.stages.windows import (
    CALIBRATION,
    DISTIL_TEXT,
    EVALUATION_TEXT,
    HEALING_TEXT,
    WindowRequest,
    text_stage,
)
from llmconvert.text.datasets import require_dataset

if TYPE_CHECKING:
    from llmconvert.recipes.stages.measurements import Measured

__all__ = ["RunStages", "require_texts", "stages_of"]


@dataclass(frozen=True, slots=True)
class RunStages:
    """The stages of a run.

    Attributes:
        making: up to the artifact's model, texts among them.
        model: the one that makes the artifact's model.
        dense: the last one before it is quantized, or the original.
        between: those that change weights on the way to ``model``.
        recipe: what they were made from.
    """

    making: tuple[Stage[Any], ...]
    model: str
    dense: str
    between: tuple[str, ...]
    recipe: Recipe

    def measuring(self, model: str, name: str = "validate") -> Stage[Measured] | None:
        """The stage that measures the model of a stage; None if the recipe measures nothing."""
        settings = self.recipe.measured
        if settings is None:
            return None
        from llmconvert.recipes.stages.measurements import validate_stage

        between = tuple(step for step in self.between if step != model)
        return validate_stage(settings, model, between, name)


def require_texts(recipe: Recipe) -> None:
    """Refuse, before any work and download, texts that can't be there.

    Raises:
        DatasetError: see :func:`llmconvert.text.datasets.require_dataset`.
    """
    checks, heal = recipe.validation, recipe.attention.heal if recipe.attention is not None else None
    read = (checks.perplexity, checks.positions) if checks is not None else ()
    distil = recipe.quantize.distil if recipe.quantize is not None else None
    for section in (heal, distil, *read):
        if section is not None and section.dataset is not None:
            require_dataset(section.dataset)
    if recipe.calibrate is not None:
        for name in recipe.calibrate.names:
            require_dataset(name)


def stages_of(recipe: Recipe) -> RunStages:
    """The stages that a recipe asks for.

    Raises:
        RecipeError: it heals or distils, and names no text to learn from.
    """
    if recipe.stream:
        stage = stream_stage(recipe)
        return RunStages((*_texts(recipe), stage), stage.name, ORIGINAL, (), recipe)
    making: list[Stage[Any]] = [convert_stage(recipe), *_texts(recipe)]
    model, between = making[0].name, []
    dense = ORIGINAL
    if recipe.attention is not None:
        from llmconvert.recipes.stages.attention import attention_stage

        making.append(attention_stage(recipe.attention))
        between.append(making[-1].name)
        dense = model = making[-1].name
        healing = heal_settings(recipe)
        if healing is not None:
            from llmconvert.recipes.stages.training.healing import heal_stage

            making.append(heal_stage(healing, after=model))
            between.append(making[-1].name)
            dense = model = making[-1].name
    if recipe.quantize is not None:
        making.append(quantize_stage(recipe.quantize, after=dense, statistics=statistics_of(recipe)))
        model = making[-1].name
        distilling = distil_settings(recipe)
        if distilling is not None:
            from llmconvert.recipes.stages.training.distillation import distil_stage

            making.append(distil_stage(distilling, model, recipe.quantize.scheme))
            model = making[-1].name
    return RunStages(tuple(making), model, dense, tuple(between), recipe)


def _texts(recipe: Recipe) -> Iterator[Stage[Any]]:
    """All texts, before the long work: a missing one, or one used twice, must not be found out after it."""
    if recipe.calibrate is not None:
        yield text_stage(CALIBRATION, WindowRequest.calibration(recipe.calibrate))
    if recipe.validation is not None and recipe.validation.perplexity is not None:
        yield text_stage(EVALUATION_TEXT, WindowRequest.evaluation(recipe.validation.perplexity))
    lessons = heal_request(recipe)
    if lessons is not None:
        yield text_stage(HEALING_TEXT, lessons)
    lessons = distil_request(recipe)
    if lessons is not None:
        yield text_stage(DISTIL_TEXT, lessons)
