"""Streaming conversion of a Hub model: another dtype, or data-free quantization, while it downloads."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llmconvert.convert.cast import CASTABLE, CastErrors, CastView, Overflow, check_overflow, with_dtype
from llmconvert.convert.download.shards import StreamedModel, describe_remote, stream_shards
from llmconvert.convert.pipeline import stream_tensors
from llmconvert.engine.discovery import discover
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import UsageError
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.formats.base import Format, load_format
from llmconvert.quantize.methods.base import Quantizer, Target, load_quantizer
from llmconvert.quantize.plan import Override, QuantizationPlan, plan_quantization
from llmconvert.quantize.scheme import Scheme
from llmconvert.report.steps import DtypeReport, LinearReport, QuantizeReport
from llmconvert.storage.artifact import copy_tensor, job_key
from llmconvert.storage.checkpoint import SafetensorsCheckpoint, TensorSpec
from llmconvert.storage.dense import require_dense
from llmconvert.storage.writer import DEFAULT_SHARD_BYTES, Layout, TensorWriter, check_output_directory, plan_layout

__all__ = ["stream_convert", "stream_quantize"]

# Linears are looked at in a forward of shapes alone; its length doesn't matter.
_PROBE_LENGTH = 16


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
    """Convert a Hub model to another dtype while it downloads; the same bytes as fetching it first.

    Disk need is the output and two source shards. A call that was stopped continues.

    Args:
        model_id: ``org/name``.
        output: a directory that does not exist yet or is empty.
        revision: branch, tag or commit.
        dtype, overflow, max_shard_bytes: see :func:`llmconvert.convert.dtype.convert_dtype`.
        progress: in bytes downloaded.

    Raises:
        LlmconvertError: see :func:`llmconvert.convert.download.shards.stream_shards`.
    """
    check_output_directory(output)
    begin = time.perf_counter()
    model = describe_remote(model_id, revision)
    require_dense(model.checkpoint, model_id)
    job = _CastJob(model, dtype, overflow, max_shard_bytes)
    shards = [_ShardErrors(**result) for result in stream_shards(model, output, job, progress=progress)]
    total = sum((shard.total for shard in shards), CastErrors())
    infos = model.checkpoint.infos.values()
    return DtypeReport(
        dtype=str(dtype).removeprefix("torch."),
        tensors=len(infos),
        cast=sum(info.dtype != job.layout.specs[info.name].dtype for info in infos),
        bytes_read=model.checkpoint.nbytes,
        bytes_written=sum(path.stat().st_size for path in output.iterdir()),
        seconds=time.perf_counter() - begin,
        largest_relative_error=total.largest_relative,
        largest_error_tensor=next((s.worst for s in shards if s.total.largest_relative == total.largest_relative), None)
        if total.largest_relative
        else None,
        clipped=total.overflows,
        underflows=total.underflows,
        non_finite=total.non_finite,
        non_finite_tensor=next((shard.non_finite for shard in shards if shard.non_finite), None),
        streamed=True,
    )


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
            for name, errors, _ in blocks:
                if self._overflow == "error":
                    check_overflow(name, errors, self._dtype)
                per_tensor[name] = per_tensor.get(name, CastErrors()) + errors
        return {
            "errors": asdict(sum(per_tensor.values(), CastErrors())),
            "worst": max(per_tensor, key=lambda name: per_tensor[name].largest_relative, default=None),
            "non_finite": next((name for name, errors in per_tensor.items() if errors.non_finite), None),
        }


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
    """Quantize a Hub model while it downloads, by a method without calibration; the same bytes as fetching it first.

    Disk need is the output and two source shards. A call that was stopped continues.

    Args:
        model_id: ``org/name``.
        output: a directory that does not exist yet or is empty.
        revision: branch, tag or commit.
        dtype, overflow: what stays unquantized is written in this dtype; what to do with values too large for it.
        method, scheme, format, overrides, options, device: see
            :func:`llmconvert.quantize.job.quantize_checkpoint`.
        progress: in bytes downloaded.

    Raises:
        UsageError: the method needs calibration, or the request cannot be done.
        LlmconvertError: see :func:`llmconvert.convert.download.shards.stream_shards`.
    """
    check_output_directory(output)
    begin = time.perf_counter()
    quantizer, layout_format = load_quantizer(method, options or {}), load_format(format)
    if quantizer.calibration != "none":
        raise UsageError(
            f"method {method!r} needs the model's activations, so it can't be streamed; leave out --stream"
        )
    model = describe_remote(model_id, revision)
    require_dense(model.checkpoint, model_id)
    where = device or torch.device("cpu")
    job = _QuantizeJob(model, dtype, overflow, quantizer, layout_format, scheme, overrides, where, max_shard_bytes)
    stream_shards(model, output, job, progress=progress)
    seconds = time.perf_counter() - begin
    linears = tuple(
        LinearReport(name=job.plan.stored[name], scheme=str(scheme), error=None)
        for name, scheme in job.plan.schemes.items()
    )
    return QuantizeReport(
        layers=len(linears), linears=linears, bytes=job.layout.nbytes, seconds=round(seconds, 3), streamed=True
    )


class _QuantizeJob:
    """Rounding, linear by linear."""

    plan: QuantizationPlan

    def __init__(
        self,
        model: StreamedModel,
        dtype: torch.dtype,
        overflow: Overflow,
        quantizer: Quantizer,
        layout_format: Format,
        scheme: Scheme,
        overrides: Sequence[Override],
        device: torch.device,
        max_shard_bytes: int,
    ) -> None:
        skeleton = Skeleton(CastView(model.checkpoint, dtype), device)
        blocks = discover(skeleton, _PROBE_LENGTH)
        self.plan = plan_quantization(skeleton, blocks, scheme, overrides, quantizer, layout_format)
        self.layout = plan_layout(self.plan.specs, max_shard_bytes)
        declared = self.plan.declared
        self.config: Mapping[str, Any] = {**skeleton.checkpoint.config, "quantization_config": declared}
        self.files: Mapping[str, Path | bytes] = {**model.checkpoint.files, **layout_format.files(declared)}
        settings = {
            "dtype": str(dtype),
            "overflow": overflow,
            "method": repr(quantizer),
            "device": device.type,
            "config": json.dumps(declared, sort_keys=True),
        }
        self.key = _key(model, self.layout, settings)
        self._linears = {f"{self.plan.stored[name]}.weight": name for name in self.plan.schemes}
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
                self._round(name, cast[name], writer)
            else:
                copy_tensor(writer, cast, name)
        return {}

    def _round(self, name: str, weight: torch.Tensor, writer: TensorWriter) -> None:
        linear = self._linears[name]
        target = Target(linear, weight.to(self._device), self.plan.schemes[linear])
        scale_dtype = self._format.scale_dtype(target.scheme, self._model_dtype)
        solution = self._quantizer.quantize([target], None, scale_dtype)[linear]
        for stored, tensor in self._format.pack(self.plan.stored[linear], solution.tensor).items():
            writer.write(stored, tensor)


def _key(model: StreamedModel, layout: Layout, settings: Mapping[str, str]) -> str:
    return job_key(model.checkpoint, layout, settings, identity=f"{model.remote.repo_id}@{model.remote.commit_hash}")
