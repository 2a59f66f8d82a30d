"""Giving some linears of a finished artifact another scheme, while every other tensor keeps its bytes.

The linears in question get back their original weights, everything else stays as the artifact has it, and this mixture
is quantized as far as it changed: a linear is calibrated on what the artifact's linears before it give. Methods that
aim at what the original gives see the original itself beside it, not the mixture, which has lost something already.
Linears behind a changed one keep codes that were fitted to its earlier values; what that comes to is for the next
measurement to say.
"""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llmconvert.engine.discovery import BlockPlan, discover
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import CheckpointError, SchemeError, UnsupportedError
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.formats.base import Format, load_format
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import LayerResult, quantize_checkpoint, read_layers, write_layers
from llmconvert.quantize.methods.base import ScalingQuantizer, load_quantizer
from llmconvert.quantize.plan import Override, QuantizationPlan, plan_quantization
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import Checkpoint, CheckpointView, SafetensorsCheckpoint
from llmconvert.storage.writer import (
    TensorWriter,
    check_output_directory,
    plan_layout,
    publish_directory,
    staging_directory,
    write_file,
    write_json,
)

__all__ = ["Assignment", "requantize_checkpoint", "trace"]

#: Module name of every linear in the blocks → its scheme, None for one that is dense.
Assignment = Mapping[str, Scheme | None]

_PROBE_LENGTH = 16
_DENSE = "none"
_COPY_NBYTES = 1 << 26


def trace(source: Checkpoint, device: torch.device) -> tuple[Skeleton, tuple[BlockPlan, ...]]:
    """The model's shapes: names of its linears, and which of them share an input.

    Raises:
        UnsupportedError: see :func:`llmconvert.engine.discovery.discover`.
    """
    skeleton = Skeleton(source, device)
    return skeleton, discover(skeleton, _PROBE_LENGTH)


def requantize_checkpoint(
    artifact: Path,
    source: Checkpoint,
    output: Path,
    *,
    method: str,
    format: str,
    before: Assignment,
    changes: Assignment,
    record: Path,
    windows: Sequence[torch.Tensor] = (),
    device: torch.device,
    memory_budget: int | None = None,
    identity: str = "",
    options: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> tuple[LayerResult, ...]:
    """Write ``artifact`` anew to ``output``, with ``changes``.

    Beside the output, the disk must hold the model's dense weights once more while this runs.

    Args:
        artifact: a finished artifact of ``source``, in ``format``.
        source: the original, dense.
        before: what the artifact is stored in.
        changes: linears to change. Those that share an input must change together.
        record: file for what is returned, written before ``output`` appears; see
            :func:`~llmconvert.quantize.job.read_layers`.
        windows, memory_budget, identity, options: as for :func:`llmconvert.quantize.job.quantize_checkpoint`, which
            continues an interrupted run.

    Returns:
        what came of each linear that was changed; one that became dense has no error.

    Raises:
        CheckpointError: the artifact is not stored as ``before`` says.
        SchemeError: nothing would be quantized any more.
        UnsupportedError: the method changes more than linears.
        LlmconvertError: see :func:`llmconvert.quantize.job.quantize_checkpoint`.
    """
    check_output_directory(output)
    skeleton, blocks = trace(source, device)
    layout_format = load_format(format)
    after = {**before, **changes}
    some = next((scheme for scheme in after.values() if scheme is not None), None)
    if some is None:
        raise SchemeError("the changes leave no linear quantized")
    quantizer = load_quantizer(method, options or {})
    if isinstance(quantizer, ScalingQuantizer):
        raise UnsupportedError(
            f"method {method!r} changes norms along with the linears, so single linears of a finished artifact can't "
            "be given another scheme; quantize the model anew, with overrides"
        )
    plan = plan_quantization(skeleton, blocks, some, _overrides(after), quantizer, layout_format)
    part = output.absolute().with_name(f".{output.name}.changed")
    results: tuple[LayerResult, ...] = ()
    with SafetensorsCheckpoint(artifact) as stored:
        anew = {name: scheme for name, scheme in changes.items() if scheme is not None}
        if anew and not part.exists():
            mixture = _Mixture(open_dense(stored), source, {f"{plan.stored[name]}.weight" for name in changes})
            results = quantize_checkpoint(
                mixture,
                part,
                method=method,
                scheme=next(iter(anew.values())),
                format=format,
                overrides=[*_overrides(anew), Override("*", None)],
                windows=windows,
                device=device,
                memory_budget=memory_budget,
                identity=identity,
                options=options,
                original=source,
                record=record,
                progress=progress,
            ).layers
        elif anew:  # killed before the parts were merged
            results = tuple(layer for layer in read_layers(record) if layer.scheme != _DENSE)
        dense = (plan.stored[name] for name, scheme in changes.items() if scheme is None)
        shapes = {linear: source.infos[f"{linear}.weight"].shape for linear in dense}
        results += tuple(LayerResult(name, _DENSE, (rows, cols), 0.0, None) for name, (rows, cols) in shapes.items())
        write_layers(record, results)
        changed = [f"{plan.stored[name]}." for name in changes]
        _merge(stored, source, part, output, plan, layout_format, changed)
    return results


def _overrides(assignment: Assignment) -> list[Override]:
    return [Override(glob.escape(name), scheme) for name, scheme in assignment.items()]


class _Mixture(CheckpointView):
    """An artifact's dense weights, but for some that are the original's. Inputs are not quantized in calibration."""

    def __init__(self, artifact: Checkpoint, source: Checkpoint, originals: set[str]) -> None:
        super().__init__(artifact)
        self._source = source
        self._originals = originals
        self.infos = {name: source.infos[name] if name in originals else info for name, info in artifact.infos.items()}
        self.quantized_inputs = {}

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return (self._source if name in self._originals else self.base).read_rows(name, start, stop)


def _merge(
    stored: Checkpoint,
    source: Checkpoint,
    part: Path,
    output: Path,
    plan: QuantizationPlan,
    layout_format: Format,
    changed: Iterable[str],
) -> None:
    """Put unchanged tensors of the artifact and those quantized anew into one directory."""
    prefixes = tuple(changed)
    layout = plan_layout(plan.specs)
    staging = staging_directory(output)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    quantized = SafetensorsCheckpoint(part) if part.exists() else None
    try:
        with TensorWriter(staging, layout) as writer:
            for spec in plan.specs:
                if not spec.name.startswith(prefixes):
                    origin = stored
                else:
                    origin = quantized if quantized is not None and spec.name in quantized else source
                info = origin.infos.get(spec.name)
                if info is None or (info.shape, info.dtype) != (spec.shape, spec.dtype):
                    raise CheckpointError(f"tensor {spec.name!r} of the artifact is not stored as its schemes say")
                _copy(origin, spec.name, writer)
            writer.sync()
        for name in stored.files:
            write_file(staging / name, stored.read_file(name))
        for name, content in layout_format.files(plan.declared).items():
            write_file(staging / name, content)
        write_json(staging / "config.json", {**stored.config, "quantization_config": plan.declared})
        publish_directory(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        if quantized is not None:
            quantized.close()
    shutil.rmtree(part, ignore_errors=True)


def _copy(origin: Checkpoint, name: str, writer: TensorWriter) -> None:
    info = origin.infos[name]
    rows = info.shape[0] if info.shape else 1
    step = max(1, rows * _COPY_NBYTES // max(1, info.nbytes))
    for start in range(0, rows, step):
        writer.write_rows(name, start, origin.read_rows(name, start, min(rows, start + step)))
