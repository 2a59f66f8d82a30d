"""The recipe's ``attention.heal`` section: which text healing learns from, and the stage that heals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmconvert.convert.heal.job import plan_heal
from llmconvert.convert.heal.options import HealOptions
from llmconvert.convert.heal.report import healing_sections
from llmconvert.recipes.forecast import Forecast, files_of_layout, parameters
from llmconvert.recipes.schema.recipe import HealSettings
from llmconvert.recipes.stages.stage import ORIGINAL, Place, Stage, Work
from llmconvert.recipes.stages.training.settings import common_options, trained_once, training_tokens
from llmconvert.recipes.stages.windows import HEALING_TEXT
from llmconvert.report.steps import HealReport

__all__ = ["heal_stage"]

# Looks at the held-out text in a whole healing; each costs as much as a few steps.
_LOOKS = 8


def heal_stage(settings: HealSettings, after: str) -> Stage[HealReport]:
    """Heal the model of the stage ``after``, by distillation from the original; see
    :func:`llmconvert.convert.heal.job.plan_heal`. What was trained survives a kill at any point."""

    def build(work: Work, place: Place) -> HealReport:
        def train(state: Path) -> HealReport:
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
            return report.model_copy(update={"sections": tuple(healing_sections(report))})

        return trained_once(place, "healing", HealReport, train)

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
            return Forecast(
                plan.needs,
                files_of_layout(plan.layout),
                tensors=len(plan.layout.specs),
                model=student,
                kind=f"heal {'' if settings.train == 'attention' else f'{settings.train} '}{work.context.device.type}",
                work=float(parameters(student) * training_tokens(settings)),
            )

    def inputs(work: Work) -> Mapping[str, Any]:
        return {"device": work.context.device.type, **settings.model_dump(mode="json")}

    order = {"original": ORIGINAL, "model": after, "text": HEALING_TEXT}
    return Stage("heal", order, HealReport.model_validate, build, inputs, resumable=True, forecast=forecast)


def _options(settings: HealSettings) -> HealOptions:
    common = common_options(settings, _LOOKS)
    return HealOptions(**common, train=settings.train, rank=settings.rank, alpha=settings.alpha)
