"""Scale migration (AWQ, SmoothQuant): along a block's edges, producers are divided and the linears behind multiplied.

The block computes what it computed, but where a channel was large in activations it is now large in weights (or the
reverse), and rounding hurts less. Which channels get which scale is the method's business; here its statistics are
gathered, in one more pass of the block over the batches, and the scales are folded.

Folding costs as little exactness as it can: a norm's weights are rounded to their dtype after the division, and the
linears are multiplied by the ratio that this has really become. Weights that are quantized anyway are never rounded
in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from greenlet import greenlet
from torch import nn

from llmconvert.compute.precision import all_finite
from llmconvert.engine.discovery import BlockPlan
from llmconvert.engine.edges import Edge, edge_holds, record_inputs
from llmconvert.engine.statistics import Hessian, accumulate_hessian
from llmconvert.engine.stream import BlockRun
from llmconvert.errors import CalibrationError, CheckpointError, UnsupportedError
from llmconvert.quantize.methods.base import ScaledEdge, ScalingQuantizer, Target
from llmconvert.quantize.scheme import Scheme

__all__ = ["Rescaling", "describe_edges", "rescale_block", "share_by_channel"]


@dataclass(frozen=True, slots=True)
class Rescaling:
    """What the weights of a block's linears are multiplied by before they are quantized.

    Attributes:
        columns: linear → float32 factor of each of its columns.
        rows: linear → float32 factor of each of its rows.
        changed: parameters already rescaled in the running block, with their names in the model.
    """

    columns: Mapping[str, torch.Tensor]
    rows: Mapping[str, torch.Tensor]
    changed: Mapping[str, torch.Tensor]

    def __contains__(self, linear: str) -> bool:
        return linear in self.columns or linear in self.rows

    def apply(self, linear: str, weight: torch.Tensor) -> torch.Tensor:
        """The rescaled weight in float32; as it is where nothing changes."""
        if linear not in self:
            return weight
        weight = weight.float()
        if linear in self.columns:
            weight = weight * self.columns[linear]
        if linear in self.rows:
            weight = weight * self.rows[linear].unsqueeze(1)
        return weight


def describe_edges(edges: Sequence[Sequence[Edge]], plans: Sequence[BlockPlan], architecture: str, prefix: str) -> str:
    """Where the first block's scales can be moved, in words.

    Args:
        edges: of every block.
        plans: of every block.
        architecture: its name, for errors.
        prefix: what the names of the first block's linears begin with.

    Raises:
        UnsupportedError: no scale can be moved anywhere.
    """
    if not any(edges):
        raise UnsupportedError(
            f"architecture {architecture!r}: no norm and no linear feeds linears of a block channel by channel and "
            "nothing else, so there is nowhere to move scales to; quantize this model with gptq or rtn"
        )
    moved = {prefix + name for edge in edges[0] for name in edge.linears}
    left = [name.removeprefix(prefix) for stop in plans[0].stops for name in stop.linears if name not in moved]
    words = [f"{', '.join(edge.linears)} to {edge.producer}" for edge in edges[0]]
    return f"scales move from {'; '.join(words)}" + (f"; none from {', '.join(left)}" if left else "")


def rescale_block(
    run: BlockRun,
    block: nn.Module,
    batches: int,
    edges: Sequence[Edge],
    prefix: str,
    schemes: Mapping[str, Scheme],
    method: ScalingQuantizer,
    scale_dtype: torch.dtype,
) -> Rescaling:
    """Choose the scales of a block's edges and fold them into its norms and biases.

    The weights of linears are left as they are: :meth:`Rescaling.apply` is for when they are quantized.

    Args:
        run: of the block, with all batches at its entry.
        block: with its weights.
        batches: how many.
        edges: of this block; those before linears that stay dense are passed over.
        prefix: what the names of its linears begin with.
        schemes: of the linears to quantize.
        method: chooses.
        scale_dtype: of the quantized weights.

    Raises:
        UnsupportedError: an edge does not hold in this block.
        CheckpointError: a weight is not finite.
        CalibrationError: activations are unusable.
    """
    for name in (name for stop in run.plan.stops for name in stop.linears):
        # Named here, before what they give comes to the linears behind them.
        if not all_finite(run.weight(name)):
            raise CheckpointError(f"tensor {name!r} has values that are not finite; the checkpoint is damaged")
    edges = [edge for edge in edges if all(prefix + name in schemes for name in edge.linears)]
    statistics = _gather(run, block, batches, edges, prefix, method)
    columns: dict[str, torch.Tensor] = {}
    rows: dict[str, torch.Tensor] = {}
    changed: dict[str, torch.Tensor] = {}
    for edge, (hessian, mean, largest, sample) in zip(edges, statistics, strict=True):
        names = [prefix + name for name in edge.linears]
        targets = [Target(name, run.weight(name), schemes[name]) for name in names]
        found = method.scales(ScaledEdge(targets, edge.channels, hessian, mean, largest, sample), scale_dtype)
        producer = block.get_submodule(edge.producer)
        assert isinstance(producer.weight, nn.Parameter)
        scale = torch.ones(len(producer.weight), dtype=torch.float32, device=found.device)
        scale[edge.channels.to(found.device)] = found.float()
        scale, parameters = _fold(producer, edge, scale)
        if edge.kind == "linear":
            rows[prefix + edge.producer] = 1 / scale
        changed |= {f"{prefix}{edge.producer}.{leaf}": value for leaf, value in parameters.items()}
        columns |= dict.fromkeys(names, scale[edge.channels.to(scale.device)])
    return Rescaling(columns, rows, changed)


def share_by_channel(values: torch.Tensor, channels: torch.Tensor, reduce: str) -> torch.Tensor:
    """Give columns that have one channel one value: their ``mean``, or the largest (``amax``).

    Args:
        values: ``[columns]``.
        channels: int64 ``[columns]``.
        reduce: as torch's ``scatter_reduce`` names it.
    """
    channels = channels.to(values.device)
    shared = values.new_zeros(int(channels.max()) + 1)
    return shared.scatter_reduce(0, channels, values, reduce, include_self=False)[channels]


def _fold(producer: nn.Module, edge: Edge, scale: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Divide a producer's channels in place, except a linear's weight; gives the scales it came to, and changes."""
    changed: dict[str, torch.Tensor] = {}
    weight, bias = producer.weight, getattr(producer, "bias", None)
    assert isinstance(weight, nn.Parameter)
    if edge.kind != "linear":
        offset = 1.0 if edge.kind == "offset norm" else 0.0
        before = weight.data.float() + offset
        folded = (before / scale - offset).to(weight.dtype)
        real = before / (folded.float() + offset)
        # A weight of zero stays zero under any scale; one that would become zero is left alone.
        usable = torch.isfinite(real) & (real > 0)
        folded = torch.where(usable, folded, weight.data)
        scale = torch.where(usable, real, torch.ones_like(real))
        weight.data.copy_(folded)
        changed["weight"] = weight.data
    if bias is not None:
        bias.data.copy_(bias.data.float() / scale)
        changed["bias"] = bias.data
    return scale, changed


class _Sum(greenlet):
    """A Hessian in the making, to which batches are handed one by one."""

    def __init__(self, name: str, columns: int, device: torch.device) -> None:
        super().__init__(lambda: accumulate_hessian(name, self._batches(), columns, device))
        self.switch()

    def add(self, batch: torch.Tensor) -> None:
        self.switch(batch)

    def result(self) -> Hessian:
        hessian: Hessian = self.switch(None)
        return hessian

    def _batches(self) -> Iterator[torch.Tensor]:
        while (batch := self.parent.switch()) is not None:
            yield batch


class _Inputs:
    """Mean and largest magnitude of each column of a linear's inputs, and a sample: a few tokens of every batch."""

    def __init__(self, columns: int, device: torch.device, per_batch: int) -> None:
        self.total = torch.zeros(columns, dtype=torch.float64, device=device)
        self.largest = torch.zeros(columns, dtype=torch.float32, device=device)
        self.tokens = 0
        self.sample: list[torch.Tensor] = []
        self._per_batch = per_batch
        self._generator = torch.Generator().manual_seed(0)

    def add(self, batch: torch.Tensor) -> None:
        sizes = batch.abs()
        self.total += sizes.sum(0, dtype=torch.float32)
        self.largest = torch.maximum(self.largest, sizes.amax(0).float())
        self.tokens += len(batch)
        if self._per_batch:
            # At random: the first tokens of a text are unlike all others, and come as seldom here as there.
            chosen = torch.randperm(len(batch), generator=self._generator)[: self._per_batch]
            self.sample.append(batch[chosen.to(batch.device)])


def _gather(
    run: BlockRun, block: nn.Module, batches: int, edges: Sequence[Edge], prefix: str, method: ScalingQuantizer
) -> list[tuple[Hessian | None, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Run all batches through the block as it is; for each edge what :class:`ScaledEdge` has of its inputs."""
    names = [edge.linears[0] for edge in edges]
    weights = [run.weight(prefix + name) for name in names]
    per_batch = math.ceil(method.sample_tokens / batches)
    inputs = {
        name: _Inputs(weight.shape[1], weight.device, per_batch) for name, weight in zip(names, weights, strict=True)
    }
    sums: dict[str, _Sum] = {}
    if method.moments:
        for name, weight in zip(names, weights, strict=True):
            sums[name] = _Sum(prefix + name, weight.shape[1], weight.device)

    def record(name: str, value: torch.Tensor) -> None:
        batch = value.reshape(-1, value.shape[-1])
        inputs[name].add(batch)
        if sums:
            sums[name].add(batch)

    for number, (hidden, call) in enumerate(run.entries(range(batches))):
        with record_inputs(block, names, record):
            output = call.output(hidden)
        if number == 0:
            for edge in edges:
                if not edge_holds(edge, call, hidden, output):
                    raise UnsupportedError(
                        f"{prefix}{edge.producer}: scaling its channels changes what this block computes, unlike the "
                        "first block of its kind; quantize this model with a method that moves no scales"
                    )
    gathered = []
    for name in names:
        found = inputs[name]
        if found.tokens == 0:
            raise CalibrationError(f"{prefix}{name}: no calibration token reached this linear; use more text")
        hessian = sums[name].result() if sums else None
        sample = torch.cat(found.sample) if found.sample else None
        gathered.append((hessian, (found.total / found.tokens).float(), found.largest, sample))
    return gathered
