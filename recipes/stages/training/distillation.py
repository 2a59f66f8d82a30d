"""The recipe's ``quantize.distil`` section: which text distillation learns from, and the stage that distils."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmconvert.errors import RecipeError
from llmconvert.quantize.distil.job import plan_distil
from llmconvert.quantize.distil.options import DistilOptions
from llmconvert.quantize.distil.report import distillation_sections
from llmconvert.quantize.distil.requirements import foresee_distil
from llmconvert.recipes.forecast import Forecast, parameters
from llmconvert.recipes.schema.recipe import DistilSettings, Recipe
from llmconvert.recipes.stages.stage import ORIGINAL, Place, Stage, Work
from llmconvert.recipes.stages.windows import DISTIL_TEXT, WindowRequest, mixed
from llmconvert.report.steps import DistilReport
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.storage.writer import write_file

__all__ = ["DISTIL", "distil_request", "distil_settings", "distil_stage"]

#: The name of the stage.
DISTIL = "distil"
_STATE = "distillation.safetensors"
_REPORT = "distillation.json"
# Looks at the held-out text in a whole distillation; each costs as much as a few steps.
_LOOKS = 6


def distil_settings(recipe: Recipe) -> DistilSettings | None:
    """The section, if it asks for any step."""
    settings = recipe.quantize.distil if recipe.quantize is not None else None
    return settings if settings is not None and settings.steps > 0 else None


def distil_request(recipe: Recipe) -> WindowRequest | None:
    """The windows to learn from and to hold out; None if the recipe does not distil.

    Raises:
        RecipeError: it names no text.
    """
    settings = distil_settings(recipe)
    if settings is None:
        return None
    dataset = settings.dataset or (mixed(recipe.calibrate) if recipe.calibrate is not None else None)
    if dataset is None:
        raise RecipeError(
            "quantize.distil: learns from text, and the recipe names none; add quantize.distil.dataset or calibrate"
        )
    samples = settings.steps * settings.batch + settings.held_out
    return WindowRequest("quantize.distil", dataset, samples, settings.length, "shuffled", settings.seed)


def distil_stage(settings: DistilSettings, after: str) -> Stage[DistilReport]:
    """Train what the artifact of the stage ``after`` stores, against the original's predictions; see
    :func:`llmconvert.quantize.distil.job.plan_distil`. What was trained survives a kill at any point."""

    def build(work: Work, place: Place) -> DistilReport:
        assert place.notes is not None
        state, record = place.notes / _STATE, place.notes / _REPORT
        if place.model.exists() and record.exists():
            report = DistilReport.model_validate_json(record.read_bytes())
        else:
            if place.model.exists():
                shutil.rmtree(place.model)
            with work.original.open() as teacher, SafetensorsCheckpoint(work.finished[after].model) as student:
                report = plan_distil(
                    teacher,
                    student,
                    place.model,
                    _options(settings),
                    windows=work.windows(DISTIL_TEXT),
                    context=work.context_of(after),
                    state=state,
                ).run()
            report = report.model_copy(update={"sections": tuple(distillation_sections(report))})
            write_file(record, report.model_dump_json().encode())
        state.unlink(missing_ok=True)
        return report

    def forecast(work: Work, output: Path) -> Forecast:
        with work.original.open() as teacher:
            needs = foresee_distil(teacher, _options(settings), settings.length, context=work.context_of(after))
            tokens = settings.steps * settings.batch * settings.length
            kind = f"distil {'codes ' if settings.code_rate else ''}{work.context.device.type}"
            return Forecast(needs, kind=kind, work=float(parameters(teacher) * tokens))

    def inputs(work: Work) -> Mapping[str, Any]:
        return {"device": work.context.device.type, **settings.model_dump(mode="json")}

    order = {"original": ORIGINAL, "model": after, "text": DISTIL_TEXT}
    return Stage(DISTIL, order, DistilReport.model_validate, build, inputs, resumable=True, forecast=forecast)


def _options(settings: DistilSettings) -> DistilOptions:
    every = max(1, settings.steps // _LOOKS)
    return DistilOptions(
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        code_rate=settings.code_rate,
        norms=settings.norms,
        hidden=settings.hidden,
        held_out=settings.held_out,
        evaluate_every=every,
        save_every=every,
        seed=settings.seed,
    )
