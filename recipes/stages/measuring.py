"""The stage that measures a finished model, as the recipe's validate section asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmconvert.context import Context
from llmconvert.recipes.schema.recipe import ValidateSettings
from llmconvert.recipes.stages.artifact import public_name
from llmconvert.recipes.stages.measurements import measurements
from llmconvert.recipes.stages.stage import ORIGINAL, Place, Stage, Work
from llmconvert.recipes.stages.windows import CALIBRATION, EVALUATION_TEXT
from llmconvert.report.report import Check
from llmconvert.report.section import Value
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.text.tokens import TokenWindows, check_disjoint
from llmconvert.validate.artifact import validate_artifact
from llmconvert.validate.measurement import Measurement

__all__ = ["Measured", "measure", "validate_stage"]


class Measured(Value):
    """What a measuring stage has to say."""

    checks: tuple[Check, ...]


def validate_stage(
    settings: ValidateSettings, model: str, between: Sequence[str], name: str = "validate"
) -> Stage[Measured]:
    """Measure the model of a stage against the original.

    Args:
        model: the stage that made it.
        between: stages on the way to it whose dense models are scored as well, for what each step cost.
    """

    def build(work: Work, place: Place) -> Measured:
        if work.original.note:
            work.context.progress.log(f"validate: {work.original.note}")
        calibration, evaluation = work.texts.get(CALIBRATION), work.texts.get(EVALUATION_TEXT)
        overlap = None
        if calibration is not None and evaluation is not None:
            overlap = check_disjoint(calibration, evaluation).fraction
        passed = {step: work.finished[step].model for step in between}
        wanted = measurements(settings, overlap=overlap, between=passed, last=model)
        with work.original.open() as reference:
            checks = measure(work.finished[model].model, reference, wanted, evaluation, context=work.context)
        return Measured(checks=tuple(checks))

    def inputs(work: Work) -> Mapping[str, Any]:
        own = {"between": [work.key(step) for step in between], "device": work.context.device.type}
        return {**own, **settings.model_dump(mode="json", exclude={"repair"})}

    after = {"original": ORIGINAL, "artifact": model, "text": EVALUATION_TEXT, "calibration": CALIBRATION}
    return Stage(name, after, Measured.model_validate, build, inputs)


def measure(
    artifact: Path,
    reference: Checkpoint | None,
    wanted: Sequence[Measurement],
    windows: TokenWindows | None,
    *,
    context: Context,
) -> list[Check]:
    """Measure an artifact; see :func:`llmconvert.validate.artifact.validate_artifact`."""
    return validate_artifact(
        artifact,
        wanted,
        reference=reference,
        windows=replace(windows, dataset=public_name(windows.dataset)) if windows is not None else None,
        device=context.device,
        progress=context.progress,
    )
