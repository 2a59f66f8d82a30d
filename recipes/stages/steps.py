"""The steps of a recipe as plain calls, from a recipe's sections to the functions that do the work."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmconvert.convert.dtype import DtypeReport, convert_dtype
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.job import LayerResult, quantize_checkpoint, read_layers
from llmconvert.quantize.plan import Override
from llmconvert.quantize.requantize import Assignment, requantize_checkpoint
from llmconvert.quantize.rotate import rotate_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.recipes.schema.recipe import (
    ConvertSettings,
    QuantizeSettings,
)
from llmconvert.recipes.stages.artifact import public_name
from llmconvert.recipes.stages.budget import allocation_details, choose_within, forget_sensitivity
from llmconvert.recipes.stages.gguf import GGUF, quantize_gguf
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.writer import write_json
from llmconvert.text.tokens import TokenWindows
from llmconvert.validate.artifact import validate_artifact
from llmconvert.validate.measurement import Measurement

__all__ = [
    "DTYPES",
    "LAYERS_FILE",
    "change_schemes",
    "convert",
    "layer_overrides",
    "measure",
    "quantize",
    "recorded_layers",
]

#: Of a stage: what came of each linear, kept for one that is killed between its artifact and its own record.
LAYERS_FILE = "layers.json"
# Beside it: what a budget chose.
_BUDGET_FILE = "budget.json"
#: The dtypes a recipe can name.
DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def convert(source: Checkpoint, output: Path, settings: ConvertSettings, *, progress: Progress = SILENT) -> DtypeReport:
    """Write ``source`` in the section's dtype; see :func:`llmconvert.convert.dtype.convert_dtype`."""
    return convert_dtype(
        source,
        output,
        dtype=DTYPES[settings.dtype],
        overflow=settings.overflow,
        rope_scaling=settings.rope_scaling,
        progress=progress,
    )


def quantize(
    source: Checkpoint,
    output: Path,
    settings: QuantizeSettings,
    *,
    name: str = "model",
    windows: Sequence[torch.Tensor] = (),
    identity: str = "",
    device: torch.device,
    memory: int | None,
    record: Path | None = None,
    progress: Progress = SILENT,
) -> Mapping[str, Any]:
    """Quantize ``source``, or go on where an earlier call was stopped; see
    :func:`llmconvert.quantize.job.quantize_checkpoint`.

    Args:
        name: of the model, for formats that store it.
        windows: calibration token ids, ``[1, length]`` each.
        identity: what tells this source from others that look alike; a stopped call continues only if it is the same.
        memory: bytes that may be used; what is free if None.
        record: a file for :func:`recorded_layers`.

    Returns:
        What it reports, as JSON values.
    """
    if settings.rotate is not None:
        source = rotate_checkpoint(source, **settings.rotate.model_dump())
        identity = f"{identity} rotated {settings.rotate.model_dump_json()}"
    if settings.format == GGUF:
        return quantize_gguf(
            source,
            output,
            settings,
            name=name,
            windows=windows,
            identity=identity,
            device=device,
            memory=memory,
            progress=progress,
        )
    assert isinstance(settings.scheme, Scheme)
    about: dict[str, Any] = {
        "method": settings.method,
        "options": settings.options,
        "scheme": settings.scheme,
        "format": settings.format,
        "overrides": layer_overrides(settings),
        "windows": windows,
        "device": device,
        "memory_budget": memory,
        "identity": identity,
        "progress": progress,
    }
    chosen: Mapping[str, Any] = {}
    if settings.budget is not None:
        allocation = choose_within(settings.budget, source, output, about)
        about |= {"scheme": allocation.scheme, "overrides": allocation.overrides}
        chosen = allocation_details(settings.budget, allocation)
        if record is not None:
            write_json(record.with_name(_BUDGET_FILE), chosen)
    result = quantize_checkpoint(source, output, record=record, **about)
    forget_sensitivity(output)
    return {
        **chosen,
        **_linears(result.layers),
        "bytes": result.nbytes,
        "seconds": round(result.seconds, 3),
        "phases": {name: round(seconds, 3) for name, seconds in result.phases.items()},
        "mode": result.memory.mode,
        "resumed_blocks": result.resumed_blocks,
    }


def recorded_layers(record: Path) -> Mapping[str, Any]:
    """What :func:`quantize` or :func:`change_schemes` had to report about the linears, if it got that far."""
    if not record.exists():
        return {}
    budget = record.with_name(_BUDGET_FILE)
    chosen: Mapping[str, Any] = json.loads(budget.read_bytes()) if budget.exists() else {}
    return {**chosen, **_linears(read_layers(record))}


def _linears(layers: Sequence[LayerResult]) -> Mapping[str, Any]:
    return {
        "layers": len(layers),
        "linears": [{"name": layer.name, "scheme": layer.scheme, "error": layer.error} for layer in layers],
    }


def change_schemes(
    artifact: Path,
    source: Checkpoint,
    output: Path,
    settings: QuantizeSettings,
    *,
    before: Assignment,
    changes: Assignment,
    record: Path,
    windows: Sequence[torch.Tensor] = (),
    identity: str = "",
    device: torch.device,
    memory: int | None,
    progress: Progress = SILENT,
) -> Mapping[str, Any]:
    """Write an artifact anew with other schemes for some linears; see
    :func:`llmconvert.quantize.requantize.requantize_checkpoint`.

    Returns:
        what came of the linears that were quantized anew, as JSON values.
    """
    layers = requantize_checkpoint(
        artifact,
        source,
        output,
        method=settings.method,
        options=settings.options,
        format=settings.format,
        before=before,
        changes=changes,
        record=record,
        windows=windows,
        device=device,
        memory_budget=memory,
        identity=identity,
        progress=progress,
    )
    return _linears(layers)


def layer_overrides(settings: QuantizeSettings) -> list[Override]:
    """The section's overrides as the engine takes them."""
    return [
        Override(override.match, None if override.scheme == "none" else override.scheme)
        for override in settings.overrides
    ]


def measure(
    artifact: Path,
    reference: Checkpoint | None,
    wanted: Sequence[Measurement],
    windows: TokenWindows | None,
    *,
    device: torch.device,
    progress: Progress = SILENT,
) -> list[Check]:
    """Measure an artifact; see :func:`llmconvert.validate.artifact.validate_artifact`."""
    return validate_artifact(
        artifact,
        wanted,
        reference=reference,
        windows=replace(windows, dataset=public_name(windows.dataset)) if windows is not None else None,
        device=device,
        progress=progress,
    )
