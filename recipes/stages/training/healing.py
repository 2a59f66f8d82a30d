"""The recipe's ``attention.heal`` section: which text healing learns from, and the stage that heals."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmconvert.convert.heal.job import HealOptions, plan_heal
from llmconvert.convert.heal.report import healing_sections
from llmconvert.errors import RecipeError
from llmconvert.recipes.forecast import Forecast, files_of_layout, parameters
from llmconvert.recipes.schema.recipe import HealSettings, Recipe
from llmconvert.recipes.stages.stage import ORIGINAL, Place, Stage, Work
from llmconvert.recipes.stages.windows import HEALING_TEXT, WindowRequest, mixed
from llmconvert.report.steps import HealReport
from llmconvert.storage.writer import write_file

__all__ = ["heal_request", "heal_settings", "heal_stage"]

_STATE = "healing.safetensors"
_REPORT = "healing.json"
# Looks at the held-out text in a whole healing; each costs as much as a few steps.
_LOOKS = 8


def heal_settings(recipe: Recipe) -> HealSettings | None:
    """The section, if it asks for any step."""
    settings = recipe.attention.heal if recipe.attention is not None else None
    return settings if settings is not None and settings.steps > 0 else None


def heal_request(recipe: Recipe) -> WindowRequest | None:
    """The windows to learn from and to hold out; None if the recipe does not heal.

    Raises:
        RecipeError: it names no text.
    """
    settings = heal_settings(recipe)
    if settings is None:
        return None
    dataset = settings.dataset or (mixed(recipe.calibrate) if recipe.calibrate is not None else None)
    if dataset is None:
        raise RecipeError(
            "attention.heal: learns from text, and the recipe names none; add attention.heal.dataset or calibrate"
        )
    samples = settings.steps * settings.batch + settings.held_out
    return WindowRequest("attention.heal", dataset, samples, settings.length, "shuffled", settings.seed)


def heal_stage(settings: HealSettings, after: str) -> Stage[HealReport]:
    """Heal the model of the stage ``after``, by distillation from the original; see
    :func:`llmconvert.convert.heal.job.plan_heal`. What was trained survives a kill at any point."""

    def build(work: Work, place: Place) -> HealReport:
        assert place.notes is not None
        state, record = place.notes / _STATE, place.notes / _REPORT
        if place.model.exists() and record.exists():
            report = HealReport.model_validate_json(record.read_bytes())
        else:
            if place.model.exists():
                shutil.rmtree(place.model)
            with work.original.open() as teacher, work.open(after) as student:
                report = plan_heal(
                    teacher,
                    student,
                    place.model,
                    _options(settings),
                    windows=work.windows(HEALING_TEXT),
                    context=work.context_of(after),
                    state=state,
                ).run()
            report = report.model_copy(update={"sections": tuple(healing_sections(report))})
            write_file(record, report.model_dump_json().encode())
        state.unlink(missing_ok=True)
        return report

    def forecast(work: Work, output: Path) -> Forecast:
        with work.original.open() as teacher, work.open(after) as student:
            plan = plan_heal(
                teacher,
                student,
                output,
                _options(settings),
                windows=work.windows(HEALING_TEXT),
                context=work.context_of(after),
            )
            tokens = settings.steps * settings.batch * settings.length
            return Forecast(
                plan.needs,
                files_of_layout(plan.layout),
                tensors=len(plan.layout.specs),
                model=student,
                kind=f"heal {work.context.device.type}",
                work=float(parameters(student) * tokens),
            )

    def inputs(work: Work) -> Mapping[str, Any]:
        return {"device": work.context.device.type, **settings.model_dump(mode="json")}

    order = {"original": ORIGINAL, "model": after, "text": HEALING_TEXT}
    return Stage("heal", order, HealReport.model_validate, build, inputs, resumable=True, forecast=forecast)


def _options(settings: HealSettings) -> HealOptions:
    every = max(1, settings.steps // _LOOKS)
    return HealOptions(
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        hidden=settings.hidden,
        held_out=settings.held_out,
        evaluate_every=every,
        save_every=every,
        seed=settings.seed,
    )
