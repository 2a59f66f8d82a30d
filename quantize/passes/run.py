"""Carrying out what was settled: one pass over the blocks into one artifact, or into several at once."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from llmconvert.compute.ranks.group import Ranks
from llmconvert.context import Context
from llmconvert.engine.discovery import BlockPlan
from llmconvert.engine.edges import Edge, MixtureEdge, find_edges, find_mixture_edges
from llmconvert.engine.memory import MemoryEstimate, choose_mode
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import CapacityError, UsageError
from llmconvert.memory import keeping_freed_memory
from llmconvert.needs import Needs
from llmconvert.phases import Phases
from llmconvert.quantize.execute import quantize_blocks, resumed_blocks
from llmconvert.quantize.formats.container import Container
from llmconvert.quantize.formats.encoded import Encoded
from llmconvert.quantize.formats.loading import written_as_held
from llmconvert.quantize.matrix import Readership, readership
from llmconvert.quantize.methods.base import Method, ScalingQuantizer
from llmconvert.quantize.methods.rescale import describe_edges
from llmconvert.quantize.passes.data_free import DataFreeSteps
from llmconvert.quantize.passes.expert_tokens import require_tokens
from llmconvert.quantize.passes.original import OriginalSteps, Variant, VariantSink
from llmconvert.quantize.passes.results import (
    LayerResult,
    QuantizeResult,
    coarse_remark,
    layers_of,
    read_layers,
    write_layers,
)
from llmconvert.quantize.plan import QuantizationPlan, QuantizeRequest
from llmconvert.quantize.scheme import Scheme, SchemeOrMix
from llmconvert.quantize.sink import ArtifactSink, finished_blocks
from llmconvert.quantize.solve.fixed_scales import lone_peaks
from llmconvert.quantize.steps import CalibratedSteps, Outcome, Steps
from llmconvert.storage.artifact import Artifact, build_artifact, job_key
from llmconvert.storage.checkpoint import Checkpoint

__all__ = [
    "Inputs",
    "LayerResult",
    "QuantizePlan",
    "QuantizeResult",
    "quantize_together",
    "read_layers",
    "write_layers",
]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a plan was made from.

    Attributes:
        source, output, windows, context, original, record: see :func:`llmconvert.quantize.job.plan_quantize`.
        skeleton: the source's model.
        blocks: what a forward pass does.
        method: with its options.
        scale_dtype: what the format stores scales as.
        work: peak bytes of statistics and solution beside a block.
        again: plans another request for the same, in a model of its own.
    """

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
    work: int
    again: Callable[[QuantizeRequest], QuantizePlan]


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """A quantization that was settled from headers; :func:`plan_quantize` makes one.

    Attributes:
        request: what was asked for.
        decisions: the scheme of every linear, and every tensor of the artifact.
        memory: what it is expected to need where it computes, and the mode chosen.
        container: of the artifact, with its layout.
        needs: what running it takes.
        inputs: what it was made from.
    """

    request: QuantizeRequest
    decisions: QuantizationPlan
    memory: MemoryEstimate
    container: Container
    needs: Needs
    inputs: Inputs

    @property
    def readers(self) -> Readership:
        """Which runtimes read what is made, by the schemes that its linears really have."""
        decisions = self.decisions
        outer = {site.outside for site in decisions.outer}
        schemes: set[SchemeOrMix] = {*decisions.schemes.values()} or {self.request.scheme}
        experts = any(decisions.sites[name].kind == "expert" for name in decisions.schemes)
        return readership(self.request.format, schemes, outer, self.request.runtime, experts=experts)

    @property
    def notes(self) -> tuple[str, ...]:
        """What will be otherwise than asked for, or otherwise in the runtime than in transformers."""
        held = written_as_held(self.inputs.source)
        return *self._names, *self.decisions.notes, *held, *self.container.notes

    @property
    def _names(self) -> tuple[str, ...]:
        """What others call the scheme, where that is another one's name elsewhere."""
        if isinstance(self.request.scheme, Scheme) and self.request.scheme == Scheme.parse("fp8-dynamic"):
            return ("the scheme is fp8-dynamic (fp8 for short); what compressed-tensors calls FP8 is fp8-static",)
        return ()

    def run(self) -> QuantizeResult:
        """Write the artifact, or go on where an interrupted run of the same plan was stopped.

        Raises:
            CalibrationError: activations or statistics are unusable.
            CapacityError: memory or disk does not suffice.
        """
        return quantize_together((self,))[0]

    @property
    def key(self) -> str:
        """Identifies the job: see :func:`llmconvert.storage.artifact.job_key`."""
        inputs, request = self.inputs, self.request
        identity, original = inputs.context.identity, inputs.original
        return job_key(
            inputs.source,
            self.container.layout,
            {
                "method": request.method,
                "options": repr(inputs.method),
                "format": request.format,
                "device": inputs.skeleton.device.type,
                "statistics": "original" if request.statistics == "original" else None,
                "experts": request.experts if any(inputs.skeleton.experts) else None,
                "cache": request.kv_cache,
                "schemes": {linear: str(planned) for linear, planned in self.decisions.schemes.items()},
                "original": original.identity if original is not None and not identity else "",
            },
            identity=identity,
            windows=inputs.windows,
        )


def quantize_together(plans: Sequence[QuantizePlan]) -> tuple[QuantizeResult, ...]:
    """Write several artifacts in one pass, or go on where an interrupted run of the same plans was stopped.

    A device that runs out of memory while all batches are under way is answered by one batch at a time: the pass goes
    on behind the last finished block, to the same bytes.

    Args:
        plans: of one source and one calibration text on one device; several only with the original's statistics.

    Returns:
        a result for each; memory, seconds and phases are those of the pass.

    Raises:
        CalibrationError, CapacityError: see :meth:`QuantizePlan.run`.
    """
    begin, context = time.perf_counter(), plans[0].inputs.context
    phases = Phases(partial(torch.cuda.synchronize, context.device) if context.device.type == "cuda" else None)
    results = _attempt(plans, phases)
    if results is None:
        # Nothing holds the error's frames any more. The model is made anew: the first has hooks on its blocks.
        gc.collect()
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
        results = _attempt([plan.inputs.again(replace(plan.request, mode="replay")) for plan in plans], phases)
        assert results is not None
    return tuple(replace(result, seconds=time.perf_counter() - begin) for result in results)


def _attempt(plans: Sequence[QuantizePlan], phases: Phases) -> list[QuantizeResult] | None:
    """One pass; None if the device ran out of memory, and one batch at a time may do.

    Raises:
        CapacityError: the device ran out of memory, and nothing smaller is left.
    """
    context = plans[0].inputs.context
    memory = _joint_memory(plans) if plans[0].request.statistics == "original" else plans[0].memory
    try:
        with keeping_freed_memory(memory.kept):
            return _pass(plans, memory, phases)
    except torch.OutOfMemoryError as error:
        told = f"{context.device} ran out of memory ({str(error).partition('. ')[0]}), {memory} was expected"
        if memory.mode == "lockstep" and context.ranks.alone:
            context.progress.log(f"note: {told}; goes on behind the last finished block with one batch at a time")
            return None
        raise CapacityError(
            f"{told}; stop what else runs there, or allow less (memory), or shorter samples. The same command continues"
        ) from error


def _pass(plans: Sequence[QuantizePlan], memory: MemoryEstimate, phases: Phases) -> list[QuantizeResult]:
    """One pass over the blocks, in the mode of ``memory``, from where an earlier one was stopped."""
    first = plans[0]
    skeleton, progress, ranks = first.inputs.skeleton, first.inputs.context.progress, first.inputs.context.ranks
    _require_same(plans, ranks)
    for note in dict.fromkeys(note for plan in plans for note in plan.notes):
        progress.log(f"note: {note}")
    least = max(plan.request.min_tokens_per_expert for plan in plans)
    if least:
        inputs, every = first.inputs, first.request.experts == "all"
        windows = [inputs.windows[number] for number in ranks.share(len(inputs.windows))]
        require_tokens(skeleton, inputs.blocks, windows, memory.mode, least, every=every, phases=phases, ranks=ranks)
    if first.request.statistics == "original":
        steps = _original_steps(plans, memory, phases)
        with _opened(plans, steps.lost, phases, ranks) as (sinks, work, resumed):
            own = [VariantSink(number, sink) for number, sink in enumerate(sinks)]
            quantize_blocks(steps, skeleton.block_count, own, work, progress, done=resumed, ranks=ranks)
            layers = _finished(plans, sinks)
    else:
        assert len(plans) == 1, "what follows what was quantized before is one artifact's own"
        alone = _sequential_steps(first, phases)
        with _opened(plans, alone.lost, phases, ranks) as (sinks, work, resumed):
            quantize_blocks(alone, skeleton.block_count, sinks, work, progress, done=resumed, ranks=ranks)
            if isinstance(alone, CalibratedSteps) and (remark := lone_peaks(alone.leads)):
                progress.log(remark)
            layers = _finished(plans, sinks)
    remarks = [coarse_remark(found) for found in layers]
    for remark in dict.fromkeys(filter(None, remarks)):
        progress.log(remark)
    return [
        QuantizeResult(
            output=plan.inputs.output,
            layers=found,
            memory=memory,
            nbytes=plan.container.layout.nbytes,
            seconds=0.0,
            phases=phases.seconds,
            resumed_blocks=resumed,
            files=tuple(shard.name for shard in plan.container.layout.shards),
            types=plan.container.types,
            notes=(*plan.notes, *filter(None, (remark,))),
        )
        for plan, found, remark in zip(plans, layers, remarks, strict=True)
    ]


@contextmanager
def _opened(
    plans: Sequence[QuantizePlan], lost: Callable[[Path, int], bool], phases: Phases, ranks: Ranks
) -> Iterator[tuple[list[ArtifactSink], Path, int]]:
    """The sinks of the plans' artifacts, a directory for activations (the first one's), and how many blocks are done.

    Of several processes the first one has the sinks.
    """
    if not ranks.leads:
        work, done = ranks.tell()
        _require_seen(Path(work), ranks)
        yield [], Path(work), done
        return
    with ExitStack() as stack:
        artifacts: list[Artifact] = []

        def gone(artifact: Artifact) -> str:
            work = artifacts[0].work if artifacts else artifact.work
            cut = lost(work, finished_blocks(artifact))
            return "the activations of an interrupted run are gone or cut short" if cut else ""

        for plan in plans:
            inputs = plan.inputs
            built = build_artifact(
                inputs.output, plan.container.layout, plan.key, lost=gone, progress=inputs.context.progress
            )
            artifacts.append(stack.enter_context(built))
        encoded = Encoded()
        sinks = [
            ArtifactSink(artifact, plan.inputs.skeleton, plan.container, plan.decisions, phases, encoded)
            for plan, artifact in zip(plans, artifacts, strict=True)
        ]
        work, done = artifacts[0].work.absolute(), resumed_blocks(sinks)
        ranks.tell([str(work), done])
        yield sinks, work, done


def _require_same(plans: Sequence[QuantizePlan], ranks: Ranks) -> None:
    """Refuse processes that are about to make different things.

    Raises:
        UsageError: they are.
    """
    if ranks.alone:
        return
    keys = ranks.ask([plan.key for plan in plans])
    for rank, key in enumerate(keys):
        if key != keys[0]:
            raise UsageError(
                f"rank {rank} of {ranks.count} sees another model, text or recipe than rank 0, or has other versions "
                "of llmconvert or torch; give all processes the same files, and install the same packages"
            )


def _require_seen(work: Path, ranks: Ranks) -> None:
    """Refuse to begin where a process does not see what the first one writes.

    Raises:
        UsageError: it does not.
    """
    if not work.is_dir():
        raise UsageError(
            f"{work}: rank {ranks.rank} of {ranks.count} does not see this directory, which rank 0 has made; name one "
            "that all machines share under the same path"
        )


def _finished(plans: Sequence[QuantizePlan], sinks: Sequence[ArtifactSink]) -> list[tuple[LayerResult, ...]]:
    """Put the artifacts in place; gives what came of the linears of each, where there are sinks."""
    if not sinks:
        return [() for _ in plans]
    layers = [layers_of(plan.decisions, sink) for plan, sink in zip(plans, sinks, strict=True)]
    for plan, found, sink in reversed(list(zip(plans, layers, sinks, strict=True))):  # the first has the activations
        if plan.inputs.record is not None:
            write_layers(plan.inputs.record, found)
        sink.publish()
    return layers


def _joint_memory(plans: Sequence[QuantizePlan]) -> MemoryEstimate:
    """What a pass for all of them needs, and its mode.

    Raises:
        CapacityError: memory does not suffice, with what would fit.
    """
    inputs, request = plans[0].inputs, plans[0].request
    if len(plans) == 1:
        return plans[0].memory
    lengths = [window.shape[1] for window in inputs.windows]
    work = sum(plan.inputs.work for plan in plans)
    return choose_mode(inputs.skeleton, inputs.blocks, lengths, work, inputs.context.memory, request.mode, streams=1)


def _original_steps(plans: Sequence[QuantizePlan], memory: MemoryEstimate, phases: Phases) -> OriginalSteps:
    inputs = plans[0].inputs
    variants = [Variant(plan.inputs.method, plan.decisions, plan.inputs.scale_dtype) for plan in plans]
    request = plans[0].request
    return OriginalSteps(
        inputs.skeleton,
        variants,
        phases,
        inputs.blocks,
        inputs.windows,
        memory,
        request.experts == "all",
    )


def _sequential_steps(plan: QuantizePlan, phases: Phases) -> Steps[Outcome]:
    """The way through the blocks for one artifact, each linear on what those before it have become."""
    inputs, decisions = plan.inputs, plan.decisions
    skeleton, blocks, method = inputs.skeleton, inputs.blocks, inputs.method
    fixed = any(planned.fixes_inputs for planned in decisions.schemes.values()) or decisions.caches
    if method.calibration == "none" and not fixed:
        return DataFreeSteps(skeleton, method, decisions, inputs.scale_dtype, phases, inputs.context.ranks)
    kinds = {linear: planned.input_kind for linear, planned in decisions.schemes.items() if not planned.fixes_inputs}
    skeleton.quantize_inputs({linear: kind for linear, kind in kinds.items() if kind is not None})
    edges: tuple[tuple[Edge, ...], ...] = ()
    mixtures: tuple[tuple[MixtureEdge, ...], ...] = ()
    if isinstance(method, ScalingQuantizer):
        edges = find_edges(skeleton, blocks)
        if method.moments and any(decisions.sites[name].kind == "expert" for name in decisions.schemes):
            mixtures = find_mixture_edges(skeleton, blocks)
        described = describe_edges(skeleton, blocks, edges, mixtures)
        inputs.context.progress.log(f"{plan.request.method}: {described}")
    return CalibratedSteps(
        skeleton,
        method,
        decisions,
        inputs.scale_dtype,
        phases,
        blocks,
        inputs.windows,
        plan.memory,
        inputs.original,
        edges,
        mixtures,
        plan.request.experts == "all",
        skeleton.watch_caches() if decisions.caches else {},
        inputs.context.ranks,
    )
