"""Converting a checkpoint to another floating-point dtype on disk, in constant memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmconvert.context import Context
from llmconvert.convert.cast import CASTABLE, TARGETS, CastErrors, Overflow, check_overflow, check_underflow, with_dtype
from llmconvert.convert.pipeline import buffer_nbytes, stream_tensors
from llmconvert.convert.quantized import dense_source
from llmconvert.convert.rope_factor import RopeScaling
from llmconvert.convert.rope_scaling import scale_positions
from llmconvert.engine.memory import LOADED_NBYTES
from llmconvert.errors import UnsupportedError
from llmconvert.needs import Needs
from llmconvert.progress import SILENT, Bytes, Progress
from llmconvert.report.steps import DtypeReport
from llmconvert.storage.artifact import Artifact, build_artifact, job_key, output_nbytes
from llmconvert.storage.checkpoint import Checkpoint, TensorSpec
from llmconvert.storage.dense import require_dense
from llmconvert.storage.writer import DEFAULT_SHARD_BYTES, Layout, check_output_directory, plan_layout

__all__ = ["DtypePlan", "DtypeRequest", "convert_dtype", "plan_dtype"]


@dataclass(frozen=True, slots=True)
class DtypeRequest:
    """What is asked for when a checkpoint is converted.

    Attributes:
        dtype: ``torch.float32``, ``torch.float16`` or ``torch.bfloat16``.
        overflow: ``"error"`` refuses finite values beyond the target's range, ``"clip"`` writes its largest value.
        rope_scaling: how the config shall stretch rotary positions over longer inputs.
        max_shard_bytes: shards are filled up to this many bytes.
    """

    dtype: torch.dtype
    overflow: Overflow = "error"
    rope_scaling: RopeScaling | None = None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES


@dataclass(frozen=True, slots=True)
class DtypePlan:
    """A conversion that was settled from headers; :func:`plan_dtype` makes one.

    Attributes:
        request: what was asked for.
        layout: of the output's weight files.
        config: of the output.
        needs: what running it takes.
    """

    request: DtypeRequest
    layout: Layout
    config: Mapping[str, Any]
    needs: Needs
    _source: Checkpoint
    _output: Path
    _context: Context

    def run(self) -> DtypeReport:
        """Write the output, or go on behind the last tensor that an interrupted run of the same plan has on disk.

        Raises:
            UnsupportedError: a value is out of range, with the tensor's name.
            OutputError: the output can't be written, or is being written by another process.
            CheckpointError: the source is damaged.
            CapacityError: the disk can't hold the result.
        """
        begin = time.perf_counter()
        source, layout, request = self._source, self.layout, self.request
        settings = {"dtype": str(request.dtype), "overflow": request.overflow, "config of the output": self.config}
        key = job_key(source, layout, settings, identity=self._context.identity)
        with build_artifact(self._output, layout, key, progress=self._context.progress) as artifact:
            _write_weights(source, artifact, request.dtype, request.overflow, self._context.progress)
            per_tensor = {name: CastErrors(**artifact.done[name]) for name in source if name in artifact.done}
            written = artifact.publish(self.config, source.files)
        return _report(source, layout, per_tensor, request.dtype, written, time.perf_counter() - begin)


def plan_dtype(source: Checkpoint, output: Path, request: DtypeRequest, *, context: Context | None = None) -> DtypePlan:
    """Settle a conversion to another dtype; nothing but headers is read, nothing written.

    Quantized weights are dequantized in float32 and rounded once. Integer and bool tensors, and tensors that have the
    dtype already, are copied bit for bit, as are the files beside the weights; ``config.json`` declares the new dtype.
    ``output`` appears whole or not at all.

    Args:
        source: any checkpoint; one in safetensors is read fastest.
        output: a directory that does not exist yet or is empty.
        request: the dtype, and the rest.
        context: progress in bytes read, and the source's identity.

    Raises:
        UnsupportedError: another dtype, a source quantized in a format that is not known, or positions that can't be
            scaled.
        OutputError: ``output`` exists and is not empty, or can't be written.
    """
    dtype = request.dtype
    if dtype not in TARGETS:
        raise UnsupportedError(f"{dtype} is no target; convert to float32, float16 or bfloat16")
    origin, context = str(getattr(source, "directory", "the model")), context or Context()
    source = dense_source(source, dtype, progress=context.progress)
    require_dense(source, origin)
    check_output_directory(output)
    config = with_dtype(source.config, dtype)
    if request.rope_scaling is not None:
        config = scale_positions(config, request.rope_scaling)
    specs = [TensorSpec(i.name, dtype if i.dtype in CASTABLE else i.dtype, i.shape) for i in source.infos.values()]
    layout = plan_layout(specs, request.max_shard_bytes)
    needs = Needs(memory=LOADED_NBYTES + buffer_nbytes(source, specs), disk=output_nbytes(layout, config, source.files))
    return DtypePlan(request, layout, config, needs, source, output, context)


def convert_dtype(
    source: Checkpoint,
    output: Path,
    *,
    dtype: torch.dtype,
    overflow: Overflow = "error",
    rope_scaling: RopeScaling | None = None,
    identity: str = "",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = SILENT,
) -> DtypeReport:
    """Write ``source`` to the directory ``output`` in ``dtype``: :func:`plan_dtype` and its run in one call.

    Args:
        source, output: see :func:`plan_dtype`.
        dtype, overflow, rope_scaling, max_shard_bytes: see :class:`DtypeRequest`.
        identity: tells sources apart that look alike; what is known of the source's files by default.
        progress: where to report, in bytes read.

    Raises:
        LlmconvertError: see :func:`plan_dtype` and :meth:`DtypePlan.run`.
    """
    request = DtypeRequest(dtype, overflow, rope_scaling, max_shard_bytes)
    return plan_dtype(source, output, request, context=Context(identity=identity, progress=progress)).run()


def _write_weights(
    source: Checkpoint, artifact: Artifact, dtype: torch.dtype, overflow: Overflow, progress: Progress
) -> None:
    label = str(dtype).removeprefix("torch.")
    todo = [name for name in source if name not in artifact.done]
    errors = CastErrors()
    with (
        progress.task(f"converting to {label}", Bytes(source.nbytes)) as task,
        # Closed before the writer is: no thread may write to a descriptor that is gone.
        closing(stream_tensors(source, todo, artifact.writer, task)) as blocks,
    ):
        task.advance(sum(source.infos[name].nbytes for name in artifact.done))
        for name, found, last in blocks:
            if overflow == "error":
                check_overflow(name, found, dtype)
            errors += found
            if last:
                if overflow == "error":
                    check_underflow(name, errors, dtype)
                artifact.finish(name, asdict(errors), batched=True)
                errors = CastErrors()


def _report(
    source: Checkpoint,
    layout: Layout,
    per_tensor: dict[str, CastErrors],
    dtype: torch.dtype,
    bytes_written: int,
    seconds: float,
) -> DtypeReport:
    total = sum(per_tensor.values(), CastErrors())
    worst = max(per_tensor, key=lambda name: per_tensor[name].largest_relative, default=None)
    return DtypeReport(
        dtype=str(dtype).removeprefix("torch."),
        tensors=len(source.infos),
        cast=sum(info.dtype != layout.specs[name].dtype for name, info in source.infos.items()),
        bytes_read=source.nbytes,
        bytes_written=bytes_written,
        seconds=seconds,
        largest_relative_error=total.largest_relative,
        largest_error_tensor=worst if total.largest_relative else None,
        clipped=total.overflows,
        underflows=total.underflows,
        non_finite=total.non_finite,
        non_finite_tensor=next((name for name, errors in per_tensor.items() if errors.non_finite), None),
    )
