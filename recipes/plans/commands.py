"""What a single command will do and need: convert, quantize and validate, planned as a run is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.errors import UsageError
from llmconvert.recipes.planning.headers import Headers, open_headers
from llmconvert.recipes.planning.plan import RunPlan, StepPlan
from llmconvert.recipes.planning.planner import assemble_plan, fetching, step_of, work_of
from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.recipes.single import require_comparable, require_output
from llmconvert.recipes.stages.attention import attention_stage, require_mergeable
from llmconvert.recipes.stages.conversion import convert_stage, stream_stage
from llmconvert.recipes.stages.measurements import (
    foresee_measuring,
    require_accepted,
    require_measurable,
    require_served_as,
)
from llmconvert.recipes.stages.opening import put_papers
from llmconvert.recipes.stages.quantization import quantize_stage, statistics_of
from llmconvert.recipes.stages.run import require_texts
from llmconvert.recipes.stages.stage import ORIGINAL, Stage
from llmconvert.recipes.stages.training.distillation import distil_stage
from llmconvert.recipes.stages.training.healing import heal_stage
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
    draw_text,
    text_stage,
)

__all__ = ["plan_making", "plan_measuring"]


def plan_making(recipe: Recipe, output: Path, ranks: Ranks | None = None) -> RunPlan:
    """What ``convert`` or ``quantize`` would do: nothing is fetched but headers, nothing written.

    Args:
        recipe: of the command's options.
        output: the directory or file that it would make.
        ranks: the processes that would do it.

    Raises:
        LlmconvertError: whatever the command would refuse before its work; memory and disk are
            :meth:`~llmconvert.recipes.planning.plan.RunPlan.require_room`'s.
    """
    require_output(recipe, output)
    require_texts(recipe)
    headers = open_headers(recipe)
    work = work_of(recipe, headers, ranks or ALONE)
    if recipe.attention is not None:
        with work.view.open() as dense:
            require_mergeable(dense, recipe.attention)
    if recipe.quantize is not None and recipe.quantize.format == "gguf":
        put_papers(work)  # the file itself tells what its card says
    steps, readers = list(fetching(headers)), ""
    *before, last = _stages(recipe)
    for stage in (*before, last):
        place = output if stage is last else output.with_name(f".{output.name}.{stage.name}")
        forecast = stage.forecast(work, place)
        if forecast.model is not None:
            work.foreseen[stage.name] = forecast.model
        readers = forecast.readers or readers
        if stage.name not in work.texts:  # texts are held in memory, and are no step of their own
            steps.append(step_of(stage.name, forecast, output.parent))
    return assemble_plan(recipe, work, steps, str(output), readers)


def _stages(recipe: Recipe) -> Iterator[Stage[Any]]:
    settings, healing, lessons = recipe.quantize, heal_settings(recipe), heal_request(recipe)
    if recipe.stream:
        yield stream_stage(recipe)
        return
    calibrates = recipe.attention is not None or (settings is not None and settings.calibrates)
    if recipe.calibrate is not None and calibrates:
        yield text_stage(CALIBRATION, WindowRequest.calibration(recipe.calibrate))
    if settings is not None:
        quantization = quantize_stage(settings, ORIGINAL, statistics_of(recipe))
        distilling, text = distil_settings(recipe), distil_request(recipe)
        if text is not None:
            yield text_stage(DISTIL_TEXT, text)
        yield quantization
        if distilling is not None:
            yield distil_stage(distilling, quantization.name, settings.scheme)
    elif recipe.attention is None:
        yield convert_stage(recipe)
    else:
        merge = attention_stage(recipe.attention)
        if healing is not None and lessons is not None:
            yield text_stage(HEALING_TEXT, lessons)
        yield merge
        if healing is not None:
            yield heal_stage(healing, after=merge.name)


def plan_measuring(recipe: Recipe, reference: str | None = None, ranks: Ranks | None = None) -> RunPlan:
    """What ``validate`` would do with ``recipe.model``, against the model that ``reference`` names, on ``ranks``.

    Raises:
        LlmconvertError: whatever the command would refuse before its work.
    """
    settings = recipe.validation
    if settings is None:
        raise UsageError("nothing to measure: the recipe has no validate section")
    require_comparable(settings, reference)
    require_measurable(settings)
    require_texts(recipe)
    headers = open_headers(recipe)
    original = _original(recipe, reference)
    work = work_of(recipe, headers, ranks or ALONE)
    left_out = require_served_as(settings, headers.source.checkpoint)
    require_accepted(settings, headers.source.checkpoint)
    if settings.perplexity is not None:
        draw_text(work, EVALUATION_TEXT, WindowRequest.evaluation(settings.perplexity))
    # An artifact whose weights are still to be fetched is known by its headers, as an original is.
    against = original if original is not None else headers if headers.download else None
    checkpoint = against.source.checkpoint if against is not None else None
    windows = work.texts.get(EVALUATION_TEXT)
    forecast = foresee_measuring(settings, headers.source.path, checkpoint, windows, work.context)
    forecast = replace(forecast, notes=(*forecast.notes, *left_out))
    steps: list[StepPlan] = [*fetching(headers), *(fetching(original, "fetch original") if original else ())]
    return assemble_plan(recipe, work, [*steps, step_of("validate", forecast, Path())], "", "")


def _original(recipe: Recipe, reference: str | None) -> Headers | None:
    return open_headers(recipe.model_copy(update={"model": reference})) if reference is not None else None
