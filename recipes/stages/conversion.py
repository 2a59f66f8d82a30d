"""The model in the recipe's dtype: written as a stage, or seen as it comes; of Hub models also while they download."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmconvert.convert.adapter.files import Adapter, open_adapter
from llmconvert.convert.adapter.tokenizer import other_tokenizer
from llmconvert.convert.adapter.view import AdapterView
from llmconvert.convert.cast import CastView
from llmconvert.convert.download.jobs import (
    StreamedDtypePlan,
    StreamedQuantizePlan,
    plan_stream_convert,
    plan_stream_quantize,
)
from llmconvert.convert.download.shards import describe_remote
from llmconvert.convert.dtype import DtypeRequest, plan_dtype
from llmconvert.convert.quantized import StoredAs, dense_source, require_released, stored_as
from llmconvert.convert.rope_scaling import RopeScalingView
from llmconvert.convert.source import Source, parse_hub_id, source_fingerprint
from llmconvert.errors import UnsupportedError, UsageError
from llmconvert.progress import Progress
from llmconvert.quantize.formats.base import FileFormat, load_format
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.plan import QuantizeRequest
from llmconvert.quantize.scheme import Scheme
from llmconvert.recipes.forecast import Forecast, files_of_layout
from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.recipes.stages.budget import layer_overrides
from llmconvert.recipes.stages.quantization import recovered
from llmconvert.recipes.stages.stage import ORIGINAL, Original, Place, Stage, Work
from llmconvert.report.steps import DtypeReport, StepDetails, read_details
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.dense import require_dense
from llmconvert.storage.stage_record import stage_key
from llmconvert.text.files import local_path

__all__ = [
    "DTYPES",
    "convert_stage",
    "converted_view",
    "hub_model",
    "merge_notes",
    "open_remote",
    "recipe_adapter",
    "require_source",
    "stream_stage",
]

#: The dtypes a recipe can name.
DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def convert_stage(recipe: Recipe) -> Stage[DtypeReport]:
    """Write the model in the dtype of the recipe's convert section."""

    def build(work: Work, place: Place) -> DtypeReport:
        if place.notes is not None:
            shutil.rmtree(place.model, ignore_errors=True)  # complete, and killed before it could report
        # Closed at once: what was read stays mapped until then.
        with work.source.checkpoint:
            context = replace(work.context, identity=work.view.key)
            dense = _dense(recipe, work.source, work.adapter)
            return plan_dtype(dense, place.model, _unquantized(work), context=context).run()

    def forecast(work: Work, output: Path) -> Forecast:
        source = _dense(recipe, work.source, work.adapter)
        plan = plan_dtype(source, output, _unquantized(work), context=work.context)
        files = files_of_layout(plan.layout)
        tensors = len(plan.layout.specs)
        return Forecast(plan.needs, files, tensors=tensors, kind="convert", work=source.nbytes + sum(files.values()))

    return Stage(
        "convert",
        {},
        DtypeReport.model_validate,
        build,
        lambda work: _settings(recipe, work.source, work.adapter),
        resumable=True,
        forecast=forecast,
    )


def _settings(recipe: Recipe, source: Source, adapter: Adapter | None) -> Mapping[str, Any]:
    merged = {"adapter": adapter.fingerprint} if adapter is not None else {}
    return {"source": source_fingerprint(source), **merged, **recipe.convert.model_dump(mode="json")}


def _dense(recipe: Recipe, source: Source, adapter: Adapter | None) -> Checkpoint:
    """The source's dense weights, with the adapter merged."""
    if adapter is None:
        return dense_source(source.checkpoint, DTYPES[recipe.convert.dtype])
    dense = dense_source(source.checkpoint, torch.float32)
    return AdapterView(dense, adapter)


def recipe_adapter(recipe: Recipe, progress: Progress) -> Adapter | None:
    """The adapter that the recipe names, fetched if need be; None without one.

    Raises:
        LlmconvertError: see :func:`llmconvert.convert.adapter.files.open_adapter`.
    """
    return open_adapter(recipe.adapter, progress=progress) if recipe.adapter is not None else None


def merge_notes(source: Source, adapter: Adapter | None) -> tuple[str, ...]:
    """What is to be said of an adapter that is merged into a model, beside that it is, a sentence each."""
    if adapter is None:
        return ()
    dense = dense_source(source.checkpoint, torch.float32)
    return (*AdapterView(dense, adapter).notes, *other_tokenizer(source.checkpoint, adapter))


def converted_view(
    recipe: Recipe, source: Source, stored: StoredAs | None = None, adapter: Adapter | None = None
) -> Original:
    """What :func:`convert_stage` would write; each tensor is dequantized and cast, and of a Hub model downloaded,
    whenever it is read. ``stored`` is what :func:`require_source` found, ``adapter`` is merged into it.

    It identifies itself by the key that the stage would have.
    """
    settings, key = recipe.convert, stage_key("convert", _settings(recipe, source, adapter))
    if adapter is None and any(_carried(recipe, stored)):
        return Original.seen(key, open_dense(source.checkpoint))
    dtype = DTYPES[settings.dtype]
    view: Checkpoint = CastView(_dense(recipe, source, adapter), dtype, settings.overflow)
    if settings.rope_scaling is not None:
        view = RopeScalingView(view, settings.rope_scaling)
    return Original.seen(key, view, _traffic(recipe, source))


def _carried(recipe: Recipe, stored: StoredAs | None) -> list[bool]:
    """Of each scheme that a source holds codes in, whether they go into a file as they are, in the type that has them;
    nothing where the output is no such file, or the source is dense."""
    settings = recipe.quantize
    if settings is None or stored is None:
        return []
    layout = load_format(settings.format)
    if not isinstance(layout, FileFormat):
        return []
    wanted = layout.mix_of(settings.scheme)
    return [_holds(layout, scheme) and layout.mix_of(scheme) == wanted for scheme in stored.schemes]


def _holds(layout: FileFormat, scheme: Scheme) -> bool:
    try:
        layout.check(scheme)
    except UnsupportedError:
        return False
    return True


def require_source(recipe: Recipe, source: Source) -> StoredAs | None:
    """Refuse a source that the recipe can't start from; what it is stored in where that is quantized.

    Raises:
        UsageError: it was quantized for deployment, and would be rounded a second time without having been asked for.
        UnsupportedError, CheckpointError: it is quantized in a way that isn't read.
    """
    stored = stored_as(source.checkpoint)
    kept = _carried(recipe, stored)
    if recipe.quantize is not None:
        require_released(stored, source.origin, requantize=recipe.requantize or bool(kept and all(kept)))
    return stored


def _traffic(recipe: Recipe, source: Source) -> str:
    validation = recipe.validation
    if not recipe.stream or validation is None:
        return ""
    # The inventory, the predictions and the continuations each read every tensor once.
    passes = 1 + (validation.perplexity is not None) + (validation.generation is not None)
    traffic = passes * source.checkpoint.nbytes
    return f"the original is not on this disk and is read from the Hub again, {traffic:,} bytes in all"


def stream_stage(recipe: Recipe) -> Stage[StepDetails]:
    """Quantize, or convert where the recipe quantizes nothing, while the model downloads."""
    quantize = recipe.quantize

    def build(work: Work, place: Place) -> StepDetails:
        if place.notes is not None and place.model.exists():  # complete, and killed just then
            if quantize is None:
                return StepDetails()
            found = recovered(place)
            return found.model_copy(update={"streamed": True})
        return _stream_dtype(work, place) if quantize is None else _stream_quantized(work, place)

    def settings(work: Work) -> Mapping[str, Any]:
        return {"streamed": True, **(quantize.model_dump(mode="json") if quantize is not None else {})}

    def forecast(work: Work, output: Path) -> Forecast:
        plan: StreamedDtypePlan | StreamedQuantizePlan
        if quantize is None:
            plan, readers = _plan_stream_dtype(work, output), ""
        else:
            plan = _plan_stream_quantized(work, output)
            readers = str(plan.readers)
        return Forecast(
            plan.needs,
            files_of_layout(plan.layout),
            tensors=len(plan.layout.specs),
            kind=f"stream {name}",
            work=float(work.source.checkpoint.nbytes),
            readers=readers,
        )

    name = "quantize" if quantize is not None else "convert"
    return Stage(
        name, {"model": ORIGINAL}, partial(read_details, name), build, settings, resumable=True, forecast=forecast
    )


def _stream_dtype(work: Work, place: Place) -> StepDetails:
    return _plan_stream_dtype(work, place.model).run()


def _plan_stream_dtype(work: Work, output: Path) -> StreamedDtypePlan:
    source = work.source
    return plan_stream_convert(
        source.origin,
        output,
        _unquantized(work),
        revision=source.revision,
        files=source.checkpoint.files,
        context=work.context,
    )


def _stream_quantized(work: Work, place: Place) -> StepDetails:
    """Quantize while the model downloads.

    Raises:
        UsageError: the scheme is one of GGUF's.
    """
    plan = _plan_stream_quantized(work, place.model)
    work.context.progress.log(f"{plan.request.format}: {plan.readers}")
    return plan.run()


def _plan_stream_quantized(work: Work, output: Path) -> StreamedQuantizePlan:
    source, settings = work.source, work.recipe.quantize
    assert settings is not None
    if not isinstance(settings.scheme, Scheme):
        raise UsageError(f"quantize.scheme {settings.scheme}: a GGUF file is not streamed; leave out --stream")
    overrides = tuple(layer_overrides(settings))
    request = QuantizeRequest(settings.method, settings.scheme, settings.format, overrides, settings.options)
    return plan_stream_quantize(
        source.origin,
        output,
        request,
        rest=_unquantized(work),
        revision=source.revision,
        files=source.checkpoint.files,
        context=work.context,
    )


def _unquantized(work: Work) -> DtypeRequest:
    settings = work.recipe.convert
    return DtypeRequest(DTYPES[settings.dtype], settings.overflow, settings.rope_scaling)


def hub_model(recipe: Recipe) -> tuple[str, str | None]:
    """The repository and revision to stream from.

    Raises:
        UsageError: the model is no Hub id, or its positions shall be scaled.
    """
    if recipe.convert.rope_scaling is not None:
        raise UsageError("--stream does not scale positions; leave it out, or scale the model that it wrote")
    found = parse_hub_id(recipe.model) if not local_path(recipe.model).exists() else None
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
    require_dense(model.checkpoint, recipe.model, "its scales may come with another shard; leave out --stream")
    remote = model.remote
    return Source("hub", remote.repo_id, remote.commit_hash, remote.directory, model.checkpoint)
