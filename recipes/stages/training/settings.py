"""What the recipe's two trainings, healing and distillation, have in common: their text, options, and kept report."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from llmconvert.errors import RecipeError
from llmconvert.recipes.schema.recipe import DistilSettings, HealSettings, Recipe
from llmconvert.recipes.stages.stage import Place
from llmconvert.recipes.stages.windows import WindowRequest, mixed
from llmconvert.report.steps import DistilReport, HealReport
from llmconvert.storage.writer import write_file

__all__ = [
    "common_options",
    "distil_request",
    "distil_settings",
    "heal_request",
    "heal_settings",
    "trained_once",
    "training_tokens",
]

R = TypeVar("R", HealReport, DistilReport)


def _training_request(recipe: Recipe, key: str, settings: HealSettings | DistilSettings | None) -> WindowRequest | None:
    """The windows to learn from and to hold out; None if the recipe does not train.

    Args:
        key: of the section, for errors.
        settings: the section, if it asks for any step.

    Raises:
        RecipeError: it names no text.
    """
    if settings is None:
        return None
    dataset = settings.dataset or (mixed(recipe.calibrate) if recipe.calibrate is not None else None)
    if dataset is None:
        raise RecipeError(f"{key}: learns from text, and the recipe names none; add {key}.dataset or calibrate")
    samples = settings.steps * settings.batch + settings.held_out
    return WindowRequest(key, dataset, samples, settings.length, "shuffled", settings.seed)


def heal_settings(recipe: Recipe) -> HealSettings | None:
    """The section, if it asks for any step."""
    settings = recipe.attention.heal if recipe.attention is not None else None
    return settings if settings is not None and settings.steps > 0 else None


def heal_request(recipe: Recipe) -> WindowRequest | None:
    """The windows to learn from and to hold out; None if the recipe does not heal.

    Raises:
        RecipeError: it names no text.
    """
    return _training_request(recipe, "attention.heal", heal_settings(recipe))


def distil_settings(recipe: Recipe) -> DistilSettings | None:
    """The section, if it asks for any step."""
    settings = recipe.quantize.distil if recipe.quantize is not None else None
    return settings if settings is not None and settings.steps > 0 else None


def distil_request(recipe: Recipe) -> WindowRequest | None:
    """The windows to learn from and to hold out; None if the recipe does not distil.

    Raises:
        RecipeError: it names no text.
    """
    return _training_request(recipe, "quantize.distil", distil_settings(recipe))


def training_tokens(settings: HealSettings | DistilSettings) -> int:
    """Tokens that all steps learn from."""
    return settings.steps * settings.batch * settings.length


def common_options(settings: HealSettings | DistilSettings, looks: int) -> dict[str, Any]:
    """Arguments of :class:`~llmconvert.training.options.TrainingOptions`; ``looks`` at the held-out text in all."""
    every = max(1, settings.steps // looks)
    return {
        "steps": settings.steps,
        "batch": settings.batch,
        "learning_rate": settings.learning_rate,
        "hidden": settings.hidden,
        "held_out": settings.held_out,
        "evaluate_every": every,
        "save_every": every,
        "seed": settings.seed,
    }


def trained_once(place: Place, word: str, kind: type[R], train: Callable[[Path], R]) -> R:
    """What ``train`` has to say, who is given the file of its state; or what a killed call of it had said already.

    Args:
        place: of the stage; the state and the report lie beside the model until the stage is finished.
        word: that names both files.
        kind: of the report.
        train: makes the model, and returns its report.
    """
    assert place.notes is not None
    state, record = place.notes / f"{word}.safetensors", place.notes / f"{word}.json"
    if place.model.exists() and record.exists():
        report = kind.model_validate_json(record.read_bytes())
    else:
        if place.model.exists():
            shutil.rmtree(place.model)
        report = train(state)
        write_file(record, report.model_dump_json().encode())
    state.unlink(missing_ok=True)
    return report
