"""Take a causal language model's checkpoint to a smaller, measured and published artifact.

The functions that the command line calls, one per command, with its options as keyword arguments::

    import llmconvert

    llmconvert.quantize_model("org/name", "out/w4", scheme="w4a16-g128", calibration="pydoc-topics:train")
    report = llmconvert.validate_model("out/w4", "org/name", text="pydoc-topics:test")
    print(report["perplexity"].value)

    recipe = llmconvert.load_recipe("recipes/demo.yaml", overrides=["quantize.scheme=w3a16-g64"])
    result = llmconvert.run_recipe(recipe)
    print(result.artifact, result.report["perplexity"].value)

Importing this package loads nothing else; a name is imported from its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmconvert.version import __version__

__all__ = [
    "SILENT",
    "AttentionReport",
    "CalibrationError",
    "CapacityError",
    "ChangedError",
    "Check",
    "Checkpoint",
    "CheckpointError",
    "Column",
    "ConvertedModel",
    "DatasetError",
    "DistilReport",
    "DtypeReport",
    "GateError",
    "HealReport",
    "HubError",
    "LlmconvertError",
    "MachineError",
    "Measurement",
    "ModelInfo",
    "ModelSummary",
    "Outcome",
    "OutputError",
    "Override",
    "Plot",
    "Progress",
    "PushPlan",
    "QuantizeReport",
    "QuantizedModel",
    "QuantizedTensor",
    "Recipe",
    "RecipeError",
    "Report",
    "RunInterruptedError",
    "RunPlan",
    "RunResult",
    "SafetensorsCheckpoint",
    "Scheme",
    "SchemeError",
    "Section",
    "Series",
    "Source",
    "SourceError",
    "Step",
    "Subject",
    "Sweep",
    "SweepResult",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "compare_reports",
    "console_progress",
    "convert_dtype",
    "convert_model",
    "inspect_model",
    "load_recipe",
    "load_sweep",
    "make_recipe",
    "make_sweep",
    "open_source",
    "plan_push",
    "plan_recipe",
    "plan_sweep",
    "push_model",
    "quantize_checkpoint",
    "quantize_model",
    "read_reports",
    "render_comparison",
    "render_html",
    "require_passed",
    "run_batch",
    "run_recipe",
    "run_sweep",
    "shipped_recipes",
    "validate_model",
]

_MODULES = {
    "run_sweep": "recipes.sweep.job",
    "make_sweep": "recipes.sweep.expand",
    "load_sweep": "recipes.sweep.expand",
    "SweepResult": "recipes.sweep.result",
    "Sweep": "recipes.sweep.expand",
    "SILENT": "progress",
    "AttentionReport": "report.steps",
    "CalibrationError": "errors",
    "CapacityError": "errors",
    "ChangedError": "errors",
    "Check": "report.report",
    "Checkpoint": "storage.checkpoint",
    "CheckpointError": "errors",
    "Column": "report.section",
    "ConvertedModel": "api",
    "DatasetError": "errors",
    "QuantizeReport": "report.steps",
    "DtypeReport": "report.steps",
    "GateError": "errors",
    "DistilReport": "report.steps",
    "HealReport": "report.steps",
    "HubError": "errors",
    "LlmconvertError": "errors",
    "MachineError": "errors",
    "Measurement": "validate.measurement",
    "ModelInfo": "report.report",
    "ModelSummary": "convert.inspection",
    "Outcome": "recipes.batch.outcome",
    "OutputError": "errors",
    "Override": "quantize.plan",
    "Plot": "report.section",
    "Progress": "progress",
    "PushPlan": "hub",
    "QuantizedModel": "api",
    "QuantizedTensor": "quantize.tensor",
    "Recipe": "recipes.schema.recipe",
    "RecipeError": "errors",
    "Report": "report.report",
    "RunInterruptedError": "errors",
    "RunPlan": "recipes.planning.plan",
    "RunResult": "recipes.runner",
    "SafetensorsCheckpoint": "storage.checkpoint",
    "Scheme": "quantize.scheme",
    "SchemeError": "errors",
    "Section": "report.section",
    "Series": "report.section",
    "Source": "convert.source",
    "SourceError": "errors",
    "Step": "report.report",
    "Subject": "validate.measurement",
    "UnsupportedError": "errors",
    "UsageError": "errors",
    "compare_reports": "validate.render.comparison",
    "console_progress": "progress",
    "convert_dtype": "convert.dtype",
    "convert_model": "api",
    "inspect_model": "convert.inspection",
    "load_recipe": "recipes.loading",
    "make_recipe": "recipes.loading",
    "open_source": "convert.source",
    "plan_push": "recipes.publishing",
    "plan_recipe": "recipes.planning.planner",
    "plan_sweep": "recipes.plans.sweep",
    "push_model": "api",
    "quantize_checkpoint": "quantize.job",
    "quantize_model": "api",
    "read_reports": "validate.render.comparison",
    "render_comparison": "validate.render.comparison",
    "render_html": "validate.render.html",
    "require_passed": "report.report",
    "run_batch": "recipes.batch.run",
    "run_recipe": "recipes.runner",
    "shipped_recipes": "recipes.shipped",
    "validate_model": "api",
}

if TYPE_CHECKING:
    from llmconvert.api import ConvertedModel, QuantizedModel, convert_model, push_model, quantize_model, validate_model
    from llmconvert.convert.dtype import convert_dtype
    from llmconvert.convert.inspection import ModelSummary, inspect_model
    from llmconvert.convert.source import Source, open_source
    from llmconvert.errors import (
        CalibrationError,
        CapacityError,
        ChangedError,
        CheckpointError,
        DatasetError,
        GateError,
        HubError,
        LlmconvertError,
        MachineError,
        OutputError,
        RecipeError,
        RunInterruptedError,
        SchemeError,
        SourceError,
        UnsupportedError,
        UsageError,
    )
    from llmconvert.hub import PushPlan
    from llmconvert.progress import SILENT, Progress, console_progress
    from llmconvert.quantize.job import quantize_checkpoint
    from llmconvert.quantize.plan import Override
    from llmconvert.quantize.scheme import Scheme
    from llmconvert.quantize.tensor import QuantizedTensor
    from llmconvert.recipes.batch.outcome import Outcome
    from llmconvert.recipes.batch.run import run_batch
    from llmconvert.recipes.loading import load_recipe, make_recipe
    from llmconvert.recipes.planning.plan import RunPlan
    from llmconvert.recipes.planning.planner import plan_recipe
    from llmconvert.recipes.plans.sweep import plan_sweep
    from llmconvert.recipes.publishing import plan_push
    from llmconvert.recipes.runner import RunResult, run_recipe
    from llmconvert.recipes.schema.recipe import Recipe
    from llmconvert.recipes.shipped import shipped_recipes
    from llmconvert.recipes.sweep.expand import Sweep, load_sweep, make_sweep
    from llmconvert.recipes.sweep.job import run_sweep
    from llmconvert.recipes.sweep.result import SweepResult
    from llmconvert.report.report import Check, ModelInfo, Report, Step, require_passed
    from llmconvert.report.section import Column, Plot, Section, Series
    from llmconvert.report.steps import AttentionReport, DistilReport, DtypeReport, HealReport, QuantizeReport
    from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint
    from llmconvert.validate.measurement import Measurement, Subject
    from llmconvert.validate.render.comparison import compare_reports, read_reports, render_comparison
    from llmconvert.validate.render.html import render_html


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'llmconvert' has no attribute {name!r}")
    return getattr(importlib.import_module(f"llmconvert.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
