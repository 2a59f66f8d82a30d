"""Writing a checkpoint as a GGUF file: streamed in rows, in place, resumable, visible whole or not at all."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from llmconvert.errors import CheckpointError, OutputError, UnsupportedError
from llmconvert.gguf.export import ExportedTensor, GgufExport, export_checkpoint
from llmconvert.gguf.ggml.blocks import load_codec
from llmconvert.gguf.ggml.mix import GgmlMix, MixContext
from llmconvert.gguf.layout import GgufSpec, plan_gguf
from llmconvert.memory import row_slices
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.formats.dense_view import QuantizedView
from llmconvert.quantize.formats.gguf import Gguf
from llmconvert.quantize.methods.imatrix import collect_importance
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.artifact import Artifact, build_artifact, job_key
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.dense import require_dense
from llmconvert.storage.writer import check_output_directory, write_file

__all__ = ["GgufResult", "check_gguf_output", "write_gguf"]

_IMPORTANCE = "importance.safetensors"
# Weights encoded at a time.
_WEIGHTS_AT_ONCE = 1 << 22
_HALF_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class GgufResult:
    """A written file.

    Attributes:
        path: the file.
        nbytes: its size.
        types: how many tensors have each type.
        tensors: type of each tensor, by its name in the file.
        seconds: wall-clock time of this run.
        resumed_tensors: tensors that an earlier, interrupted run had finished.
    """

    path: Path
    nbytes: int
    types: Mapping[str, int]
    tensors: Mapping[str, str]
    seconds: float
    resumed_tensors: int


def write_gguf(
    source: Checkpoint,
    output: Path,
    *,
    mix: GgmlMix,
    name: str | None = None,
    windows: Sequence[torch.Tensor] = (),
    device: torch.device | None = None,
    memory_budget: int | None = None,
    identity: str = "",
    progress: Progress = SILENT,
) -> GgufResult:
    """Write ``source`` as one GGUF file.

    Args:
        source: dense, or a :class:`~llmconvert.quantize.formats.dense_view.QuantizedView`, whose codes are carried over
            where the mix gives a tensor the type that holds them.
        output: a file ending in ``.gguf``, or a directory to be created with ``NAME-MIX.gguf`` in it.
        mix: the tensor types.
        name: of the model; the output's by default.
        windows: calibration token ids, each ``[1, length]``; with them errors are weighted by an importance matrix.
        device: where calibration computes, the CPU by default.
        memory_budget: bytes the process may use for it; what is free by default.
        identity: tells sources apart that look alike; an interrupted run continues only if nothing has changed.
        progress: where to report.

    Raises:
        UnsupportedError: an architecture, setting or tokenizer that llama.cpp does not have, or a value out of range.
        CheckpointError: the source is damaged.
        CalibrationError: activations are unusable.
        CapacityError: memory or disk does not suffice.
        OutputError: the output cannot be written.
    """
    begin = time.perf_counter()
    file_name, directory = check_gguf_output(output, name, mix)
    if not isinstance(source, QuantizedView):
        require_dense(source, "the source")
    export = export_checkpoint(source, name or output.name.removesuffix(".gguf"))
    specs = _specs(export, mix, importance=bool(windows))
    file_type = {"general.file_type": mix.file_type, "general.quantization_version": 2}
    layout = plan_gguf(file_name, {**export.metadata, **file_type}, specs)
    key = job_key(source, layout, {}, identity=identity, windows=windows)
    with build_artifact(output, layout, key, progress=progress) as artifact:
        names = {tensor.name for tensor in export.tensors}
        done = len(names & artifact.done.keys())
        importance = _importance(artifact, source, windows, device, memory_budget, progress)
        _Job(source, export, specs, importance, artifact).run(progress)
        artifact.publish(None, {}, single=not directory)
    path = output / file_name if directory else output
    tensors = {spec.name: spec.qtype for spec in specs}
    return GgufResult(path, layout.nbytes, Counter(tensors.values()), tensors, time.perf_counter() - begin, done)


class _Job:
    """Writes the tensors of one file."""

    def __init__(
        self,
        source: Checkpoint,
        export: GgufExport,
        specs: Sequence[GgufSpec],
        importance: Mapping[str, torch.Tensor],
        artifact: Artifact,
    ) -> None:
        self._source = source
        self._export = export
        self._specs = {spec.name: spec for spec in specs}
        self._importance = importance
        self._artifact = artifact
        self._writer = artifact.writer

    def run(self, progress: Progress) -> None:
        for name, values in self._export.settings.items():
            self._writer.write(name, torch.from_numpy(load_codec("F32").encode(values[None])))
        todo = [tensor for tensor in self._export.tensors if tensor.name not in self._artifact.done]
        with progress.task("Writing GGUF", len(self._export.tensors)) as task:
            task.advance(len(self._export.tensors) - len(todo))
            for tensor in todo:
                self._write(tensor)
                spec = self._specs[tensor.name]
                self._artifact.finish(tensor.name, nbytes=spec.rows * spec.row_nbytes)
                task.advance(1, f"{tensor.name} {spec.qtype}")

    def _write(self, tensor: ExportedTensor) -> None:
        spec = self._specs[tensor.name]
        codec = load_codec(spec.qtype)
        if (quantized := self._carried(tensor, spec)) is not None:
            self._carry(tensor, quantized)
            return
        weights = self._importance.get(tensor.source)
        columns = spec.shape[-1]
        if len(spec.shape) == 1:
            values = tensor.store(self._source[tensor.source]).reshape(1, -1)
            _check_values(tensor.source, values, spec.qtype)
            self._writer.write(tensor.name, torch.from_numpy(codec.encode(values.numpy())))
            return
        for part in row_slices((spec.rows, columns), _WEIGHTS_AT_ONCE, together=tensor.rows_together):
            rows = tensor.store(self._source.read_rows(tensor.source, part.start, part.stop)).contiguous()
            _check_values(tensor.source, rows, spec.qtype)
            raw = codec.encode(rows.numpy(), weights.numpy() if weights is not None else None)
            self._writer.write_rows(tensor.name, part.start, torch.from_numpy(raw))

    def _carried(self, tensor: ExportedTensor, spec: GgufSpec) -> QuantizedTensor | None:
        """The source's own codes where the tensor's type holds them."""
        if not isinstance(self._source, QuantizedView):
            return None
        scheme = self._source.scheme_of(tensor.source)
        if scheme is None or Gguf().carrier(scheme) != spec.qtype:
            return None
        try:
            return self._source.read_quantized(tensor.source)
        except UnsupportedError:  # groups of scattered columns: the weights are encoded anew
            return None

    def _carry(self, tensor: ExportedTensor, quantized: QuantizedTensor) -> None:
        (raw,) = Gguf().pack(tensor.source.removesuffix(".weight"), quantized).values()
        if tensor.heads:
            halves = raw.reshape(tensor.heads, 2, -1, raw.shape[1])
            raw = halves.transpose(1, 2).reshape(raw.shape)
        self._writer.write(tensor.name, raw)


def _check_values(name: str, values: torch.Tensor, qtype: str) -> None:
    largest = values.abs().max().item() if values.numel() else 0.0
    if not largest < float("inf"):
        raise CheckpointError(f"tensor {name!r} holds NaN or infinity; it cannot be written as {qtype}")
    if largest > _HALF_MAX and qtype not in ("F32", "BF16"):
        raise UnsupportedError(
            f"tensor {name!r} holds {largest:g}, {qtype} reaches to {_HALF_MAX:g}; write bf16 or f32"
        )


def _specs(export: GgufExport, mix: GgmlMix, *, importance: bool) -> list[GgufSpec]:
    context = MixContext(export.layers, export.tied, importance)
    settings = [GgufSpec(name, "F32", values.shape) for name, values in export.settings.items()]
    return settings + [
        GgufSpec(tensor.name, mix.type_of(tensor.name, tensor.shape, context), tensor.shape)
        for tensor in export.tensors
    ]


def check_gguf_output(output: Path, name: str | None, mix: GgmlMix) -> tuple[str, bool]:
    """The file's name, and whether ``output`` is a directory around it.

    Raises:
        OutputError: it exists, or cannot be written.
    """
    if output.suffix != ".gguf":
        check_output_directory(output)
        return f"{name or output.name}-{mix.name.upper()}.gguf", True
    if output.exists() or output.is_symlink():
        raise OutputError(f"{output}: exists already; name another output or remove it first")
    check_output_directory(output)
    return output.name, False


def _importance(
    artifact: Artifact,
    source: Checkpoint,
    windows: Sequence[torch.Tensor],
    device: torch.device | None,
    memory_budget: int | None,
    progress: Progress,
) -> Mapping[str, torch.Tensor]:
    if not windows:
        return {}
    path = artifact.work / _IMPORTANCE
    if path.exists():
        return load_file(path)
    measured = collect_importance(source, windows, device=device, memory_budget=memory_budget, progress=progress)
    # Linears that share an input share a tensor, which the format does not allow.
    write_file(path, save({key: value.clone() for key, value in measured.items()}))
    artifact.finish("importance matrix")
    return measured
