"""Quantizing a checkpoint into an artifact: everything is settled first, then carried out."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmconvert.engine.discovery import PROBE_LENGTH, discover
from llmconvert.engine.edges import Edge, find_edges
from llmconvert.engine.memory import MemoryEstimate, choose_mode
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.stream import Mode
from llmconvert.errors import CalibrationError, CapacityError, UnsupportedError
from llmconvert.gguf.ggml.mix import FLOATS
from llmconvert.phases import Phases
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.execute import quantize_blocks
from llmconvert.quantize.formats.base import ContainerRequest, load_format
from llmconvert.quantize.matrix import check_combination
from llmconvert.quantize.methods.base import Quantizer, ScalingQuantizer, load_method
from llmconvert.quantize.methods.rescale import describe_edges
from llmconvert.quantize.plan import Override, QuantizationPlan, plan_encoding, plan_quantization, work_nbytes
from llmconvert.quantize.scheme import Scheme, SchemeOrMix
from llmconvert.quantize.sink import ArtifactSink, finished_blocks
from llmconvert.quantize.steps import CalibratedSteps, DataFreeSteps, Steps
from llmconvert.storage.artifact import Artifact, build_artifact, job_key
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.dense import require_dense
from llmconvert.storage.writer import DEFAULT_SHARD_BYTES, write_json

__all__ = ["LayerResult", "QuantizeResult", "quantize_checkpoint", "read_layers", "write_layers"]


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One quantized linear.

    Attributes:
        name: in the checkpoint, without ``.weight``.
        scheme: what it is stored in.
        shape: ``(rows, columns)``.
        error: squared output error over squared output on the calibration inputs; None for data-free methods.
        damping: share of the mean diagonal that its Hessian needed; None without one.
    """

    name: str
    scheme: str
    shape: tuple[int, int]
    error: float | None
    damping: float | None


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """A finished job.

    Attributes:
        output: the artifact: a directory, or a file.
        layers: every quantized linear, in model order.
        memory: what the job was expected to need, and the mode chosen.
        nbytes: size of the weight files.
        seconds: wall-clock time of this run.
        phases: seconds of this run by phase.
        resumed_blocks: blocks that an earlier, interrupted run had finished.
        files: names of the weight files.
        types: how many tensors have each type, in formats whose files say it of every tensor (GGUF).
    """

    output: Path
    layers: tuple[LayerResult, ...]
    memory: MemoryEstimate
    nbytes: int
    seconds: float
    phases: Mapping[str, float]
    resumed_blocks: int
    files: tuple[str, ...] = ()
    types: Mapping[str, int] = field(default_factory=dict)

    @property
    def quantized(self) -> int:
        """Quantized linears; where every tensor has a type, tensors of one that is no plain float."""
        return sum(count for kind, count in self.types.items() if kind not in FLOATS) or len(self.layers)


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
    progress: Progress = SILENT,
) -> QuantizeResult:
    """Quantize the linears of every decoder block and write the artifact.

    Args:
        source: dense weights. Codes of a :class:`~llmconvert.quantize.formats.dense_view.QuantizedView` are taken over
            where the format has a type of its own for every tensor, and this is the type that holds them.
        output: directory or file to create; it appears when it is complete.
        method: a name in :data:`~llmconvert.quantize.methods.base.METHODS`.
        scheme: for every linear that no override names; or, in formats that have such, a mix of tensor types.
        format: a name in :data:`~llmconvert.quantize.formats.base.FORMATS`.
        overrides: other schemes by name pattern, first match wins.
        windows: calibration token ids, each ``[1, length]``; one batch each.
        device: where to compute, the CPU by default.
        memory_budget: bytes the process may use; what is free by default.
        mode: lockstep or replay; chosen by the budget when None. The result is the same.
        identity: tells sources apart that look alike (a fingerprint of their files); an interrupted run is continued
            only if it, and everything else that matters, is unchanged. It stands for ``original`` too.
        options: of the method.
        original: dense weights whose outputs the methods with a second stream aim at, where the source has lost some
            already; the source by default.
        record: file for :attr:`QuantizeResult.layers`, written before the artifact appears, so that who finds the one
            can read the other (:func:`read_layers`).
        name: of the model, for formats that store it; the output's by default.
        max_shard_bytes: size at which a new shard is begun.
        progress: one unit per block.

    Raises:
        UsageError: something in the request cannot be done; see its subclasses.
        CalibrationError: activations or statistics are unusable.
        CapacityError: memory or disk does not suffice.
    """
    begin = time.perf_counter()
    chosen, layout_format = load_method(method, options or {}), load_format(format)
    layout_format.check_output(output)
    check_combination(chosen, scheme, layout_format)
    if overrides and "overrides" in layout_format.lacks:
        raise UnsupportedError(f"overrides: {layout_format.lacks['overrides']}; leave them out")
    require_dense(source, "the source")
    layout_format.check_source(source)
    calibrated = chosen.calibration != "none"
    if calibrated and not windows:
        raise CalibrationError(f"method {method!r} needs calibration text and was given none")
    skeleton = Skeleton(source, device or torch.device("cpu"), fast_products=True)
    lengths = [window.shape[1] for window in windows]
    blocks = discover(skeleton, max(lengths) if calibrated else PROBE_LENGTH)
    plan, needed, scale_dtype = plan_encoding(skeleton), 0, skeleton.dtype
    if isinstance(scheme, Scheme):
        assert isinstance(chosen, Quantizer)  # it chooses codes of schemes
        plan = plan_quantization(skeleton, blocks, scheme, overrides, chosen, layout_format)
        needed = work_nbytes(skeleton, blocks, plan, chosen, skeleton.dtype)
        # Formats with several schemes in one model have one dtype for all their scales.
        scale_dtype = layout_format.scale_dtype(next(iter(plan.schemes.values())), skeleton.dtype)
    streams = 2 if chosen.original else 1
    memory = choose_mode(skeleton, blocks, lengths if calibrated else [], needed, memory_budget, mode, streams=streams)
    request = ContainerRequest(chosen, scheme, plan.specs, plan.declared, name or output.name, max_shard_bytes)
    container = layout_format.container(source, output, request)
    key = job_key(
        source,
        container.layout,
        {
            "method": method,
            "options": repr(chosen),
            "format": format,
            "device": skeleton.device.type,
            "schemes": {linear: str(planned) for linear, planned in plan.schemes.items()},
            "original": original.identity if original is not None and not identity else "",
        },
        identity=identity,
        windows=windows,
    )
    phases = Phases(partial(torch.cuda.synchronize, skeleton.device) if skeleton.device.type == "cuda" else None)
    steps: Steps = DataFreeSteps(skeleton, chosen, plan, scale_dtype, phases)
    if calibrated:
        kinds = {linear: planned.input_kind for linear, planned in plan.schemes.items()}
        skeleton.quantize_inputs({linear: kind for linear, kind in kinds.items() if kind is not None})
        edges: tuple[tuple[Edge, ...], ...] = ()
        if isinstance(chosen, ScalingQuantizer):
            edges = find_edges(skeleton, blocks)
            kind = skeleton.architecture.model_type
            progress.log(f"{method}: {describe_edges(edges, blocks, kind, skeleton.prefix(0))}")
        steps = CalibratedSteps(
            skeleton, chosen, plan, scale_dtype, phases, blocks, tuple(windows), memory.mode, original, edges
        )

    def lost(artifact: Artifact) -> str:
        gone = steps.lost(artifact.work, finished_blocks(artifact))
        return "the activations of an interrupted run are gone or cut short" if gone else ""

    try:
        with build_artifact(output, container.layout, key, lost=lost, progress=progress) as artifact:
            sink = ArtifactSink(artifact, skeleton, container, plan, phases)
            resumed = sink.blocks
            quantize_blocks(steps, skeleton.block_count, [sink], artifact.work, progress)
            layers = _layers(plan, sink)
            if record is not None:
                write_layers(record, layers)
            sink.publish()
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"{skeleton.device} ran out of memory ({str(error).partition('. ')[0]}), {memory} was expected; stop what "
            "else runs there, or allow less (memory), so that batches wait in files. The same command continues"
        ) from error
    return QuantizeResult(
        output=output,
        layers=layers,
        memory=memory,
        nbytes=container.layout.nbytes,
        seconds=time.perf_counter() - begin,
        phases=phases.seconds,
        resumed_blocks=resumed,
        files=tuple(shard.name for shard in container.layout.shards),
        types=container.types,
    )


def _layers(plan: QuantizationPlan, sink: ArtifactSink) -> tuple[LayerResult, ...]:
    return tuple(
        LayerResult(plan.sites[name].stored, str(plan.schemes[name]), plan.sites[name].shape, error, damping)
        for name, (error, damping) in sink.results.items()
    )


def write_layers(record: Path, layers: Sequence[LayerResult]) -> None:
    """Keep what came of each linear in a file."""
    write_json(record, [asdict(layer) for layer in layers])


def read_layers(record: Path) -> tuple[LayerResult, ...]:
    """What :func:`write_layers` kept."""
    return tuple(LayerResult(**{**entry, "shape": tuple(entry["shape"])}) for entry in json.loads(record.read_bytes()))
