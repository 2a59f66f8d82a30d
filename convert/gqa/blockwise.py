"""MHA to GQA block by block, while calibration text streams through: heads merged, then refitted to the original.

Two models run side by side, the original and the merged one, each in the memory of one block. In every block the
merge is solved on the second moments of the merged model's own attention input; queries and keys are refitted to the
original's attention; then values and the output projection are refitted to what attention should add: the original's
attention output, and what the hidden state that it is added to has lost in the layers before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from llmconvert.context import Context
from llmconvert.convert.gqa.geometry import AttentionGeometry
from llmconvert.convert.gqa.merging.layer import MergedLayer, Method, merge_layer
from llmconvert.convert.gqa.refit.capture import PositionWeights, RotaryAngles, keep_inputs
from llmconvert.convert.gqa.refit.logits import LogitFit, LogitSamples
from llmconvert.convert.gqa.refit.options import RefitOptions
from llmconvert.convert.gqa.refit.outputs import OutputFit
from llmconvert.convert.gqa.refit.values import ValueFit
from llmconvert.convert.gqa.side import Side, refit_dtype, share
from llmconvert.convert.gqa.view import MergedAttention
from llmconvert.convert.gqa.weights import LayerWeights, layer_tensors, read_layer
from llmconvert.engine.discovery import discover
from llmconvert.engine.memory import MemoryEstimate, choose_mode
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.statistics import accumulate_hessian
from llmconvert.engine.stream import BlockRun
from llmconvert.needs import Needs
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.shared import share_tensors

__all__ = ["RefitLayer", "merge_nbytes", "refit_needs", "stream_merge"]

# Copies in float64 that merging and refitting a layer hold of its attention's weights, and of second moments of its
# inputs: of layers of 576, 768 and 2,048 inputs, from what processes took at most.
_WEIGHTS_HELD, _MOMENTS_HELD = 5, 4
# What the two models have in common.
_SHARED = ("base", "tokenizer", "embeddings", "one linear")


@dataclass(frozen=True, slots=True)
class RefitLayer:
    """One layer as it is written.

    Attributes:
        tensors: by checkpoint name, in the checkpoint's dtypes.
        merged: the closed form it started from.
        output_loss: squared difference to what attention should add over its square, on the calibration text,
            before and after the output refit; positions count by one over the mean square of their hidden state.
        divergence: of the attention, in nats, before and after the logit refit; None without one.
    """

    tensors: dict[str, torch.Tensor]
    merged: MergedLayer
    output_loss: tuple[float, float]
    divergence: tuple[float, float] | None


def stream_merge(
    source: Checkpoint,
    kv_heads: int,
    method: Method,
    windows: Sequence[torch.Tensor],
    options: RefitOptions,
    context: Context,
    work: Path,
) -> Generator[RefitLayer, None, None]:
    """Merge ``source`` layer by layer.

    Args:
        source: dense weights.
        kv_heads: key-value heads per layer that remain.
        method: of the merge.
        windows: calibration token ids, each ``[1, length]``.
        options: how much is refitted.
        context: where to compute, and in how much memory.
        work: an existing directory for activations.

    Yields:
        every layer, in order; each must be used before the next is asked for.

    Raises:
        UnsupportedError: the engine cannot run this architecture.
        CalibrationError: activations are unusable.
        CapacityError: the disk cannot hold the activations.
    """
    view = MergedAttention(source, kv_heads, "first")
    apart = frozenset(name for name in source.infos if name.startswith(view.geometry.blocks))
    wide, narrow = share_tensors((source, view), apart, context.device, refit_dtype(context.device))
    with (
        Side(wide, windows, context, work / "original", _work_nbytes(view, windows), replayed=True) as original,
        Side(narrow, windows, context, work / "merged", _work_nbytes(view, windows)) as merged,
    ):
        for before, after in zip(original.stream.blocks(), merged.stream.blocks(), strict=True):
            block = _Block(view, original, merged, before, after, options)
            yield block.solve(method)


def merge_nbytes(geometry: AttentionGeometry) -> int:
    """Bytes that merging the heads of a layer takes: its attention's weights and second moments, in float64."""
    hidden, heads = geometry.hidden_size, geometry.query_heads + geometry.kv_heads
    return 8 * (_WEIGHTS_HELD * 2 * hidden * heads * geometry.head_dim + _MOMENTS_HELD * hidden**2)


def _work_nbytes(view: MergedAttention, windows: Sequence[torch.Tensor]) -> int:
    """What solving a layer holds besides the models and their batches: samples, what their heads attend to, weights."""
    samples, mean = RefitOptions().sample_nbytes, 3 / 4 * max(window.shape[1] for window in windows)
    return samples + int(samples / 4 * view.geometry.hidden_size / mean) + merge_nbytes(view.geometry)


def refit_needs(view: MergedAttention, windows: Sequence[torch.Tensor], context: Context) -> Needs:
    """What :func:`stream_merge` takes, activations on disk among it; nothing but headers is read.

    Raises:
        CapacityError: the memory does not suffice, with what would fit.
    """
    lengths = [window.shape[1] for window in windows]
    states, sides = 0, []
    for checkpoint in (view.base, view):
        skeleton = Skeleton(checkpoint, context.device, refit_dtype(context.device))
        plans = discover(skeleton, max(lengths))
        side = choose_mode(skeleton, plans, lengths, _work_nbytes(view, windows), share(context))
        sides.append(side)
        states += 2 * sum(lengths) * skeleton.hidden_size * skeleton.dtype.itemsize if side.mode == "replay" else 0
    original, merged = sides
    parts = {name: size + (0 if name in _SHARED else merged.parts[name]) for name, size in original.parts.items()}
    return MemoryEstimate(merged.mode, parts).needs(context.device, disk=states, passing=states)


class _Block:
    """One block of both models, with all windows at its entry."""

    def __init__(
        self,
        view: MergedAttention,
        original: Side,
        merged: Side,
        before: BlockRun,
        after: BlockRun,
        options: RefitOptions,
    ) -> None:
        self._view = view
        self._geometry: AttentionGeometry = view.geometry
        self._original, self._merged = original, merged
        self._before, self._after = before, after
        self._options = options
        self._outputs: list[torch.Tensor] = []
        self._layer = after.plan.index
        self._names = self._geometry.projections[self._layer]
        # Where attention is added as it is: not where a norm or a factor comes in between.
        output = (merged.linear(self._names.output),)
        added = any(stop.linears == output and stop.residual is not None for stop in after.plan.stops)
        self._entering = [original.entering(before), merged.entering(after)] if added and options.residual else []
        self._device = merged.skeleton.device

    def solve(self, method: Method) -> RefitLayer:
        """Merge, refit and install the block's attention."""
        weights = read_layer(self._view.base, self._geometry, self._layer)
        wide = weights.key.shape[-1] > self._geometry.hidden_size
        picks = self._picked_rows() if self._options.logits and self._geometry.norm is None else {}
        kept: list[torch.Tensor] = []
        angles = RotaryAngles(self._attention_module())
        inputs = keep_inputs(self._after.inputs(self._merged.linear(self._names.query)), picks, kept, wide=wide)
        positions = PositionWeights(self._merged.skeleton.blocks[self._layer])
        with angles, positions:
            hessian = accumulate_hessian(self._names.query, inputs, weights.key.shape[-1], self._device)
        merged = merge_layer(
            weights,
            hessian.matrix.double().cpu(),
            self._view.kv_heads,
            method=method,
            rotary=self._geometry.rotary[self._layer],
            norm=self._geometry.norm,
            movable=self._geometry.movable,
        )
        result, divergence = merged.weights, None
        importance = positions.by_window()
        if picks and (angles.found or not self._geometry.rotary[self._layer].dims):
            chosen = [importance[pick] for pick in picks]
            fit = self._logit_fit(weights, merged, hessian.matrix, picks, kept, chosen, angles, wide=wide)
            start = _to(merged.weights, self._device)
            result = fit.fit(start, self._options.rounds, self._options.steps)
            divergence = fit.divergence(start), fit.divergence(result)
            if self._options.outputs:
                result = self._fit_values(fit, result, picks, chosen)
            del fit
            kept.clear()
        tensors = self._install(result)
        tensors, loss = self._refit_output(tensors, importance)
        self._outputs.clear()
        self._entering.clear()
        return RefitLayer(tensors, merged, loss, divergence)

    def _logit_fit(
        self,
        weights: LayerWeights,
        merged: MergedLayer,
        moments: torch.Tensor,
        picks: Mapping[int, torch.Tensor],
        kept: Sequence[torch.Tensor],
        importance: Sequence[torch.Tensor],
        angles: RotaryAngles,
        *,
        wide: bool,
    ) -> LogitFit:
        """The layer's queries and keys against the original's on the picked windows."""
        rotary = self._geometry.rotary[self._layer]
        originals = self._original_inputs(picks, wide=wide)
        module = self._attention_module()
        cosines, sines = angles.by_pair(rotary.dims // 2, self._device)
        samples = LogitSamples(
            tuple(originals),
            tuple(kept),
            tuple(picks.values()),
            cosines,
            sines,
            scaling=float(getattr(module, "scaling", self._geometry.head_dim**-0.5)),
            window=getattr(module, "sliding_window", None),
            softcap=self._merged.skeleton.architecture.softcap,
            importance=tuple(importance),
        )
        ratio = weights.queries_per_kv
        heads = torch.tensor([head for group in merged.groups for head in group])
        order = (heads[:, None] * ratio + torch.arange(ratio)).flatten()
        ordered = _to(replace(weights, query=weights.query[order], output=weights.output[order]), self._device)
        key_of = heads.repeat_interleave(ratio).to(self._device)
        return LogitFit(samples, ordered, key_of, moments, rotary)

    def _fit_values(
        self,
        fit: LogitFit,
        weights: LayerWeights,
        picks: Mapping[int, torch.Tensor],
        importance: Sequence[torch.Tensor],
    ) -> LayerWeights:
        """Values and output projection on the rows that queries and keys were fitted on, if these are enough."""
        if not ValueFit.enough(weights, sum(map(len, picks.values()))):
            return weights
        outputs = zip(fit.original_outputs(), picks.items(), strict=True)
        targets = [self._wanted(output, window, rows) for output, (window, rows) in outputs]
        counted = [every[rows] for every, rows in zip(importance, picks.values(), strict=True)]
        values = ValueFit(self._names.output, fit.attended(weights), targets, counted, ridge=self._options.ridge)
        return values.fit(weights)

    def _wanted(self, output: torch.Tensor, window: int, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """What attention should add at some rows of a window: the original's output, and what was lost before."""
        if not self._entering:
            return output
        theirs, ours = (entering(window)[rows].to(self._device, torch.float32) for entering in self._entering)
        return output + (theirs - ours) * self._options.residual

    def _picked_rows(self) -> dict[int, torch.Tensor]:
        """The windows that the logit refit sees, as many as fit its memory, and the positions of their queries.

        They are drawn from the first half of one window, which saves looking at what follows, and from the second
        half of the next.
        """
        lengths = [window.shape[1] for window in self._merged.windows]
        mean, half = max(lengths) * 3 / 4, self._options.sample_nbytes / 2
        windows = int(half / (2 * 4 * mean * (self._geometry.hidden_size + 1)))
        windows = max(1, min(len(lengths), self._options.windows, windows))
        rows = max(1, int(half / (2 * 4 * mean * windows * self._geometry.query_heads)))
        generator = torch.Generator().manual_seed(self._layer)
        picked = {}
        for number, length in enumerate(lengths[:windows]):
            middle = (length + 1) // 2
            first, last = ((0, middle), (middle, length))[number % 2] if length > 1 else (0, 1)
            chosen = torch.randperm(last - first, generator=generator)[:rows] + first
            picked[number] = chosen.sort().values.to(self._device)
        return picked

    def _original_inputs(self, picks: Mapping[int, torch.Tensor], *, wide: bool) -> list[torch.Tensor]:
        """What goes into the original's queries in the picked windows.

        If there is memory for it, what goes into its output projection is kept from the same pass.
        """
        names = [self._original.linear(stem) for stem in (self._names.query, self._names.output)]
        kept: list[torch.Tensor] = []
        if self._original.filed:
            deque(keep_inputs(self._before.inputs(names[0]), picks, kept, wide=wide), maxlen=0)
            return kept
        self._outputs = []

        def entering() -> Iterator[torch.Tensor]:
            for query, output in self._before.joint_inputs(names):
                assert query is not None and output is not None
                self._outputs.append(output)
                yield query

        deque(keep_inputs(entering(), picks, kept, wide=wide), maxlen=0)
        return kept

    def _attention_module(self) -> nn.Module:
        return self._submodule(self._merged.linear(self._names.query).rpartition(".")[0])

    def _submodule(self, name: str) -> nn.Module:
        """A module of the merged block by its full name."""
        return self._merged.skeleton.submodule(self._layer, name)

    def _install(self, weights: LayerWeights) -> dict[str, torch.Tensor]:
        """Let the merged model meet ``weights``; gives them as they are stored."""
        geometry = self._geometry
        tensors = layer_tensors(self._view.base, geometry, self._layer, _to(weights, torch.device("cpu")))
        for name, tensor in tensors.items():
            stem, _, leaf = name.rpartition(".")
            getattr(self._submodule(self._merged.linear(stem)), leaf).data.copy_(tensor)
        return tensors

    def _refit_output(
        self, tensors: dict[str, torch.Tensor], importance: Sequence[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], tuple[float, float]]:
        """The output projection by ridge regression to what attention should add, positions by importance."""
        name = f"{self._names.output}.weight"
        after = self._after.inputs(self._merged.linear(self._names.output))
        before = self._outputs or self._before.inputs(self._original.linear(self._names.output))
        target = self._view.base[name].to(self._device, torch.float32)
        rows = (
            (ours, self._wanted(theirs.float() @ target.mT, window), weights)
            for window, (ours, theirs, weights) in enumerate(zip(after, before, importance, strict=True))
        )
        fit = OutputFit(self._names.output, rows, self._device)
        closed = tensors[name].to(self._device, torch.float32)
        if not self._options.outputs:
            return tensors, (fit.loss(closed), fit.loss(closed))
        stored = fit.fit(closed, self._options.ridge).to(tensors[name].dtype)
        self._after.install(self._merged.linear(self._names.output), stored)
        return {**tensors, name: stored.cpu()}, (fit.loss(closed), fit.loss(stored.float()))


def _to(weights: LayerWeights, device: torch.device) -> LayerWeights:
    return weights.to(device, torch.float32)
