"""The recipe's attention section: which rewrites can be done, and doing them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llmconvert.convert.cast import CastView
from llmconvert.convert.gqa.geometry import read_geometry, require_kv_heads
from llmconvert.convert.gqa.job import AttentionReport, convert_attention
from llmconvert.convert.gqa.report import attention_sections
from llmconvert.convert.heal.job import HealReport
from llmconvert.convert.rope_scaling import RopeScalingView
from llmconvert.convert.source import open_source, source_fingerprint
from llmconvert.device import open_device
from llmconvert.errors import UsageError
from llmconvert.interrupt import interruptible
from llmconvert.progress import SILENT, Progress
from llmconvert.recipes.schema.recipe import AttentionSettings, Recipe
from llmconvert.recipes.stages.healing import heal, heal_request, heal_settings
from llmconvert.recipes.stages.steps import DTYPES
from llmconvert.recipes.stages.windows import WindowRequest
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint
from llmconvert.storage.stages import StageStore
from llmconvert.storage.writer import check_output_directory

__all__ = ["require_mergeable", "rewrite_attention", "rewrite_model"]


def require_mergeable(checkpoint: Checkpoint, settings: AttentionSettings) -> None:
    """Refuse a model whose heads can't be merged as the section asks; nothing but headers is read.

    Raises:
        UnsupportedError: an architecture, or a number of heads, with those that are possible.
        CheckpointError: tensors are missing or contradict the config.
    """
    require_kv_heads(read_geometry(checkpoint), settings.kv_heads)


def rewrite_attention(
    source: Checkpoint,
    output: Path,
    settings: AttentionSettings,
    *,
    windows: Sequence[torch.Tensor],
    device: torch.device,
    progress: Progress = SILENT,
) -> Mapping[str, Any]:
    """Merge key-value heads as the section asks; see :func:`llmconvert.convert.gqa.job.convert_attention`.

    Returns:
        What it reports, as JSON values.
    """
    report = _convert(source, output, settings, windows, device, progress)
    sections = [section.model_dump(mode="json") for section in attention_sections(report)]
    return {**asdict(report), "sections": sections}


def rewrite_model(
    recipe: Recipe, output: Path, *, progress: Progress = SILENT
) -> tuple[AttentionReport, HealReport | None]:
    """Merge the key-value heads of ``recipe.model`` into the directory ``output``, by its attention section.

    Weights are written in ``recipe.convert.dtype``; without a calibrate section the weights alone decide. Where the
    section heals, the merged model and the state of healing wait in a hidden directory beside the output, and a call
    that was stopped continues from them.

    Returns:
        What the merge reports, and what healing does; None without healing.

    Raises:
        UsageError: the recipe has no attention section.
        LlmconvertError: see :func:`llmconvert.convert.gqa.job.convert_attention` and
            :func:`llmconvert.convert.heal.job.heal_attention`.
    """
    settings = recipe.attention
    if settings is None:
        raise UsageError("nothing to rewrite: the recipe has no attention section")
    check_output_directory(output)
    request, healing = heal_request(recipe), heal_settings(recipe)
    device = open_device(recipe.device)
    with interruptible():
        source = open_source(recipe.model, allow_pickle=recipe.allow_pickle, progress=progress)
        with source.checkpoint:
            checkpoint: Checkpoint = CastView(source.checkpoint, DTYPES[recipe.convert.dtype], recipe.convert.overflow)
            if recipe.convert.rope_scaling is not None:
                checkpoint = RopeScalingView(checkpoint, recipe.convert.rope_scaling)
            require_mergeable(checkpoint, settings)
            windows: Sequence[torch.Tensor] = ()
            if recipe.calibrate is not None:
                calibration = WindowRequest.calibration(recipe.calibrate)
                windows = calibration.draw(checkpoint, calibration.corpus()).windows
            if healing is None or request is None:
                return _convert(checkpoint, output, settings, windows, device, progress), None
            lessons = request.draw(checkpoint, request.corpus())
            with StageStore(output.with_name(f".{output.name}.healing"), progress=progress) as store:
                stages = store.begin("convert")

                def merge(path: Path) -> Mapping[str, Any]:
                    return asdict(_convert(checkpoint, path / "model", settings, windows, device, progress))

                inputs = {"source": source_fingerprint(source), "recipe": recipe.to_mapping(), "text": lessons.digest}
                merged = stages.run("merged", inputs, merge)
                with SafetensorsCheckpoint(merged.path / "model") as student:
                    healed = heal(
                        checkpoint,
                        student,
                        store.work_dir,
                        output,
                        healing,
                        windows=lessons.windows,
                        identity=merged.key,
                        device=device,
                        progress=progress,
                    )
            shutil.rmtree(store.work_dir)
            return AttentionReport.from_mapping(merged.details), healed


def _convert(
    source: Checkpoint,
    output: Path,
    settings: AttentionSettings,
    windows: Sequence[torch.Tensor],
    device: torch.device,
    progress: Progress,
) -> AttentionReport:
    return convert_attention(
        source,
        output,
        kv_heads=settings.kv_heads,
        method=settings.method,
        windows=windows,
        refit=settings.refit,
        device=device,
        progress=progress,
    )
