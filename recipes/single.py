"""The single steps, from a model named in any of its four forms: convert, quantize, validate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llmconvert.convert.cast import CastView
from llmconvert.convert.dtype import DtypeReport
from llmconvert.convert.inspection import describe_model
from llmconvert.convert.rope_scaling import RopeScalingView
from llmconvert.convert.source import open_source, source_fingerprint
from llmconvert.device import open_device
from llmconvert.errors import DatasetError, UsageError
from llmconvert.interrupt import interruptible
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.recipes.stages.artifact import REPORT_FILE, model_stem, public_name
from llmconvert.recipes.stages.gguf import GGUF, calibrates
from llmconvert.recipes.stages.measurements import measurements, require_measurable
from llmconvert.recipes.stages.steps import DTYPES, convert, measure, quantize
from llmconvert.recipes.stages.streaming import hub_model, open_remote, stream_model
from llmconvert.recipes.stages.windows import WindowRequest
from llmconvert.report.report import ModelInfo, Report, environment
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.writer import check_output_directory
from llmconvert.text.tokens import TokenWindows

__all__ = ["convert_model", "quantize_model", "validate_model"]


def convert_model(recipe: Recipe, output: Path, *, stream: bool = False, progress: Progress = SILENT) -> DtypeReport:
    """Convert ``recipe.model`` to ``recipe.convert.dtype`` in the directory ``output``.

    With ``stream``, a Hub model is converted while it downloads: disk need is the output and two source shards, and
    a call that was stopped continues.

    Raises:
        LlmconvertError: see :func:`llmconvert.convert.source.open_source` and
            :func:`llmconvert.convert.dtype.convert_dtype`.
    """
    check_output_directory(output)
    if stream:
        from llmconvert.convert.download.jobs import stream_convert

        model_id, revision = hub_model(recipe)
        settings = recipe.convert
        with interruptible():
            return stream_convert(
                model_id,
                output,
                revision=revision,
                dtype=DTYPES[settings.dtype],
                overflow=settings.overflow,
                progress=progress,
            )
    with interruptible():
        source = open_source(recipe.model, allow_pickle=recipe.allow_pickle, progress=progress)
        with source.checkpoint as checkpoint:
            return convert(checkpoint, output, recipe.convert, progress=progress)


def quantize_model(
    recipe: Recipe, output: Path, *, stream: bool = False, progress: Progress = SILENT
) -> Mapping[str, Any]:
    """Quantize ``recipe.model`` to the directory ``output``, by the recipe's quantize and calibrate sections.

    What stays unquantized is written in ``recipe.convert.dtype``. A call that was stopped continues. With ``stream``,
    a Hub model is quantized while it downloads, by a method without calibration: disk need is the output and two
    source shards.

    Raises:
        UsageError: the recipe has no quantize section, or can't be streamed.
        LlmconvertError: see :func:`llmconvert.quantize.job.quantize_checkpoint`.
    """
    if recipe.quantize is None:
        raise UsageError("nothing to quantize: the recipe has no quantize section")
    if recipe.quantize.format != GGUF:  # which may be a file, and checks its output itself
        check_output_directory(output)
    device = open_device(recipe.device)
    if stream:
        with interruptible():
            return stream_model(open_remote(recipe), output, recipe, device=device, progress=progress)
    with interruptible():
        source = open_source(recipe.model, allow_pickle=recipe.allow_pickle, progress=progress)
        with source.checkpoint:
            checkpoint = _to_quantize(source.checkpoint, recipe)
            windows: Sequence[torch.Tensor] = ()
            if recipe.calibrate is not None and calibrates(recipe.quantize):
                request = WindowRequest.calibration(recipe.calibrate)
                windows = request.draw(checkpoint, request.corpus()).windows
            return quantize(
                checkpoint,
                output,
                recipe.quantize,
                name=model_stem(source.origin),
                windows=windows,
                identity=source_fingerprint(source),
                device=device,
                memory=recipe.memory,
                progress=progress,
            )


def _to_quantize(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The source in the recipe's dtype; a quantized one as it is, where its codes may be carried over."""
    if recipe.quantize is not None and recipe.quantize.format == GGUF:
        dense = open_dense(checkpoint)
        if dense is not checkpoint:
            return dense
    view = CastView(checkpoint, DTYPES[recipe.convert.dtype])
    scaling = recipe.convert.rope_scaling
    return view if scaling is None else RopeScalingView(view, scaling)


def validate_model(recipe: Recipe, reference: str | None = None, *, progress: Progress = SILENT) -> Report:
    """Measure ``recipe.model``, by the recipe's validate section, against the model that ``reference`` names.

    Raises:
        UsageError: the recipe has no validate section, or the model is no directory.
        DatasetError: the text is what the model was calibrated on, as its own report says.
        LlmconvertError: see :func:`llmconvert.validate.artifact.validate_artifact`.
    """
    settings = recipe.validation
    if settings is None:
        raise UsageError("nothing to measure: the recipe has no validate section")
    require_measurable(settings)
    device = open_device(recipe.device)
    with interruptible("nothing was written; run the same command again"):
        source = open_source(recipe.model, progress=progress)
        original = open_source(reference, progress=progress) if reference is not None else None
        with source.checkpoint as checkpoint:
            if not source.path.is_dir() and settings.generation is not None:
                raise UsageError(f"{recipe.model}: transformers generates from directories only; leave out generation")
            summary = describe_model(checkpoint)
            windows = None
            if settings.perplexity is not None:
                request = WindowRequest.evaluation(settings.perplexity)
                windows = request.draw(checkpoint, request.corpus())
                _require_other_text(source.path, windows)
        checks = measure(
            source.path,
            original.checkpoint if original is not None else None,
            measurements(settings),
            windows,
            device=device,
            progress=progress,
        )
    return Report(
        model=ModelInfo(
            name=public_name(source.origin),
            source=public_name(original.origin if original is not None else source.origin),
            revision=(original or source).revision,
            architecture=summary.architecture,
            parameters=summary.parameters if summary.quantization is None else None,
        ),
        environment=environment(),
        checks=tuple(checks),
    )


def _require_other_text(artifact: Path, windows: TokenWindows) -> None:
    report = artifact / REPORT_FILE
    if report.is_file() and Report.read(report).model.calibration_digest == windows.corpus_digest:
        raise DatasetError(
            f"dataset {public_name(windows.dataset)}: {artifact.name} was calibrated on this very text, which would "
            "flatter it; name another split or another dataset"
        )
