"""From a causal language model's checkpoint to a smaller, measured and published artifact.

The same functions that the command line calls::

    import llmconvert

    recipe = llmconvert.load_recipe("recipes/demo.yaml", overrides=["quantize.scheme=w3a16-g64"])
    result = llmconvert.run_recipe(recipe)
    print(result.artifact, result.report.check("perplexity").value)

Importing this package loads nothing else; a name is imported from its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmconvert.version import __version__

__all__ = [
    "SILENT",
    "Check",
    "Checkpoint",
    "LlmconvertError",
    "ModelSummary",
    "Override",
    "Progress",
    "PushOptions",
    "QuantizedTensor",
    "Recipe",
    "Report",
    "RunResult",
    "SafetensorsCheckpoint",
    "Scheme",
    "Source",
    "__version__",
    "console_progress",
    "convert_dtype",
    "inspect_model",
    "load_recipe",
    "make_recipe",
    "open_source",
    "push_folder",
    "quantize_checkpoint",
    "run_batch",
    "run_recipe",
    "shipped_recipes",
    "validate_artifact",
]

_MODULES = {
    "SILENT": "progress",
    "Check": "report.report",
    "Checkpoint": "storage.checkpoint",
    "LlmconvertError": "errors",
    "ModelSummary": "convert.inspection",
    "Override": "quantize.plan",
    "Progress": "progress",
    "PushOptions": "hub",
    "QuantizedTensor": "quantize.tensor",
    "Recipe": "recipes.schema.recipe",
    "Report": "report.report",
    "RunResult": "recipes.runner",
    "SafetensorsCheckpoint": "storage.checkpoint",
    "Scheme": "quantize.scheme",
    "Source": "convert.source",
    "console_progress": "progress",
    "convert_dtype": "convert.dtype",
    "inspect_model": "convert.inspection",
    "load_recipe": "recipes.loading",
    "make_recipe": "recipes.loading",
    "open_source": "convert.source",
    "push_folder": "hub",
    "quantize_checkpoint": "quantize.job",
    "run_batch": "recipes.batch",
    "run_recipe": "recipes.runner",
    "shipped_recipes": "recipes.loading",
    "validate_artifact": "validate.artifact",
}

if TYPE_CHECKING:
    from llmconvert.convert.dtype import convert_dtype
    from llmconvert.convert.inspection import ModelSummary, inspect_model
    from llmconvert.convert.source import Source, open_source
    from llmconvert.errors import LlmconvertError
    from llmconvert.hub import PushOptions, push_folder
    from llmconvert.progress import SILENT, Progress, console_progress
    from llmconvert.quantize.job import quantize_checkpoint
    from llmconvert.quantize.plan import Override
    from llmconvert.quantize.scheme import Scheme
    from llmconvert.quantize.tensor import QuantizedTensor
    from llmconvert.recipes.batch import run_batch
    from llmconvert.recipes.loading import load_recipe, make_recipe, shipped_recipes
    from llmconvert.recipes.runner import RunResult, run_recipe
    from llmconvert.recipes.schema.recipe import Recipe
    from llmconvert.report.report import Check, Report
    from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint
    from llmconvert.validate.artifact import validate_artifact


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'llmconvert' has no attribute {name!r}")
    return getattr(importlib.import_module(f"llmconvert.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
