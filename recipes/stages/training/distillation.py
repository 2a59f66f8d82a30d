"""The recipe's ``quantize.distil`` section: which text distillation learns from, and the stage that distils."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmconvert.gguf.checkpoint import open_artifact
from llmconvert.quantize.distil.job import plan_distil
from llmconvert.quantize.distil.memory import foresee_distil
from llmconvert.quantize.distil.options import DistilOptions
from llmconvert.quantize.distil.report import distillation_sections
from llmconvert.quantize.formats.base import FileFormat, load_format
from llmconvert.quantize.scheme import SchemeOrMix
from llmconvert.recipes.forecast import Forecast, parameters
from llmconvert.recipes.schema.recipe import DistilSettings
from llmconvert.recipes.stages.stage import ORIGINAL, Place, Stage, Work
from llmconvert.recipes.stages.training.settings import common_options, trained_once, training_tokens
from llmconvert.recipes.stages.windows import DISTIL_TEXT
from llmconvert.report.steps import DistilReport

__all__ = ["DISTIL", "distil_stage"]

#: The name of the stage.
DISTIL = "distil"
# Looks at the held-out text in a whole distillation; each costs as much as a few steps.
_LOOKS = 6


def distil_stage(settings: DistilSettings, after: str, scheme: SchemeOrMix | None) -> Stage[DistilReport]:
    """Train what the artifact of the stage ``after`` stores, against the original's predictions; see
    :func:`llmconvert.quantize.distil.job.plan_distil`. What was trained survives a kill at any point.

    Args:
        settings: how.
        after: the stage whose artifact is trained.
        scheme: that it is stored in, if the recipe says so.
    """

    def build(work: Work, place: Place) -> DistilReport:
        def train(state: Path) -> DistilReport:
            with work.original.open() as teacher, open_artifact(work.finished[after].model) as student:
                report = plan_distil(
                    teacher,
                    student,
                    place.model,
                    _options(settings),
                    windows=work.windows(DISTIL_TEXT),
                    context=work.context_of(after),
                    state=state,
                ).run()
            return report.model_copy(update={"sections": tuple(distillation_sections(report))})

        return trained_once(place, "distillation", DistilReport, train)

    def forecast(work: Work, output: Path) -> Forecast:
        with work.original.open() as teacher:
            made = work.recipe.quantize
            outer = made is not None and isinstance(load_format(made.format), FileFormat)
            about: dict[str, Any] = {"context": work.context_of(after), "scheme": scheme, "outer": outer}
            needs = foresee_distil(teacher, _options(settings), settings.length, **about)
            kind = f"distil {'codes ' if settings.code_rate else ''}{work.context.device.type}"
            return Forecast(needs, kind=kind, work=float(parameters(teacher) * training_tokens(settings)))

    def inputs(work: Work) -> Mapping[str, Any]:
        return {"device": work.context.device.type, **settings.model_dump(mode="json")}

    order = {"original": ORIGINAL, "model": after, "text": DISTIL_TEXT}
    return Stage(DISTIL, order, DistilReport.model_validate, build, inputs, resumable=True, forecast=forecast)


def _options(settings: DistilSettings) -> DistilOptions:
    return DistilOptions(**common_options(settings, _LOOKS), code_rate=settings.code_rate, norms=settings.norms)
