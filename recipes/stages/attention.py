"""The recipe's attention section: which rewrites can be done, and the stage that does them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmconvert.convert.gqa.geometry import read_geometry, require_kv_heads
from llmconvert.convert.gqa.job import AttentionRequest, plan_attention
from llmconvert.convert.gqa.report import attention_sections
from llmconvert.recipes.forecast import Forecast, files_of_layout, parameters
from llmconvert.recipes.schema.recipe import AttentionSettings
from llmconvert.recipes.stages.stage import ORIGINAL, Place, Stage, Work
from llmconvert.recipes.stages.windows import CALIBRATION
from llmconvert.report.steps import AttentionReport
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["attention_stage", "require_mergeable"]


def require_mergeable(checkpoint: Checkpoint, settings: AttentionSettings) -> None:
    """Refuse a model whose heads can't be merged as the section asks; nothing but headers is read.

    Raises:
        UnsupportedError: an architecture, or a number of heads, with those that are possible.
        CheckpointError: tensors are missing or contradict the config.
    """
    require_kv_heads(read_geometry(checkpoint), settings.kv_heads)


def attention_stage(settings: AttentionSettings) -> Stage[AttentionReport]:
    """Merge the original's key-value heads, on the calibration text where there is one; see
    :func:`llmconvert.convert.gqa.job.plan_attention`."""

    def build(work: Work, place: Place) -> AttentionReport:
        if place.notes is not None:
            shutil.rmtree(place.model, ignore_errors=True)  # complete, and killed before it could report
        with work.original.open() as checkpoint:
            report = plan_attention(
                checkpoint,
                place.model,
                AttentionRequest(settings.kv_heads, settings.method, settings.refit),
                windows=work.windows(CALIBRATION),
                context=work.context_of(ORIGINAL),
            ).run()
        return report.model_copy(update={"sections": tuple(attention_sections(report))})

    def forecast(work: Work, output: Path) -> Forecast:
        windows = work.windows(CALIBRATION)
        with work.original.open() as checkpoint:
            plan = plan_attention(
                checkpoint,
                output,
                AttentionRequest(settings.kv_heads, settings.method, settings.refit),
                windows=windows,
                context=work.context_of(ORIGINAL),
            )
        tokens = sum(window.shape[1] for window in windows) if plan.calibrated else 1
        return Forecast(
            plan.needs,
            files_of_layout(plan.layout),
            tensors=len(plan.layout.specs),
            model=plan.view,
            kind=f"attention {settings.method}{' refit' if plan.calibrated else ''} {work.context.device.type}",
            work=float(parameters(plan.view) * tokens),
        )

    def inputs(work: Work) -> Mapping[str, Any]:
        return {"device": work.context.device.type, **settings.model_dump(mode="json", exclude={"heal"})}

    after = {"model": ORIGINAL, "calibration": CALIBRATION}
    return Stage("attention", after, AttentionReport.model_validate, build, inputs, resumable=True, forecast=forecast)
