"""Recipes that work on a Hub model while it downloads: the original is never on this disk as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llmconvert.convert.download.jobs import stream_convert, stream_quantize
from llmconvert.convert.download.shards import describe_remote
from llmconvert.convert.source import Source, parse_hub_id
from llmconvert.errors import UsageError
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.scheme import Scheme
from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.recipes.stages.steps import DTYPES, layer_overrides
from llmconvert.storage.dense import require_dense

__all__ = ["hub_model", "open_remote", "stream_model"]


def hub_model(recipe: Recipe) -> tuple[str, str | None]:
    """The repository and revision to stream from.

    Raises:
        UsageError: the model is no Hub id, or its positions shall be scaled.
    """
    if recipe.convert.rope_scaling is not None:
        raise UsageError("--stream does not scale positions; leave it out, or scale the model that it wrote")
    found = parse_hub_id(recipe.model) if not Path(recipe.model).expanduser().exists() else None
    if found is None:
        raise UsageError(
            f"{recipe.model}: only a Hub model (org/name) downloads and can be streamed; leave out --stream"
        )
    return found


def open_remote(recipe: Recipe) -> Source:
    """The recipe's model, of which the headers and the small files are fetched; tensors are read from the Hub.

    Raises:
        UsageError: the model is no Hub id, or it is quantized.
        HubError, CheckpointError: see :func:`llmconvert.convert.download.shards.describe_remote`.
    """
    model = describe_remote(*hub_model(recipe))
    require_dense(model.checkpoint, recipe.model)
    remote = model.remote
    return Source("hub", remote.repo_id, remote.commit_hash, remote.directory, model.checkpoint)


def stream_model(
    source: Source, output: Path, recipe: Recipe, *, device: torch.device, progress: Progress = SILENT
) -> Mapping[str, Any]:
    """Quantize, or convert where the recipe quantizes nothing, while the model downloads. A stopped call continues.

    Returns:
        What was done, as JSON values.

    Raises:
        UsageError: the scheme is one of GGUF's.
        LlmconvertError: see :func:`llmconvert.convert.download.jobs.stream_quantize`.
    """
    dtype, overflow, settings = DTYPES[recipe.convert.dtype], recipe.convert.overflow, recipe.quantize
    if settings is None:
        return asdict(
            stream_convert(
                source.origin, output, revision=source.revision, dtype=dtype, overflow=overflow, progress=progress
            )
        )
    if not isinstance(settings.scheme, Scheme):
        raise UsageError(f"quantize.scheme {settings.scheme}: a GGUF file is not streamed; leave out --stream")
    return stream_quantize(
        source.origin,
        output,
        revision=source.revision,
        dtype=dtype,
        overflow=overflow,
        method=settings.method,
        options=settings.options,
        scheme=settings.scheme,
        format=settings.format,
        overrides=layer_overrides(settings),
        device=device,
        progress=progress,
    )
