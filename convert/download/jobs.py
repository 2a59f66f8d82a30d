"""Streaming conversion of a Hub model: another dtype, or data-free quantization, while it downloads."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmconvert.context import Context
from llmconvert.convert.cast import (
    CASTABLE,
    CastErrors,
    CastView,
    Overflow,
    check_overflow,
    check_underflow,
    with_dtype,
)
from llmconvert.convert.download.shards import StreamedModel, describe_remote, stream_shards
from llmconvert.convert.dtype import DtypeRequest
from llmconvert.convert.pipeline import BUFFER_NBYTES, stream_tensors
from llmconvert.engine.discovery import discover
from llmconvert.engine.memory import LOADED_NBYTES, choose_mode
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import UsageError
from llmconvert.needs import Needs
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.formats.base import Format, load_format
from llmconvert.quantize.matrix import Readership, readership
from llmconvert.quantize.methods.base import Quantizer, Target, load_quantizer
from llmconvert.quantize.plan import Override, QuantizationPlan, QuantizeRequest, plan_quantization, work_nbytes
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve.shared_scales import largest_magnitude
from llmconvert.report.steps import DtypeReport, LinearReport, QuantizeReport
from llmconvert.storage.artifact import copy_tensor, job_key, output_nbytes
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint, TensorSpec
from llmconvert.storage.dense import require_dense
from llmconvert.storage.writer import DEFAULT_SHARD_BYTES, Layout, TensorWriter, check_output_directory, plan_layout

__all__ = ["plan_stream_convert", "plan_stream_quantize", "stream_convert", "stream_quantize"]


@dataclass(frozen=True, slots=True)
class StreamedDtypePlan:
    """A conversion while the model downloads, settled from its headers; :func:`plan_stream_convert` makes one."""

    request: DtypeRequest
    needs: Needs
    _model: StreamedModel
    _output: Path
    _job: _CastJob
    _context: Context

    @property
    def layout(self) -> Layout:
        """Of the output's weight files."""
        return self._job.layout

    def run(self) -> DtypeReport:
        """Convert; the same bytes as fetching the model first. What an interrupted run left is continued.

        Raises:
            LlmconvertError: see :func:`llmconvert.convert.download.shards.stream_shards`.
        """
        begin = time.perf_counter()
        job, checkpoint = self._job, self._model.checkpoint
        results = stream_shards(self._model, self._output, job, progress=self._context.progress)
        shards = [_ShardErrors(**result) for result in results]
        total = sum((shard.total for shard in shards), CastErrors())
        largest = total.largest_relative
        infos = checkpoint.infos.values()
        return DtypeReport(
            dtype=str(self.request.dtype).removeprefix("torch."),
            tensors=len(infos),
            cast=sum(info.dtype != job.layout.specs[info.name].dtype for info in infos),
            bytes_read=checkpoint.nbytes,
            bytes_written=sum(path.stat().st_size for path in self._output.iterdir()),
            seconds=time.perf_counter() - begin,
            largest_relative_error=largest,
            largest_error_tensor=next((s.worst for s in shards if s.total.largest_relative == largest), None)
            if largest
            else None,
            clipped=total.overflows,
            underflows=total.underflows,
            non_finite=total.non_finite,
            non_finite_tensor=next((shard.non_finite for shard in shards if shard.non_finite), None),
            streamed=True,
        )


def plan_stream_convert(
    model_id: str,
    output: Path,
    request: DtypeRequest,
    *,
    revision: str | None = None,
    files: Mapping[str, Path | bytes] | None = None,
    context: Context | None = None,
) -> StreamedDtypePlan:
    """Settle converting a Hub model to another dtype while it downloads, from its headers.

    Disk need is the output and two source shards.

    Args:
        model_id: ``org/name``.
        output: a directory that does not exist yet or is empty.
        request: the dtype, and the rest.
        revision: branch, tag or commit.
        files: small files to put beside the weights; the model's own if None.
        context: progress, in bytes downloaded.

    Raises:
        UsageError: positions shall be scaled, the model is quantized, or the output is not empty.
        HubError, CheckpointError: see :func:`llmconvert.convert.download.shards.describe_remote`.
    """
    if request.rope_scaling is not None:
        raise UsageError("positions are not scaled while a model downloads; scale those of the model that was written")
    model = _describe(model_id, output, revision, files)
    job = _CastJob(model, request.dtype, request.overflow, request.max_shard_bytes)
    needs = _needs(model, output_nbytes(job.layout, job.config, job.files), BUFFER_NBYTES)
    return StreamedDtypePlan(request, needs, model, output, job, context or Context())


def _describe(
    model_id: str, output: Path, revision: str | None, files: Mapping[str, Path | bytes] | None
) -> StreamedModel:
    """The model to stream into ``output``, known from its headers, with the small files that go beside its weights."""
    check_output_directory(output)
    model = describe_remote(model_id, revision)
    require_dense(model.checkpoint, model_id)
    if files is not None:
        model.checkpoint.files = files
    return model


def _needs(model: StreamedModel, output: int, work: int) -> Needs:
    """The output and two source shards on disk, and the download of all."""
    sizes = sorted((file.size for file in model.remote.shards), reverse=True)
    shards = sum(sizes[:2])
    return Needs(memory=LOADED_NBYTES + work, disk=output + shards, download=sum(sizes), passing=shards)


def stream_convert(
    model_id: str,
    output: Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype,
    overflow: Overflow = "error",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = SILENT,
) -> DtypeReport:
    """Convert a Hub model while it downloads: :func:`plan_stream_convert` and its run in one call.

    Raises:
        LlmconvertError: see :func:`plan_stream_convert` and :meth:`StreamedDtypePlan.run`.
    """
    request = DtypeRequest(dtype, overflow, None, max_shard_bytes)
    context = Context(progress=progress)
    return plan_stream_convert(model_id, output, request, revision=revision, context=context).run()


class _ShardErrors:
    """What casting one shard cost, as the journal keeps it."""

    def __init__(self, errors: Mapping[str, Any], worst: str | None, non_finite: str | None) -> None:
        self.total = CastErrors(**errors)
        self.worst = worst
        self.non_finite = non_finite


class _CastJob:
    """Another dtype."""

    def __init__(self, model: StreamedModel, dtype: torch.dtype, overflow: Overflow, max_shard_bytes: int) -> None:
        specs = (
            TensorSpec(info.name, dtype if info.dtype in CASTABLE else info.dtype, info.shape)
            for info in model.checkpoint.infos.values()
        )
        self.layout = plan_layout(specs, max_shard_bytes)
        self.config: Mapping[str, Any] = with_dtype(model.checkpoint.config, dtype)
        self.files = model.checkpoint.files
        self.key = _key(model, self.layout, {"dtype": str(dtype), "overflow": overflow})
        self._dtype = dtype
        self._overflow = overflow

    def process(self, shard: SafetensorsCheckpoint, writer: TensorWriter) -> Mapping[str, Any]:
        per_tensor: dict[str, CastErrors] = {}
        with SILENT.task("", 0) as task, closing(stream_tensors(shard, shard, writer, task)) as blocks:
            for name, errors, last in blocks:
                per_tensor[name] = per_tensor.get(name, CastErrors()) + errors
                if self._overflow == "error":
                    check_overflow(name, errors, self._dtype)
                    if last:
                        check_underflow(name, per_tensor[name], self._dtype)
        return {
            "errors": asdict(sum(per_tensor.values(), CastErrors())),
            "worst": max(per_tensor, key=lambda name: per_tensor[name].largest_relative, default=None),
            "non_finite": next((name for name, errors in per_tensor.items() if errors.non_finite), None),
        }


@dataclass(frozen=True, slots=True)
class StreamedQuantizePlan:
    """A quantization while the model downloads, settled from its headers; :func:`plan_stream_quantize` makes one."""

    request: QuantizeRequest
    needs: Needs
    _model: StreamedModel
    _output: Path
    _job: _QuantizeJob
    _context: Context

    @property
    def layout(self) -> Layout:
        """Of the output's weight files."""
        return self._job.layout

    @property
    def readers(self) -> Readership:
        """Which runtimes read what is made, by the schemes that its linears really have."""
        return readership(self.request.format, self._job.plan.schemes.values())

    def run(self) -> QuantizeReport:
        """Quantize; the same bytes as fetching the model first. What an interrupted run left is continued.

        Raises:
            LlmconvertError: see :func:`llmconvert.convert.download.shards.stream_shards`.
        """
        begin = time.perf_counter()
        job = self._job
        stream_shards(self._model, self._output, job, progress=self._context.progress)
        linears = tuple(
            LinearReport(name=job.plan.sites[name].stored, scheme=str(scheme), error=None)
            for name, scheme in job.plan.schemes.items()
        )
        seconds = round(time.perf_counter() - begin, 3)
        return QuantizeReport(
            layers=len(linears), linears=linears, bytes=job.layout.nbytes, seconds=seconds, streamed=True
        )


def plan_stream_quantize(
    model_id: str,
    output: Path,
    request: QuantizeRequest,
    *,
    rest: DtypeRequest,
    revision: str | None = None,
    files: Mapping[str, Path | bytes] | None = None,
    context: Context | None = None,
) -> StreamedQuantizePlan:
    """Settle quantizing a Hub model while it downloads, by a method without calibration, from its headers.

    Disk need is the output and two source shards.

    Args:
        model_id: ``org/name``.
        output: a directory that does not exist yet or is empty.
        request: method, scheme, format, …
        rest: the dtype of what stays unquantized, and what to do with values too large for it.
        revision: branch, tag or commit.
        files: small files to put beside the weights; the model's own if None.
        context: device, and progress in bytes downloaded.

    Raises:
        UsageError: the method needs calibration, or the request cannot be done.
        HubError, CheckpointError: see :func:`llmconvert.convert.download.shards.describe_remote`.
        CapacityError: memory does not suffice.
    """
    context = context or Context()
    quantizer = load_quantizer(request.method, request.options)
    layout_format = load_format(request.format, request.runtime)
    if quantizer.calibration != "none":
        raise UsageError(
            f"method {request.method!r} needs the model's activations, so it can't be streamed; leave out --stream"
        )
    if request.fixes_inputs:
        raise UsageError(
            f"scheme {request.scheme} fixes by calibration text how inputs are quantized, so it can't be streamed; "
            "leave out --stream"
        )
    model = _describe(model_id, output, revision, files)
    job = _QuantizeJob(model, rest, request, quantizer, layout_format, context)
    needs = _needs(model, output_nbytes(job.layout, job.config, job.files), job.memory.total - LOADED_NBYTES)
    return StreamedQuantizePlan(request, needs, model, output, job, context)


def stream_quantize(
    model_id: str,
    output: Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype,
    overflow: Overflow = "error",
    method: str,
    scheme: Scheme,
    format: str = "compressed-tensors",
    overrides: Sequence[Override] = (),
    options: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = SILENT,
) -> QuantizeReport:
    """Quantize a Hub model while it downloads: :func:`plan_stream_quantize` and its run in one call.

    Raises:
        LlmconvertError: see :func:`plan_stream_quantize` and :meth:`StreamedQuantizePlan.run`.
    """
    request = QuantizeRequest(method, scheme, format, tuple(overrides), options or {}, max_shard_bytes=max_shard_bytes)
    context = Context(device or torch.device("cpu"), progress=progress)
    rest = DtypeRequest(dtype, overflow)
    return plan_stream_quantize(model_id, output, request, rest=rest, revision=revision, context=context).run()


class _QuantizeJob:
    """Rounding, linear by linear."""

    plan: QuantizationPlan

    def __init__(
        self,
        model: StreamedModel,
        rest: DtypeRequest,
        request: QuantizeRequest,
        quantizer: Quantizer,
        layout_format: Format,
        context: Context,
    ) -> None:
        dtype, overflow, device = rest.dtype, rest.overflow, context.device
        skeleton = Skeleton(CastView(model.checkpoint, dtype), device)
        blocks = discover(skeleton)
        if not isinstance(request.scheme, Scheme):
            raise UsageError(f"scheme {request.scheme}: a GGUF file is not streamed; leave out --stream")
        self.plan = plan_quantization(skeleton, blocks, request.scheme, request.overrides, quantizer, layout_format)
        _require_together(self.plan, model.checkpoint)
        work = work_nbytes(skeleton, blocks, self.plan, quantizer, skeleton.dtype)
        #: What it is expected to need.
        self.memory = choose_mode(skeleton, blocks, [], work, context.memory)
        self.layout = plan_layout(self.plan.specs, request.max_shard_bytes)
        declared = self.plan.declared
        self.config: Mapping[str, Any] = layout_format.config(skeleton.checkpoint.config, declared)
        self.files: Mapping[str, Path | bytes] = {**model.checkpoint.files, **layout_format.files(declared)}
        settings = {
            "dtype": str(dtype),
            "overflow": overflow,
            "method": repr(quantizer),
            "device": device.type,
            "config": json.dumps(declared, sort_keys=True),
        }
        self.key = _key(model, self.layout, settings)
        self._linears = {self.plan.sites[name].tensor: name for name in self.plan.schemes}
        self._quantizer = quantizer
        self._format = layout_format
        self._dtype = dtype
        self._overflow = overflow
        self._model_dtype = skeleton.dtype
        self._device = device

    def process(self, shard: SafetensorsCheckpoint, writer: TensorWriter) -> Mapping[str, Any]:
        cast = CastView(shard, self._dtype, self._overflow)
        for name in shard:
            if name in self._linears:
                self._round(name, cast, writer)
            else:
                copy_tensor(writer, cast, name)
        return {}

    def _round(self, name: str, shard: Checkpoint, writer: TensorWriter) -> None:
        linear = self._linears[name]
        shared = self.plan.sharing.get(linear, ())
        read = ((other, shard[self.plan.sites[other].tensor].to(self._device)) for other in shared)
        reach = largest_magnitude(read) if shared else 0.0
        target = Target(linear, shard[name].to(self._device), self.plan.schemes[linear], reach)
        scale_dtype = self._format.scale_dtype(target.scheme, self._model_dtype)
        solution = self._quantizer.quantize([target], None, scale_dtype)[linear]
        for stored, tensor in self._format.pack(self.plan.sites[linear].stored, solution.tensor).items():
            writer.write(stored, tensor)


def _require_together(plan: QuantizationPlan, checkpoint: Checkpoint) -> None:
    """Refuse linears with a float32 scale in common that do not come in one shard."""
    for names in dict.fromkeys(plan.sharing.values()):
        if len({checkpoint.infos[plan.sites[name].tensor].shard for name in names}) > 1:
            raise UsageError(
                f"scheme {plan.schemes[names[0]]}: {', '.join(names)} have a float32 scale in common, and lie in "
                "different shards, so they can't be streamed; leave out --stream"
            )


def _key(model: StreamedModel, layout: Layout, settings: Mapping[str, str]) -> str:
    return job_key(model.checkpoint, layout, settings, identity=f"{model.remote.repo_id}@{model.remote.commit_hash}")
