"""Planning a run from headers and texts: what it will do and reuse, make and need, before the first byte is fetched.

The stages are those of the run; each foresees what it needs and makes (:class:`~llmconvert.recipes.forecast.Forecast`),
on models that are still to be made where they come from stages before it. What a run would refuse is refused here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub

from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.context import Context
from llmconvert.device import open_device
from llmconvert.engine.architecture.config import declared_number
from llmconvert.memory import available_nbytes
from llmconvert.needs import Needs
from llmconvert.recipes.forecast import Forecast, parameters
from llmconvert.recipes.planning.headers import Headers
from llmconvert.recipes.planning.history import expected_seconds
from llmconvert.recipes.planning.plan import RunPlan, StepPlan
from llmconvert.recipes.planning.shared import SharedWork, sharing
from llmconvert.recipes.publishing import check_metadata, check_target, fill_target
from llmconvert.recipes.ranks import require_shareable
from llmconvert.recipes.schema.recipe import PublishSettings, Recipe
from llmconvert.recipes.stages.artifact import artifact_name, front_matter_of
from llmconvert.recipes.stages.opening import work_on
from llmconvert.recipes.stages.run import require_texts, stages_of
from llmconvert.recipes.stages.stage import ORIGINAL, Finished, Stage, Work
from llmconvert.storage.contents import Hashes
from llmconvert.storage.disk import require_slashes
from llmconvert.storage.stage_record import read_stage, stage_key
from llmconvert.text.files import local_path

__all__ = ["assemble_plan", "fetching", "foresee", "foresee_steps", "plan_recipe", "plan_run", "step_of", "work_of"]


def plan_recipe(
    recipe: Recipe,
    *,
    work_dir: Path | str | None = None,
    publish: bool = True,
    fresh: bool = False,
    ranks: Ranks = ALONE,
) -> RunPlan:
    """What :func:`llmconvert.run_recipe` would do with a recipe: nothing is fetched but headers, nothing written.

    Example::

        plan = llmconvert.plan_recipe(llmconvert.load_recipe("demo"))
        print(plan.needs, plan.seconds)

    Args:
        work_dir: where finished stages are looked for; the recipe's own by default.
        publish: whether it shall be published, and the target be checked.
        fresh: reckon with no finished stage.
        ranks: the processes that would run it.

    Raises:
        LlmconvertError: whatever a run would refuse before its work; memory and disk are
            :meth:`~llmconvert.recipes.planning.plan.RunPlan.require_room`'s.
    """
    return plan_run(recipe, Path(work_dir or recipe.work_dir), publish=publish, fresh=fresh, ranks=ranks)


def plan_run(
    recipe: Recipe,
    work_dir: Path,
    *,
    publish: bool = True,
    fresh: bool = False,
    publisher: str | None = None,
    ranks: Ranks = ALONE,
    shared: SharedWork | None = None,
) -> RunPlan:
    """The plan of a recipe.

    Args:
        publisher: who may replace what is published there, if it isn't the recipe.
        shared: what it has in common with other plans that are made beside it.

    Raises:
        LlmconvertError: see :func:`plan_recipe`.
    """
    require_slashes(work_dir)
    filled = fill_target(recipe)
    target = filled.publish if publish else None
    if filled.measured is not None:
        from llmconvert.recipes.stages.measurements import require_loader, require_measurable, require_served

        require_measurable(filled.measured)
        require_loader(filled)
        require_served(filled)
    require_texts(filled)
    if target is not None:
        check_target(target, publisher or filled.name, Hashes())
    return foresee(filled, target, work_dir, fresh=fresh, ranks=ranks, shared=shared)


def foresee(
    recipe: Recipe,
    target: PublishSettings | None,
    work_dir: Path,
    *,
    fresh: bool = False,
    ranks: Ranks = ALONE,
    shared: SharedWork | None = None,
) -> RunPlan:
    """The plan of a recipe whose environment, texts and target were checked, and whose target is filled in."""
    with sharing(shared) as common:
        headers = common.headers(recipe)
        work = work_of(recipe, headers, ranks)
        common.join(work)
        return _foresee(work, headers, target, work_dir, fresh=fresh)


def _foresee(work: Work, headers: Headers, target: PublishSettings | None, work_dir: Path, *, fresh: bool) -> RunPlan:
    recipe, source = work.recipe, work.source
    todo = stages_of(recipe)
    with work.view.open() as dense:
        if recipe.attention is not None:
            from llmconvert.recipes.stages.attention import require_mergeable

            require_mergeable(dense, recipe.attention)
        if recipe.measured is not None:
            from llmconvert.recipes.stages.measurements import require_accepted

            require_accepted(recipe.measured, dense)
    if target is not None:
        with work.original.open() as original:
            check_metadata(target, front_matter_of(recipe, source, original))
    measuring = todo.measuring(todo.model)
    stages = [*todo.making, *([measuring] if measuring is not None else [])]
    steps = list(fetching(headers))
    readers = ""
    made = None
    for step, forecast in foresee_steps(stages, work, None if fresh else work_dir, work_dir):
        steps.append(step)
        if step.name == todo.model:
            made, readers = step, forecast.readers if forecast is not None else ""
    if made is not None and target is not None:
        steps.append(_publishing(target, made))
    return assemble_plan(recipe, work, steps, artifact_name(recipe, source), readers)


def foresee_steps(
    stages: Iterable[Stage[Any]], work: Work, finished: Path | None, output: Path
) -> Iterator[tuple[StepPlan, Forecast | None]]:
    """Each stage as it will be, with its forecast; those that are there already have none.

    Args:
        finished: work directory to look for finished stages in; None for none.
        output: where stages will be built.
    """
    pending: set[str] = set()
    keys: dict[str, str] = {}
    for stage in stages:
        found = _found(stage, work, pending, finished) if finished is not None else None
        if found is not None:
            work.finished[stage.name] = found
            stage.finish(work)
            keys[stage.name] = _identity(stage, work, keys)
            yield StepPlan(stage.name, reused=True, key=keys[stage.name]), None
            continue
        pending.add(stage.name)
        asked: Hashable = None
        if "model" in stage.after:  # what rewrites one is foreseen once, and later stages of all plans see one model
            asked = (_identity(stage, work, keys), work.context.device, work.context.memory)
        forecast = work.forecasts.get(asked) if asked is not None else None
        forecast = forecast or stage.forecast(work, output / f"{stage.name}-planned" / "model")
        if stage.name in work.texts:
            pending.discard(stage.name)  # drawn now, so its key is known
        keys[stage.name] = _identity(stage, work, keys)
        if forecast.model is not None:
            work.foreseen[stage.name] = forecast.model
            if asked is not None:
                work.forecasts[asked] = forecast
        if forecast.files:
            work.sizes[stage.name] = forecast.nbytes
        yield replace(step_of(stage.name, forecast, output), key=keys[stage.name]), forecast


def _identity(stage: Stage[Any], work: Work, keys: Mapping[str, str]) -> str:
    """What tells the stage from others of the same name, before what it follows is made; equal for equal work."""
    text = work.texts.get(stage.name)
    own: Any = (text.dataset, text.drawn, text.length, text.stride, text.digest) if text else stage.settings(work)
    made = {ORIGINAL: work.view.key, **keys}
    return stage_key(stage.name, {"own": own, **{role: made.get(name, name) for role, name in stage.after.items()}})


def step_of(name: str, forecast: Forecast, output: Path) -> StepPlan:
    """A stage as it will be."""
    return StepPlan(
        name,
        needs=forecast.needs,
        files=forecast.files,
        least=forecast.least,
        tensors=forecast.tensors,
        seconds=expected_seconds(forecast.kind, forecast.work),
        kind=forecast.kind,
        work=forecast.work,
        solving=forecast.solving,
        place=output,
        notes=forecast.notes,
    )


def _found(stage: Stage[Any], work: Work, pending: set[str], work_dir: Path) -> Finished[Any] | None:
    """The finished stage, where all that it follows is finished as well."""
    if pending & set(stage.after.values()):
        return None
    key = stage_key(stage.name, stage.inputs(work))
    path = work_dir.absolute() / f"{stage.name}-{key[:12]}"
    result = read_stage(path, key)
    if result is None:
        return None
    return Finished(stage.name, key, path, stage.read(result.details), result.contents)


def work_of(recipe: Recipe, headers: Headers, ranks: Ranks = ALONE) -> Work:
    """A recipe's model as its headers tell it, to plan stages on that ``ranks`` build.

    Raises:
        UnsupportedError: several can't do it.
        LlmconvertError: see :func:`llmconvert.recipes.stages.opening.work_on`.
    """
    require_shareable(recipe, ranks.count)
    device = open_device(recipe.device, None if ranks.alone else ranks.local_rank)
    return work_on(recipe, headers.source, Context(device, recipe.memory, ranks=ranks))


def fetching(headers: Headers, name: str = "fetch") -> Iterator[StepPlan]:
    """What fetching a model takes, where it is still to be fetched."""
    if headers.download:
        size = headers.download
        needs = Needs(disk=size, download=size)
        cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
        yield StepPlan(
            name,
            needs=needs,
            seconds=expected_seconds("fetch", size),
            kind="fetch",
            work=size,
            place=cache,
            key=f"{name} {headers.source.origin}@{headers.source.revision}",
        )


def _publishing(target: PublishSettings, made: StepPlan) -> StepPlan:
    here = target.to.startswith("file:")
    kind = "publish" if here else "publish hub"
    return StepPlan(
        "publish",
        needs=Needs(disk=made.nbytes if here else 0),
        seconds=expected_seconds(kind, made.nbytes),
        kind=kind,
        work=made.nbytes,
        place=local_path(target.to.removeprefix("file:")) if here else None,
        notes=(f"to {target.to}",),
    )


def assemble_plan(recipe: Recipe, work: Work, steps: Sequence[StepPlan], makes: str, readers: str) -> RunPlan:
    """Steps as a plan, beside what this machine has."""
    checkpoint, device = work.source.checkpoint, work.context.device
    free = partial(available_nbytes, device)
    accelerated = device.type != "cpu"
    host = available_nbytes(replace(work.context, device=open_device("cpu")).device)
    return RunPlan(
        name=recipe.name,
        model=work.source.origin,
        makes=makes,
        steps=tuple(steps),
        parameters=parameters(checkpoint),
        blocks=declared_number(checkpoint.config, "num_hidden_layers") or 0,
        readers=readers,
        memory=(host if accelerated or recipe.memory is None else recipe.memory) // work.context.ranks.local_count,
        device_memory=(recipe.memory or free()) if accelerated else None,
        processes=work.context.ranks.count,
    )
