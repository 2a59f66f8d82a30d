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

from llmconvert.context import Context
from llmconvert.engine.discovery import PROBE_LENGTH, BlockPlan, discover
from llmconvert.engine.edges import Edge, find_edges
from llmconvert.engine.memory import MemoryEstimate, choose_mode
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.stream import Mode
from llmconvert.errors import CalibrationError, CapacityError, UnsupportedError
from llmconvert.gguf.ggml.mix import FLOATS
from llmconvert.needs import Needs
from llmconvert.phases import Phases
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.execute import quantize_blocks
from llmconvert.quantize.formats.base import ContainerRequest, load_format
from llmconvert.quantize.formats.container import Container
from llmconvert.quantize.matrix import Readership, check_combination, readership
from llmconvert.quantize.methods.base import Method, Quantizer, ScalingQuantizer, load_method
from llmconvert.quantize.methods.rescale import describe_edges
from llmconvert.quantize.plan import (
    Override,
    QuantizationPlan,
    QuantizeRequest,
    plan_encoding,
    plan_quantization,
    work_nbytes,
)
from llmconvert.quantize.scheme import Scheme, SchemeOrMix
from llmconvert.quantize.sink import ArtifactSink, finished_blocks
from llmconvert.quantize.solve.expert_moments import PRIOR
from llmconvert.quantize.steps import CalibratedSteps, DataFreeSteps, Steps
from llmconvert.storage.artifact import Artifact, build_artifact, job_key, output_nbytes
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.dense import require_dense
from llmconvert.storage.writer import DEFAULT_SHARD_BYTES, write_json

__all__ = [
    "LayerResult",
    "QuantizePlan",
    "QuantizeResult",
    "plan_quantize",
    "quantize_checkpoint",
    "read_layers",
    "write_layers",
]


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
        notes: what is otherwise than asked for, or otherwise in the runtime than in transformers, a sentence each.
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
    notes: tuple[str, ...] = ()

    @property
    def quantized(self) -> int:
        """Quantized linears; where every tensor has a type, tensors of one that is no plain float."""
        return sum(count for kind, count in self.types.items() if kind not in FLOATS) or len(self.layers)


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """A quantization that was settled from headers; :func:`plan_quantize` makes one.

    Attributes:
        request: what was asked for.
        decisions: the scheme of every linear, and every tensor of the artifact.
        memory: what it is expected to need where it computes, and the mode chosen.
        container: of the artifact, with its layout.
        needs: what running it takes.
    """

    request: QuantizeRequest
    decisions: QuantizationPlan
    memory: MemoryEstimate
    container: Container
    needs: Needs
    _inputs: _Inputs

    @property
    def readers(self) -> Readership:
        """Which runtimes read what is made, by the schemes that its linears really have."""
        return readership(self.request.format, {*self.decisions.schemes.values()} or {self.request.scheme})

    def run(self) -> QuantizeResult:
        """Write the artifact, or go on where an interrupted run of the same plan was stopped.

        Raises:
            CalibrationError: activations or statistics are unusable.
            CapacityError: memory or disk does not suffice.
        """
        begin = time.perf_counter()
        inputs, container, decisions = self._inputs, self.container, self.decisions
        skeleton, progress = inputs.skeleton, inputs.context.progress
        phases = Phases(partial(torch.cuda.synchronize, skeleton.device) if skeleton.device.type == "cuda" else None)
        steps = self._steps(phases)
        for note in container.notes:
            progress.log(f"note: {note}")

        def lost(artifact: Artifact) -> str:
            gone = steps.lost(artifact.work, finished_blocks(artifact))
            return "the activations of an interrupted run are gone or cut short" if gone else ""

        try:
            with build_artifact(inputs.output, container.layout, self._key(), lost=lost, progress=progress) as artifact:
                sink = ArtifactSink(artifact, skeleton, container, decisions, phases)
                resumed = sink.blocks
                quantize_blocks(steps, skeleton.block_count, [sink], artifact.work, progress)
                layers = _layers(decisions, sink)
                if inputs.record is not None:
                    write_layers(inputs.record, layers)
                sink.publish()
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"{skeleton.device} ran out of memory ({str(error).partition('. ')[0]}), {self.memory} was expected; "
                "stop what else runs there, or allow less (memory), so that batches wait in files. The same command "
                "continues"
            ) from error
        return QuantizeResult(
            output=inputs.output,
            layers=layers,
            memory=self.memory,
            nbytes=container.layout.nbytes,
            seconds=time.perf_counter() - begin,
            phases=phases.seconds,
            resumed_blocks=resumed,
            files=tuple(shard.name for shard in container.layout.shards),
            types=container.types,
            notes=container.notes,
        )

    def _key(self) -> str:
        inputs, request = self._inputs, self.request
        identity, original = inputs.context.identity, inputs.original
        return job_key(
            inputs.source,
            self.container.layout,
            {
                "method": request.method,
                "options": repr(inputs.method),
                "format": request.format,
                "device": inputs.skeleton.device.type,
                "expert prior": request.expert_prior if any(inputs.skeleton.experts) else None,
                "schemes": {linear: str(planned) for linear, planned in self.decisions.schemes.items()},
                "original": original.identity if original is not None and not identity else "",
            },
            identity=identity,
            windows=inputs.windows,
        )

    def _steps(self, phases: Phases) -> Steps:
        inputs, decisions = self._inputs, self.decisions
        skeleton, blocks, method = inputs.skeleton, inputs.blocks, inputs.method
        if method.calibration == "none":
            return DataFreeSteps(skeleton, method, decisions, inputs.scale_dtype, phases)
        kinds = {linear: planned.input_kind for linear, planned in decisions.schemes.items()}
        skeleton.quantize_inputs({linear: kind for linear, kind in kinds.items() if kind is not None})
        edges: tuple[tuple[Edge, ...], ...] = ()
        if isinstance(method, ScalingQuantizer):
            edges = find_edges(skeleton, blocks)
            kind = skeleton.architecture.model_type
            described = describe_edges(edges, blocks, kind, skeleton.prefix(0))
            inputs.context.progress.log(f"{self.request.method}: {described}")
        return CalibratedSteps(
            skeleton,
            method,
            decisions,
            inputs.scale_dtype,
            phases,
            blocks,
            inputs.windows,
            self.memory.mode,
            inputs.original,
            edges,
            self.request.expert_prior,
        )


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What a plan was made from."""

    source: Checkpoint
    output: Path
    windows: tuple[torch.Tensor, ...]
    context: Context
    original: Checkpoint | None
    record: Path | None
    skeleton: Skeleton
    blocks: tuple[BlockPlan, ...]
    method: Method
    scale_dtype: torch.dtype


def plan_quantize(
    source: Checkpoint,
    output: Path,
    request: QuantizeRequest,
    *,
    windows: Sequence[torch.Tensor] = (),
    context: Context | None = None,
    original: Checkpoint | None = None,
    record: Path | None = None,
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

    Raises:
        UsageError: something in the request cannot be done; see its subclasses.
        CalibrationError: the method needs text and was given none, or the forward never calls one of the linears.
        CapacityError: memory does not suffice, with what would fit.
    """
    context = context or Context()
    chosen, layout_format = load_method(request.method, request.options), load_format(request.format)
    layout_format.check_output(output)
    check_combination(chosen, request.scheme, layout_format)
    if request.overrides and "overrides" in layout_format.lacks:
        raise UnsupportedError(f"overrides: {layout_format.lacks['overrides']}; leave them out")
    require_dense(source, "the source")
    layout_format.check_source(source)
    calibrated = chosen.calibration != "none"
    if calibrated and not windows:
        raise CalibrationError(f"method {request.method!r} needs calibration text and was given none")
    skeleton = Skeleton(source, context.device, fast_products=True)
    lengths = [window.shape[1] for window in windows] if calibrated else []
    blocks = discover(skeleton, max(lengths) if lengths else PROBE_LENGTH)
    decisions, work, scale_dtype = plan_encoding(skeleton), 0, skeleton.dtype
    if isinstance(request.scheme, Scheme):
        assert isinstance(chosen, Quantizer)  # it chooses codes of schemes
        decisions = plan_quantization(skeleton, blocks, request.scheme, request.overrides, chosen, layout_format)
        work = work_nbytes(skeleton, blocks, decisions, chosen, skeleton.dtype)
        # Formats with several schemes in one model have one dtype for all their scales.
        scale_dtype = layout_format.scale_dtype(next(iter(decisions.schemes.values())), skeleton.dtype)
    streams = 2 if chosen.original else 1
    memory = choose_mode(skeleton, blocks, lengths, work, context.memory, request.mode, streams=streams)
    wanted = ContainerRequest(
        chosen,
        request.scheme,
        decisions.specs,
        decisions.declared,
        request.name or output.name,
        request.max_shard_bytes,
    )
    container = layout_format.container(source, output, wanted)
    # Hidden states of every batch at two blocks' entries, for every stream.
    states = 2 * streams * sum(lengths) * skeleton.hidden_size * skeleton.dtype.itemsize
    disk = output_nbytes(container.layout, container.config, container.files) + states
    inputs = _Inputs(source, output, tuple(windows), context, original, record, skeleton, blocks, chosen, scale_dtype)
    return QuantizePlan(request, decisions, memory, container, memory.needs(skeleton.device, disk=disk), inputs)


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
    expert_prior: float = PRIOR,
    progress: Progress = SILENT,
) -> QuantizeResult:
    """Quantize the linears of every decoder block and write the artifact: :func:`plan_quantize` and its run in one.

    Args:
        source, output, windows, original, record: see :func:`plan_quantize`.
        method, scheme, format, overrides, options, mode, name, max_shard_bytes, expert_prior: see
            :class:`~llmconvert.quantize.plan.QuantizeRequest`.
        device, memory_budget, identity, progress: see :class:`~llmconvert.context.Context`.

    Raises:
        LlmconvertError: see :func:`plan_quantize` and :meth:`QuantizePlan.run`.
    """
    request = QuantizeRequest(
        method, scheme, format, tuple(overrides), options or {}, mode, name, max_shard_bytes, expert_prior
    )
    context = Context(device or torch.device("cpu"), memory_budget, identity, progress)
    return plan_quantize(
        source, output, request, windows=windows, context=context, original=original, record=record
    ).run()


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
