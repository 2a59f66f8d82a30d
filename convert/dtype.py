"""Converting a checkpoint to another floating-point dtype on disk, in constant memory."""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from llmconvert.convert.cast import CASTABLE, TARGETS, CastErrors, Overflow, check_overflow, with_dtype
from llmconvert.convert.pipeline import stream_tensors
from llmconvert.convert.rope_scaling import RopeScaling, scale_positions
from llmconvert.errors import UnsupportedError
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.storage.checkpoint import Checkpoint, TensorSpec
from llmconvert.storage.dense import require_dense
from llmconvert.storage.writer import (
    DEFAULT_SHARD_BYTES,
    Layout,
    TensorWriter,
    check_output_directory,
    plan_layout,
    publish_directory,
    staging_directory,
    write_json,
    write_side_files,
)

__all__ = ["DtypeReport", "convert_dtype"]


@dataclass(frozen=True, slots=True)
class DtypeReport:
    """What a conversion did.

    Attributes:
        dtype: the target, as ``config.json`` spells it.
        tensors: tensors written.
        cast: those of them whose dtype changed.
        bytes_read: bytes of tensor data read.
        bytes_written: bytes of all files written.
        seconds: wall time, until everything was on disk.
        largest_relative_error: largest ``|cast(x) - x| / |x|``; 0 when nothing was rounded.
        largest_error_tensor: where that was, None when nothing was rounded.
        clipped: values beyond the target's range that were clipped.
        underflows: values other than zero that became zero.
        non_finite: NaN and infinities of the source, written as they were.
        non_finite_tensor: the first tensor with such a value, or None.
    """

    dtype: str
    tensors: int
    cast: int
    bytes_read: int
    bytes_written: int
    seconds: float
    largest_relative_error: float
    largest_error_tensor: str | None
    clipped: int
    underflows: int
    non_finite: int
    non_finite_tensor: str | None


def convert_dtype(
    source: Checkpoint,
    output: Path,
    *,
    dtype: torch.dtype,
    overflow: Overflow = "error",
    rope_scaling: RopeScaling | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = SILENT,
) -> DtypeReport:
    """Write ``source`` to the directory ``output`` with its floating-point tensors in ``dtype``.

    Quantized weights are dequantized in float32 and rounded once. Integer and bool tensors, and tensors that have the
    dtype already, are copied bit for bit, as are the files beside the weights; ``config.json`` declares the new dtype.
    ``output`` appears whole or not at all.

    Args:
        source: any checkpoint; one in safetensors is read fastest.
        output: a directory that does not exist yet or is empty.
        dtype: ``torch.float32``, ``torch.float16`` or ``torch.bfloat16``.
        overflow: ``"error"`` refuses finite values beyond the target's range, ``"clip"`` writes its largest value.
        rope_scaling: how the config shall stretch rotary positions over longer inputs.
        max_shard_bytes: shards are filled up to this many bytes.
        progress: where to report, in bytes read.

    Raises:
        UnsupportedError: another dtype, a source quantized in a format that is not known, positions that can't be
            scaled, or a value out of range, with the tensor's name.
        OutputError: ``output`` exists and is not empty, or can't be written.
        CheckpointError: the source is damaged.
        CapacityError: the disk can't hold the result.
    """
    if dtype not in TARGETS:
        raise UnsupportedError(f"{dtype} is no target; convert to float32, float16 or bfloat16")
    origin = str(getattr(source, "directory", "the model"))
    source = open_dense(source, dtype)
    require_dense(source, origin)
    check_output_directory(output)
    config = with_dtype(source.config, dtype)
    if rope_scaling is not None:
        config = scale_positions(config, rope_scaling)
    begin = time.perf_counter()
    layout = plan_layout(
        (TensorSpec(i.name, dtype if i.dtype in CASTABLE else i.dtype, i.shape) for i in source.infos.values()),
        max_shard_bytes,
    )
    staging = staging_directory(output)
    try:
        _clear(staging)
        per_tensor = _write_weights(source, staging, layout, dtype, overflow, progress)
        written = layout.nbytes + write_side_files(staging, source.files)
        write_json(staging / "config.json", config)
        written += (staging / "config.json").stat().st_size
        publish_directory(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return _report(source, layout, per_tensor, dtype, written, time.perf_counter() - begin)


def _clear(directory: Path) -> None:
    """Remove what a killed run left: without its journal nobody knows how far it came."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_weights(
    source: Checkpoint, staging: Path, layout: Layout, dtype: torch.dtype, overflow: Overflow, progress: Progress
) -> dict[str, CastErrors]:
    label = str(dtype).removeprefix("torch.")
    per_tensor: dict[str, CastErrors] = {}
    with (
        TensorWriter(staging, layout) as writer,
        progress.task(f"converting to {label}", source.nbytes) as task,
        # Closed before the writer is: no thread may write to a descriptor that is gone.
        closing(stream_tensors(source, writer, task)) as blocks,
    ):
        for name, errors in blocks:
            if overflow == "error":
                check_overflow(name, errors, dtype)
            per_tensor[name] = per_tensor.get(name, CastErrors()) + errors
        writer.sync()
    return per_tensor


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
