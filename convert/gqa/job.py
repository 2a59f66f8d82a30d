"""MHA to GQA or MQA: rewriting a checkpoint to fewer key-value heads, on disk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llmconvert.context import Context
from llmconvert.convert.gqa.blockwise import merge_nbytes, refit_needs, stream_merge
from llmconvert.convert.gqa.geometry import AttentionGeometry
from llmconvert.convert.gqa.merging.layer import METHODS, MergedLayer, Method
from llmconvert.convert.gqa.refit.options import RefitOptions
from llmconvert.convert.gqa.view import MergedAttention
from llmconvert.convert.gqa.weights import attention_tensors
from llmconvert.engine.memory import BASE_NBYTES
from llmconvert.errors import UnsupportedError
from llmconvert.needs import Needs
from llmconvert.progress import SILENT, Progress, Task
from llmconvert.report.steps import AttentionReport, LayerReport
from llmconvert.storage.artifact import Artifact, build_artifact, job_key, output_nbytes
from llmconvert.storage.checkpoint import Checkpoint, TensorSpec
from llmconvert.storage.dense import require_dense
from llmconvert.storage.writer import DEFAULT_SHARD_BYTES, Layout, check_output_directory, plan_layout

__all__ = ["AttentionPlan", "AttentionRequest", "convert_attention", "plan_attention"]

_MEMORIES = {"16 GB": 16e9, "24 GB": 24e9, "80 GB": 80e9}
_BITS = {"bfloat16": 16.0, "4 bits": 4.25}


@dataclass(frozen=True, slots=True)
class AttentionRequest:
    """What is asked for when key-value heads are merged.

    Attributes:
        kv_heads: per layer; divides the present number.
        method: a name in :data:`~llmconvert.convert.gqa.merging.layer.METHODS`.
        refit: whether queries, keys and output projections are refitted on the calibration text.
        options: how, in detail.
        max_shard_bytes: size at which a new shard is begun.
    """

    kv_heads: int
    method: str = "svd"
    refit: bool = True
    options: RefitOptions | None = None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """A rewrite that was settled from headers; :func:`plan_attention` makes one.

    Attributes:
        request: what was asked for.
        view: the model as it will be, merged by the weights alone whenever it is read.
        layout: of the output's weight files.
        calibrated: whether text is used.
        needs: what running it takes.
    """

    request: AttentionRequest
    view: MergedAttention
    layout: Layout
    calibrated: bool
    needs: Needs
    _output: Path
    _windows: tuple[torch.Tensor, ...]
    _context: Context

    def run(self) -> AttentionReport:
        """Write the output. A run that was stopped continues: behind the last layer that is on disk without text; with
        it, where each layer needs what streamed through those before, once all are.

        Raises:
            CalibrationError: activations are unusable.
            CapacityError: the disk does not suffice.
        """
        begin = time.perf_counter()
        view, request, context, layout = self.view, self.request, self._context, self.layout
        source, geometry = view.base, view.geometry
        settings = _refit_options(request)
        about = {
            "kv_heads": request.kv_heads,
            "method": request.method,
            "refit": asdict(settings),
            "device": context.device.type,
        }
        key = job_key(source, layout, about, identity=context.identity, windows=self._windows)
        with build_artifact(self._output, layout, key, progress=context.progress) as artifact:
            with context.progress.task("Merging attention", geometry.layers) as task:
                if self.calibrated:
                    _write_refitted(artifact, view, self._windows, settings, context, task)
                else:
                    _write_merged(artifact, view, task)
            layers = [LayerReport.model_validate(artifact.done[_piece(layer)]) for layer in range(geometry.layers)]
            attention = {n for i in range(geometry.layers) for n in attention_tensors(source, geometry, i)}
            artifact.copy(source, (name for name in source if name not in attention))
            artifact.publish(view.config, source.files)
        wide, narrow = geometry.kv_heads, request.kv_heads
        return AttentionReport(
            method=request.method,
            kv_heads=(wide, narrow),
            kv_bytes_per_token=(geometry.kv_bytes_per_token(wide), geometry.kv_bytes_per_token(narrow)),
            contexts=_contexts(source, view),
            layers=tuple(layers),
            left_out=_left_out(
                geometry,
                request.method,
                [layer.symmetric for layer in layers],
                calibrated=self.calibrated,
                refit=settings.logits,
            ),
            nbytes=layout.nbytes,
            seconds=time.perf_counter() - begin,
        )


def plan_attention(
    source: Checkpoint,
    output: Path,
    request: AttentionRequest,
    *,
    windows: Sequence[torch.Tensor] = (),
    context: Context | None = None,
) -> AttentionPlan:
    """Settle a rewrite to fewer key-value heads; nothing but headers is read, nothing written.

    The result is a plain checkpoint of the same architecture; only attention weights differ. Without calibration text
    the merge goes by the weights alone, which loses much more.

    Args:
        source: dense weights.
        output: a directory that does not exist yet or is empty; it appears whole or not at all.
        request: heads, method, refit.
        windows: calibration token ids, each ``[1, length]``.
        context: device, memory, identity and progress, one unit per layer.

    Raises:
        UsageError: an architecture, method or number of heads that can't be done; an unusable output directory.
        CapacityError: memory does not suffice, with what would fit.
    """
    if request.method not in METHODS:
        raise UnsupportedError(f"attention method {request.method!r} is unknown; known are {', '.join(METHODS)}")
    method: Method = request.method  # type: ignore[assignment]
    context = context or Context()
    check_output_directory(output)
    require_dense(source, "the source")
    view = MergedAttention(source, request.kv_heads, method)
    calibrated = bool(windows) and view.geometry.plain
    layout = plan_layout(
        (TensorSpec(info.name, info.dtype, info.shape) for info in view.infos.values()), request.max_shard_bytes
    )
    disk = output_nbytes(layout, view.config, source.files)
    needs = Needs(memory=BASE_NBYTES + merge_nbytes(view.geometry), disk=disk)
    if calibrated:
        needs = refit_needs(view, windows, context) + Needs(disk=disk, seconds=None)
    taken = tuple(windows) if calibrated else ()
    return AttentionPlan(request, view, layout, calibrated, needs, output, taken, context)


def _refit_options(request: AttentionRequest) -> RefitOptions:
    return request.options or (RefitOptions() if request.refit else RefitOptions(outputs=False, logits=False))


def convert_attention(
    source: Checkpoint,
    output: Path,
    *,
    kv_heads: int,
    method: str = "svd",
    windows: Sequence[torch.Tensor] = (),
    refit: bool = True,
    options: RefitOptions | None = None,
    device: torch.device | None = None,
    identity: str = "",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = SILENT,
) -> AttentionReport:
    """Write ``source`` with ``kv_heads`` key-value heads per layer: :func:`plan_attention` and its run in one call.

    Args:
        source, output, windows: see :func:`plan_attention`.
        kv_heads, method, refit, options, max_shard_bytes: see :class:`AttentionRequest`.
        device, identity, progress: see :class:`~llmconvert.context.Context`.

    Raises:
        LlmconvertError: see :func:`plan_attention` and :meth:`AttentionPlan.run`.
    """
    request = AttentionRequest(kv_heads, method, refit, options, max_shard_bytes)
    context = Context(device or torch.device("cpu"), None, identity, progress)
    return plan_attention(source, output, request, windows=windows, context=context).run()


def _write_refitted(
    artifact: Artifact,
    view: MergedAttention,
    windows: Sequence[torch.Tensor],
    settings: RefitOptions,
    context: Context,
    task: Task,
) -> None:
    """Merge and refit all layers. What streams between them is not kept: they are done together or begun again."""
    if all(_piece(layer) in artifact.done for layer in range(view.geometry.layers)):
        task.advance(view.geometry.layers)
        return
    solved = stream_merge(view.base, view.kv_heads, view.method, windows, settings, context, artifact.work)
    with closing(solved):
        for number, layer in enumerate(solved):
            for name, tensor in layer.tensors.items():
                artifact.writer.write(name, tensor)
            before, after = layer.output_loss
            divergence = layer.divergence or (None, None)
            merged = layer.merged
            report = LayerReport(
                groups=merged.groups,
                key_loss=merged.key_loss,
                value_loss=merged.value_loss,
                output_loss=after,
                output_loss_before=before,
                divergence=divergence[1],
                divergence_before=divergence[0],
                symmetric=merged.symmetric,
            )
            artifact.finish(_piece(number), report.model_dump(mode="json"))
            task.advance(1, f"{after:.1%} of what attention should add lost")


def _write_merged(artifact: Artifact, view: MergedAttention, task: Task) -> None:
    """Merge the layers that are not done, each by its weights alone."""
    for layer in range(view.geometry.layers):
        if _piece(layer) not in artifact.done:
            merged: MergedLayer = view.merge(layer)
            for name in attention_tensors(view.base, view.geometry, layer):
                if name in view:  # a norm of a single head goes with its head
                    artifact.writer.write(name, view[name])
            report = LayerReport(
                groups=merged.groups,
                key_loss=merged.key_loss,
                value_loss=merged.value_loss,
                symmetric=merged.symmetric,
            )
            artifact.finish(_piece(layer), report.model_dump(mode="json"))
        task.advance()


def _piece(layer: int) -> str:
    return f"layer {layer}"


def _left_out(
    geometry: AttentionGeometry, method: str, symmetric: Sequence[bool], *, calibrated: bool, refit: bool
) -> tuple[str, ...]:
    notes = []
    if not geometry.plain:
        notes.append(f"{geometry.model_type}'s projections are no plain linear layers: no text can be run through them")
    if not calibrated:
        notes.append("no calibration text used: merged by the weights alone, nothing refitted")
    if geometry.norm is not None:
        where = "over whole layers" if geometry.norm.scope == "layer" else "per head"
        notes.append(f"queries and keys are normalized {where}: {_norm_note(geometry, method, symmetric)}")
        if calibrated and refit:
            notes.append(f"queries and keys are normalized {where}: the two are not refitted")
    if not geometry.movable:
        notes.append("query heads have slopes (ALiBi) or sinks of their own: only neighbouring heads are merged")
    return tuple(notes)


def _norm_note(geometry: AttentionGeometry, method: str, symmetric: Sequence[bool]) -> str:
    """What the norms left to a merge, and in how many layers it went further."""
    if method != "svd":
        return "their weights are pooled along"
    assert geometry.norm is not None
    if geometry.norm.weights != "shared" and geometry.norm.scope == "head":
        return "keys are merged up to their sign and their norms' weights alone"
    rest = symmetric.count(False)
    approximate = f"in {rest} of {len(symmetric)} layers" if rest else "in no layer"
    if geometry.norm.scope == "layer":
        return f"what the norm divides by could not be kept exactly {approximate}"
    return f"signs and sizes of keys are free, other transforms, which the norm notices, lost less {approximate}"


def _contexts(source: Checkpoint, view: MergedAttention) -> dict[str, tuple[int, int]]:
    geometry = view.geometry
    inside = geometry.blocks

    def tokens(checkpoint: Checkpoint, kv_heads: int, memory: float, bits: float) -> int:
        weights = 0.0
        for info in checkpoint.infos.values():
            matrix = len(info.shape) == 2 and info.name.startswith(inside)
            weights += info.nbytes / info.dtype.itemsize * (bits if matrix else 16) / 8
        return max(0, int((memory - weights) // geometry.kv_bytes_per_token(kv_heads)))

    return {
        f"{memory}, {dtype}": (tokens(source, geometry.kv_heads, size, bits), tokens(view, view.kv_heads, size, bits))
        for memory, size in _MEMORIES.items()
        for dtype, bits in _BITS.items()
    }
