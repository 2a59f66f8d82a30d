"""Quantizing a checkpoint into an artifact: everything is settled first, then carried out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmconvert.context import Context
from llmconvert.engine.discovery import PROBE_LENGTH, BlockPlan, discover
from llmconvert.engine.memory import choose_mode
from llmconvert.engine.sites import head_tensor
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.stream import Mode
from llmconvert.errors import CalibrationError, LlmconvertError, MachineError, UnsupportedError
from llmconvert.gguf.ggml.mix import FLOATS, GgmlMix
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.formats.base import FileFormat, Format, load_format
from llmconvert.quantize.formats.container import ContainerRequest
from llmconvert.quantize.formats.experts import experts_in_one
from llmconvert.quantize.formats.loading import as_loaded
from llmconvert.quantize.formats.outer import with_head_settled
from llmconvert.quantize.matrix import check_combination
from llmconvert.quantize.methods.base import (
    BlockQuantizer,
    GgmlQuantizer,
    Method,
    Quantizer,
    ScalingQuantizer,
    load_method,
)
from llmconvert.quantize.methods.imatrix import weighs
from llmconvert.quantize.passes.original import can_share
from llmconvert.quantize.passes.run import Inputs, QuantizePlan, QuantizeResult
from llmconvert.quantize.plan import (
    CacheKind,
    Override,
    QuantizeRequest,
    RuntimeName,
    ShownTokens,
    Statistics,
    plan_encoding,
    plan_quantization,
    with_cache,
    work_nbytes,
)
from llmconvert.quantize.scheme import Scheme, SchemeOrMix
from llmconvert.storage.artifact import output_nbytes
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.dense import require_dense
from llmconvert.storage.writer import DEFAULT_SHARD_BYTES

if TYPE_CHECKING:
    from llmconvert.gguf.export import TensorTypes

__all__ = ["Verdict", "judge_model", "plan_quantize", "quantize_checkpoint"]

# Of 4 bits, from large groups to small ones, which fit more widths.
_USUAL = ("w4a16-g128", "w4a16-g64", "w4a16-g32", "w4a16-channel")


def plan_quantize(
    source: Checkpoint,
    output: Path,
    request: QuantizeRequest,
    *,
    windows: Sequence[torch.Tensor] = (),
    context: Context | None = None,
    original: Checkpoint | None = None,
    record: Path | None = None,
    build: Callable[..., Skeleton] = Skeleton,
) -> QuantizePlan:
    """Settle the quantization of the linears of every decoder block; nothing but headers is read, nothing written.

    Args:
        source: dense weights. Codes of a :class:`~llmconvert.quantize.formats.dense_view.QuantizedView` are taken over
            where the format has a type of its own for every tensor, and this is the type that holds them.
        output: directory or file to create; it appears when it is complete.
        request: method, scheme, format, …
        windows: calibration token ids, each ``[1, length]``; one batch each.
        context: device, memory and progress, one unit per block. Its identity stands for ``original`` too.
        original: dense weights whose outputs the methods with a second stream aim at, where the source has lost some
            already; the source by default.
        record: file for :attr:`QuantizeResult.layers`, written before the artifact appears, so that who finds the one
            can read the other (:func:`read_layers`).
        build: builds the model on shapes; may give one that is kept for other plans, where this one is not run.

    Raises:
        UsageError: something in the request cannot be done; see its subclasses.
        CalibrationError: the method needs text and was given none, or the forward never calls one of the linears.
        CapacityError: memory does not suffice, with what would fit.
    """
    context = context or Context()
    again = partial(plan_quantize, source, output, windows=windows, context=context, original=original, record=record)
    chosen, layout_format = load_method(request.method, request.options), load_format(request.format, request.runtime)
    layout_format.check_output(output)
    check_combination(chosen, request.scheme, layout_format)
    if request.split_nbytes is not None and not isinstance(layout_format, FileFormat):
        raise UnsupportedError(
            f"split_max_size: is for GGUF; files of {request.format} are as large as max_shard_bytes"
        )
    if request.statistics == "original" and not can_share(chosen):
        raise UnsupportedError(
            f"method {request.method!r} needs to see what the linears before have become, or no text at all; "
            "statistics of the original are for gptq, imatrix and their like: leave them sequential"
        )
    if request.statistics == "original" and request.kv_cache is not None:
        raise UnsupportedError("kv_cache: a cache's scales are taken sequentially; leave it or statistics out")
    if request.experts == "all" and chosen.calibration not in ("inputs", "block"):
        raise UnsupportedError(
            f"experts: all is for methods that measure what comes to linears; {request.method!r} does not: leave it out"
        )
    require_dense(source, "the source")
    layout_format.check_source(source)
    calibrated = chosen.calibration != "none" or request.fixes_inputs or request.kv_cache is not None
    if calibrated and not windows:
        what = f"scheme {request.scheme}" if request.fixes_inputs else "kv_cache"
        what = f"method {request.method!r}" if chosen.calibration != "none" else what
        raise CalibrationError(f"{what} needs calibration text and was given none")
    _require_shareable(request, chosen, len(windows) if calibrated else None, context)
    if request.kv_cache is not None:  # whose watchers are put into the model
        build = Skeleton
    skeleton = _skeleton(source, context.device, layout_format, request, build)
    source = skeleton.checkpoint
    calibrated_experts = "experts: all" if request.experts == "all" else ""
    calibrated_experts = calibrated_experts or ("min_tokens_per_expert" if request.min_tokens_per_expert else "")
    if calibrated_experts and not any(skeleton.experts):
        raise UnsupportedError(
            f"{calibrated_experts}: architecture {skeleton.architecture.model_type!r} has no experts that are "
            "quantized one by one; leave it out"
        )
    if not context.ranks.alone and isinstance(chosen, ScalingQuantizer) and any(skeleton.experts):
        raise UnsupportedError(
            f"method {request.method!r} with {context.ranks.count} processes: moves no scales of experts then; use "
            "gptq or gptaq, or one process"
        )
    lengths = [window.shape[1] for window in windows] if calibrated else []
    blocks = discover(skeleton, max(lengths) if lengths else PROBE_LENGTH)
    if lengths:
        _require_a_state_for_each(skeleton, blocks, max(lengths))
    decisions, work, scale_dtype = plan_encoding(skeleton), 0, skeleton.dtype
    types: TensorTypes | None = None
    schemes: SchemeOrMix | Mapping[str, Scheme] = request.scheme
    overrides = request.overrides
    if isinstance(layout_format, FileFormat):
        types = layout_format.types(source, request.scheme, overrides, importance=weighs(chosen))
        if overrides or not isinstance(request.scheme, Scheme):
            schemes, overrides = layout_format.schemes(types, request.scheme), ()
    if not isinstance(chosen, GgmlQuantizer) or isinstance(request.scheme, Scheme):
        assert isinstance(chosen, Quantizer)  # it chooses codes of schemes
        assert not isinstance(schemes, GgmlMix)  # formats without types of tensors have no mixes
        decisions = plan_quantization(skeleton, blocks, schemes, overrides, chosen, layout_format)
        if calibrated_experts and not any(decisions.sites[name].kind == "expert" for name in decisions.schemes):
            raise UnsupportedError(f"{calibrated_experts}: the overrides leave every expert dense; leave it out")
        if request.kv_cache is not None:
            decisions = with_cache(decisions, skeleton, layout_format, request.kv_cache)
        work = work_nbytes(skeleton, blocks, decisions, chosen, skeleton.dtype)
        if isinstance(chosen, BlockQuantizer) and any(skeleton.experts):  # what an expert is to give for every token
            work += sum(lengths) * skeleton.hidden_size * skeleton.dtype.itemsize
        # Formats with several schemes in one model have one dtype for all their scales.
        scale_dtype = layout_format.scale_dtype(next(iter(decisions.schemes.values())), skeleton.dtype)
    if calibrated and types is not None and types.linears.get(head_tensor(skeleton.outer) or "", "F32") not in FLOATS:
        decisions = replace(decisions, head=head_tensor(skeleton.outer))
    streams = 2 if chosen.original else 1
    own = [lengths[number] for number in context.ranks.share(len(lengths))]
    sharing = context.ranks.local_count if context.device.type == "cpu" else 1
    memory = choose_mode(skeleton, blocks, own, work, context.memory, request.mode, streams=streams, processes=sharing)
    wanted = ContainerRequest(
        chosen,
        request.scheme,
        decisions.specs,
        decisions.declared,
        request.name or output.name,
        request.max_shard_bytes,
        None if types is None else types.stored,
        request.split_nbytes,
        (request.text, len(windows)),
    )
    container = (decisions.layout or layout_format).container(source, output, wanted)
    # Hidden states of every batch at two blocks' entries, for every stream.
    states = 2 * streams * sum(lengths) * skeleton.hidden_size * skeleton.dtype.itemsize
    disk = output_nbytes(container.layout, container.config, container.files) + states
    needs = memory.needs(skeleton.device, disk=disk, passing=states)
    inputs = Inputs(
        source, output, tuple(windows), context, original, record, skeleton, blocks, chosen, scale_dtype, work, again
    )
    return QuantizePlan(request, decisions, memory, container, needs, inputs)


def _require_a_state_for_each(skeleton: Skeleton, blocks: Sequence[BlockPlan], length: int) -> None:
    """Refuse to calibrate a model with more or fewer hidden states than the ``length`` tokens it was traced with."""
    if any(block.entering != length * skeleton.hidden_size for block in blocks):
        raise UnsupportedError(
            f"architecture {skeleton.architecture.model_type!r}: its blocks get more or fewer hidden states than the "
            "text has tokens, and calibration keeps one for each; use method: rtn or hqq, which need no text"
        )


def _require_shareable(request: QuantizeRequest, chosen: Method, windows: int | None, context: Context) -> None:
    """Refuse what several processes can't do together; ``windows`` of calibration text, None without any."""
    count = context.ranks.count
    if count == 1:
        return
    if chosen.calibration == "block":
        raise UnsupportedError(
            f"method {request.method!r} with {count} processes: it trains whole blocks in one; use gptq, gptaq, awq, "
            "smoothquant, imatrix, rtn or hqq, or one process"
        )
    if request.statistics == "original":
        raise UnsupportedError(
            f"statistics: original with {count} processes: leave statistics sequential, or use one process"
        )
    if windows is not None and windows < count:
        raise UnsupportedError(
            f"{count} processes have {windows} windows of calibration text to share; start at most {windows}, or give "
            "more text (samples)"
        )


def _skeleton(
    source: Checkpoint,
    device: torch.device,
    layout: Format,
    request: QuantizeRequest | None = None,
    build: Callable[..., Skeleton] = Skeleton,
) -> Skeleton:
    """The model of a checkpoint as an artifact in that format has its tensors."""
    skeleton = build(source, device, products="fast")
    settled = with_head_settled(skeleton, layout, () if request is None else request.overrides)
    if settled is not skeleton.checkpoint:
        skeleton = build(settled, device, products="fast")
    dense = request is not None and experts_in_one(skeleton, request.scheme, request.overrides, layout)
    written = as_loaded(skeleton, layout, dense_experts=dense)
    return skeleton if written is skeleton.checkpoint else build(written, device, products="fast")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a model's linears can be quantized.

    Attributes:
        scheme: the first of the usual schemes that fits it; None if none does.
        weights: numbers that are quantized then.
        notes: what stays dense, or is otherwise than usual, a sentence each.
        reason: why no scheme fits; "" where one does.
    """

    scheme: Scheme | None
    weights: int = 0
    notes: tuple[str, ...] = ()
    reason: str = ""


def judge_model(source: Checkpoint, *, method: str = "gptq", format: str = "compressed-tensors") -> Verdict:
    """Whether :func:`plan_quantize` will take a model, by what that refuses it by; only headers are read.

    Args:
        source: dense weights, or the dense view of quantized ones.
        method, format: see :class:`~llmconvert.quantize.plan.QuantizeRequest`.
    """
    chosen, layout = load_method(method, {}), load_format(format)
    assert isinstance(chosen, Quantizer)
    reason = ""
    try:
        layout.check_source(source)
        skeleton = _skeleton(source, torch.device("cpu"), layout)
        blocks = discover(skeleton)
        if chosen.calibration != "none":
            _require_a_state_for_each(skeleton, blocks, PROBE_LENGTH)
    except MachineError:
        raise
    except LlmconvertError as error:
        return Verdict(None, reason=str(error))
    for scheme in map(Scheme.parse, _USUAL):
        try:
            found = plan_quantization(skeleton, blocks, scheme, (), chosen, layout)
        except MachineError:
            raise
        except LlmconvertError as error:
            reason = reason or str(error)
        else:
            weights = sum(site.weights for name, site in found.sites.items() if name in found.schemes)
            return Verdict(scheme, weights, found.notes)
    return Verdict(None, reason=reason)


def quantize_checkpoint(
    source: Checkpoint,
    output: Path,
    *,
    method: str,
    scheme: SchemeOrMix,
    format: str = "compressed-tensors",
    overrides: Sequence[Override] = (),
    windows: Sequence[torch.Tensor] = (),
    device: torch.device | None = None,
    memory_budget: int | None = None,
    mode: Mode | None = None,
    identity: str = "",
    options: Mapping[str, Any] | None = None,
    original: Checkpoint | None = None,
    record: Path | None = None,
    name: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    statistics: Statistics = "sequential",
    experts: ShownTokens = "routed",
    min_tokens_per_expert: int = 0,
    kv_cache: CacheKind | None = None,
    runtime: RuntimeName | None = None,
    progress: Progress = SILENT,
) -> QuantizeResult:
    """Quantize the linears of every decoder block and write the artifact: :func:`plan_quantize` and its run in one.

    Args:
        source, output, windows, original, record: see :func:`plan_quantize`.
        method, scheme, format, overrides, options, mode, name, max_shard_bytes, statistics, experts,
            min_tokens_per_expert, kv_cache, runtime: see :class:`~llmconvert.quantize.plan.QuantizeRequest`.
        device, memory_budget, identity, progress: see :class:`~llmconvert.context.Context`.

    Raises:
        LlmconvertError: see :func:`plan_quantize` and :meth:`QuantizePlan.run`.
    """
    request = QuantizeRequest(
        method,
        scheme,
        format,
        tuple(overrides),
        options or {},
        mode,
        name,
        max_shard_bytes,
        statistics,
        experts,
        min_tokens_per_expert,
        kv_cache,
        runtime=runtime,
    )
    context = Context(device or torch.device("cpu"), memory_budget, identity, progress)
    return plan_quantize(
        source, output, request, windows=windows, context=context, original=original, record=record
    ).run()
