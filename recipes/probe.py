"""Timing a recipe on one block of its model and on two: what a plan says of time where nothing like it was timed here.

What the second block takes more is what every block takes, and the rest is taken once: so many blocks take
``first + (blocks - 1) · (second - first)``. A model whose blocks differ (a dense one before the experts) is told less
well than one whose blocks are alike.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmconvert.convert.dtype import DtypeRequest, plan_dtype
from llmconvert.engine.skeleton import Skeleton
from llmconvert.progress import SILENT, Progress
from llmconvert.recipes.planning.headers import open_headers
from llmconvert.recipes.planning.history import Seconds
from llmconvert.recipes.planning.plan import RunPlan, StepPlan
from llmconvert.recipes.runner import run_recipe
from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.recipes.stages.conversion import DTYPES
from llmconvert.storage.checkpoint import Checkpoint, CheckpointView

__all__ = ["first_blocks", "probe_recipe"]

_COUNT = "num_hidden_layers"


def probe_recipe(recipe: Recipe, plan: RunPlan, *, progress: Progress = SILENT) -> RunPlan:
    """The plan with times for all of its steps, from running the recipe on one and on two blocks.

    Limits and publishing are left out; of a Hub model the two blocks, embeddings and head are read.

    Raises:
        LlmconvertError: the run on those blocks failed.
    """
    headers = open_headers(recipe)
    with tempfile.TemporaryDirectory(prefix="llmconvert-probe-") as folder, headers.source.checkpoint as checkpoint:
        # The first run pays for what is compiled and cached once on a machine; it is not counted.
        counts = (1, 1, 2)
        taken: list[Mapping[str, float]] = []
        for number, count in enumerate(counts):
            progress.log(f"probe: {count} of {plan.blocks} blocks{', to warm up' if not number else ''}")
            model = Path(folder) / f"model-{number}"
            view = first_blocks(checkpoint, count)
            plan_dtype(view, model, DtypeRequest(DTYPES[recipe.convert.dtype])).run()
            taken.append(_run(recipe, model, Path(folder) / f"work-{number}"))
    _, one, two = taken
    return replace(plan, steps=tuple(_timed(step, one, two, plan.blocks) for step in plan.steps))


def _run(recipe: Recipe, model: Path, work: Path) -> Mapping[str, float]:
    """Seconds by step of the recipe on another model, whatever comes of it."""
    values = {"model": str(model), "publish": None, "stream": False, "validation": _without_limits(recipe)}
    result = run_recipe(recipe.model_copy(update=values), work_dir=work, publish=False)
    return {step.name: step.seconds for step in result.report.steps}


def _without_limits(recipe: Recipe) -> Any:
    """The validate section without limits, which so few blocks can't keep, and without repair."""
    settings = recipe.validation
    if settings is None:
        return None
    given = dict.fromkeys(("max_kl", "min_top1", "max_saturated", "max_bytes", "repair"))
    perplexity, generation, tasks = settings.perplexity, settings.generation, settings.tasks
    if perplexity is not None:
        given["perplexity"] = perplexity.model_copy(update={"max_increase": None})
    if generation is not None:
        given["generation"] = generation.model_copy(update={"min_agreement": None})
    if tasks is not None:
        given["tasks"] = tasks.model_copy(update={"max_drop": None})
    return settings.model_copy(update=given)


def _timed(step: StepPlan, one: Mapping[str, float], two: Mapping[str, float], blocks: int) -> StepPlan:
    if step.reused or step.name not in one or step.name not in two:
        return step
    each = max(0.0, two[step.name] - one[step.name])
    seconds = one[step.name] + (blocks - 1) * each
    return replace(step, seconds=Seconds(seconds, seconds))


def first_blocks(source: Checkpoint, count: int) -> Checkpoint:
    """A model that ends after its first blocks: what lies outside of blocks stays, and the config says so.

    Raises:
        LlmconvertError: the model can't be built from its config.
    """
    return _FirstBlocks(source, count)


class _FirstBlocks(CheckpointView):
    def __init__(self, base: Checkpoint, count: int) -> None:
        super().__init__(base)
        skeleton = Skeleton(base, torch.device("cpu"))
        blocks = skeleton.block_count
        gone = tuple(skeleton.prefix(index) for index in range(count, blocks))
        dropped = {tensor for parameter, tensor in skeleton.names.items() if parameter.startswith(gone)}
        self.infos = {name: info for name, info in base.infos.items() if name not in dropped}
        self.config = _cut(base.config, blocks, count)
        self.identity = f"{base.identity} first {count} blocks"


def _cut(config: Mapping[str, Any], blocks: int, count: int) -> dict[str, Any]:
    """The config with so many blocks; lists with an entry for each block are cut as well."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key == _COUNT:
            found[key] = count
        elif isinstance(value, dict):
            found[key] = _cut(value, blocks, count)
        elif isinstance(value, list) and len(value) == blocks:
            found[key] = value[:count]
        else:
            found[key] = value
    return found
