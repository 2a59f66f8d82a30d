"""The recipe's ``attention.heal`` section: which text healing learns from, and doing it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llmconvert.convert.heal.job import HealOptions, HealReport, heal_attention
from llmconvert.convert.heal.report import healing_sections
from llmconvert.errors import RecipeError
from llmconvert.progress import SILENT, Progress
from llmconvert.recipes.schema.recipe import HealSettings, Recipe
from llmconvert.recipes.stages.windows import WindowRequest
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint
from llmconvert.storage.writer import write_json

__all__ = ["heal", "heal_request", "heal_settings", "heal_stage"]

_STATE = "healing.safetensors"
_REPORT = "healing.json"
_MODEL = "model"
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
    dataset = settings.dataset or (recipe.calibrate.dataset if recipe.calibrate is not None else None)
    if dataset is None:
        raise RecipeError(
            "attention.heal: learns from text, and the recipe names none; add attention.heal.dataset or calibrate"
        )
    samples = settings.steps * settings.batch + settings.held_out
    return WindowRequest("attention.heal", dataset, samples, settings.length, "shuffled", settings.seed)


def heal(
    original: Checkpoint,
    merged: Checkpoint,
    work: Path,
    output: Path,
    settings: HealSettings,
    *,
    windows: Sequence[torch.Tensor],
    identity: str,
    device: torch.device,
    progress: Progress = SILENT,
) -> HealReport:
    """Heal ``merged``; a call that was stopped continues from what it left in ``work``.

    Raises:
        LlmconvertError: see :func:`llmconvert.convert.heal.job.heal_attention`.
    """
    every = max(1, settings.steps // _LOOKS)
    options = HealOptions(
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        hidden=settings.hidden,
        held_out=settings.held_out,
        evaluate_every=every,
        save_every=every,
        seed=settings.seed,
    )
    return heal_attention(
        original,
        merged,
        output,
        windows=windows,
        options=options,
        device=device,
        state=work / _STATE,
        identity=identity,
        progress=progress,
    )


def heal_stage(
    original: Path,
    merged: Path,
    path: Path,
    settings: HealSettings,
    *,
    windows: Sequence[torch.Tensor],
    identity: str,
    device: torch.device,
    progress: Progress = SILENT,
) -> Mapping[str, Any]:
    """Heal the model of the stage ``merged`` into the stage ``path``, whatever is there already.

    The three are directories with the model in their folder ``model``.

    Returns:
        What healing reports, as JSON values.
    """
    record, model = path / _REPORT, path / _MODEL
    if model.exists() and record.exists():
        details: Mapping[str, Any] = json.loads(record.read_bytes())
    else:
        if model.exists():
            shutil.rmtree(model)
        about: dict[str, Any] = {"windows": windows, "identity": identity, "device": device, "progress": progress}
        with SafetensorsCheckpoint(original / _MODEL) as teacher, SafetensorsCheckpoint(merged / _MODEL) as student:
            report = heal(teacher, student, path, model, settings, **about)
        sections = [section.model_dump(mode="json") for section in healing_sections(report)]
        details = {**asdict(report), "sections": sections}
        write_json(record, details)
    (path / _STATE).unlink(missing_ok=True)
    return details
