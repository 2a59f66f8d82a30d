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
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from llmconvert.compute.precision import all_finite
from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.engine.coroutine import AnsweredCall, record_inputs
from llmconvert.engine.discovery import BlockPlan
from llmconvert.engine.edges import Edge, MixtureEdge, edge_holds, stand_in
from llmconvert.engine.experts import ExpertsRun, ExpertsSlot, Visit
from llmconvert.engine.skeleton import BlockCall, Skeleton
from llmconvert.engine.statistics import Arrival, Hessian, HessianSum
from llmconvert.engine.stream import BlockRun
from llmconvert.errors import CalibrationError, CheckpointError, UnsupportedError
from llmconvert.quantize.methods.base import ScaledEdge, ScalingQuantizer, Target
from llmconvert.quantize.methods.rescale_experts import ExpertTargets
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


def describe_edges(
    skeleton: Skeleton,
    plans: Sequence[BlockPlan],
    edges: Sequence[Sequence[Edge]],
    mixtures: Sequence[Sequence[MixtureEdge]] = (),
) -> str:
    """Where the first block's scales can be moved, in words; and those of the first experts.

    Args:
        skeleton: the model.
        plans: of every block.
        edges: of every block.
        mixtures: the norms before experts in every block, where a method moves scales of experts.

    Raises:
        UnsupportedError: no scale can be moved anywhere.
    """
    prefix = skeleton.prefix(0)
    if not any(edges):
        kind = skeleton.architecture.model_type
        raise UnsupportedError(
            f"architecture {kind!r}: no norm and no linear feeds linears of a block channel by channel and "
            "nothing else, so there is nowhere to move scales to; quantize this model with gptq or rtn"
        )
    moved = {prefix + name for edge in edges[0] for name in edge.linears}
    sites = [skeleton.sites[name] for stop in plans[0].stops for name in stop.linears if name not in moved]
    left = [site.name.removeprefix(prefix) for site in sites if site.kind == "linear"]
    words = [f"{', '.join(edge.linears)} to {edge.producer}" for edge in edges[0]]
    if mixtures:
        shared = next((edge for found in mixtures for edge in found), None)
        if all(slot.is_proportional for slots in skeleton.experts for slot in slots.values()):
            words.append("every expert's down_proj to its up_proj")
        if shared is not None:
            seeing = ", ".join((*shared.routers, *shared.linears))
            words.append(f"all experts' gate_proj and up_proj to {shared.producer}, in powers of two, with {seeing}")
            left = [name for name in left if name not in shared.linears]
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
    mixtures: Sequence[MixtureEdge] = (),
    ranks: Ranks = ALONE,
    *,
    before: Sequence[int] = (),
) -> Rescaling:
    """Choose the scales of a block's edges and fold them into its norms, biases and routers.

    The weights of linears are left as they are: :meth:`Rescaling.apply` is for when they are quantized. Experts have
    the scales of the norm before them when they are loaded.

    Args:
        run: of the block, with all batches at its entry.
        block: with its weights.
        batches: how many.
        edges: of this block; those before linears that stay dense are passed over.
        prefix: what the names of its linears begin with.
        schemes: of the linears to quantize.
        method: chooses.
        scale_dtype: of the quantized weights.
        mixtures: norms before experts in this block.
        ranks: the processes, each of which has a part of the batches, and chooses the scales of some edges.
        before: tokens of each batch that processes of lower rank have.

    Raises:
        UnsupportedError: an edge does not hold in this block.
        CheckpointError: a weight is not finite.
        CalibrationError: activations are unusable.
    """
    for name in (name for stop in run.plan.stops for name in stop.linears if run.site(name).kind == "linear"):
        # Named here, before what they give comes to the linears behind them.
        if not all_finite(run.weight(name)):
            raise CheckpointError(f"tensor {name!r} has values that are not finite; the checkpoint is damaged")
    edges = [edge for edge in edges if all(prefix + name in schemes for name in edge.linears)]
    statistics = _gather(run, block, batches, edges, mixtures, prefix, method, ranks, before)
    columns: dict[str, torch.Tensor] = {}
    rows: dict[str, torch.Tensor] = {}
    changed: dict[str, torch.Tensor] = {}
    chosen_here: dict[int, torch.Tensor] = {}
    for number, (edge, found) in enumerate(zip(edges, statistics, strict=False)):
        if number % ranks.count == ranks.rank:
            targets = [
                Target(prefix + name, run.weight(prefix + name), schemes[prefix + name]) for name in edge.linears
            ]
            chosen_here[number] = method.scales(ScaledEdge(targets, edge.channels, *found), scale_dtype)
    scales = _all_scales(chosen_here, len(edges), next(block.parameters()).device, ranks)
    for edge, chosen in zip(edges, scales, strict=True):
        names = [prefix + name for name in edge.linears]
        producer = block.get_submodule(edge.producer)
        assert isinstance(producer.weight, nn.Parameter)
        scale = torch.ones(len(producer.weight), dtype=torch.float32, device=chosen.device)
        scale[edge.channels.to(chosen.device)] = chosen.float()
        scale, parameters = _fold(producer, edge.kind, scale)
        if edge.kind == "linear":
            rows[prefix + edge.producer] = 1 / scale
        changed |= {f"{prefix}{edge.producer}.{leaf}": value for leaf, value in parameters.items()}
        columns |= dict.fromkeys(names, scale[edge.channels.to(scale.device)])
    for mixture, found in zip(mixtures, statistics[len(edges) :], strict=True):
        beside = [prefix + name for name in mixture.linears]
        seen = [Target(name, run.weight(name), schemes[name]) for name in beside if name in schemes]
        slot = run.slots[prefix + mixture.experts]
        channels = torch.arange(slot.layout.hidden_size)
        sites = (run.site(name) for stop in run.plan.stops for name in stop.linears)
        every = ExpertTargets(slot, sites, schemes, seen)
        chosen = method.scales(ScaledEdge(every, channels, *found, binary=True), scale_dtype)
        producer = block.get_submodule(mixture.producer)
        scale, parameters = _fold(producer, "norm", _exact(producer, chosen.float()))
        changed |= {f"{prefix}{mixture.producer}.{leaf}": value for leaf, value in parameters.items()}
        columns |= dict.fromkeys(beside, scale)
        for name in mixture.routers:
            weight = block.get_submodule(name).weight
            assert isinstance(weight, nn.Parameter)
            weight.data.mul_(scale)
            changed[f"{prefix}{name}.weight"] = weight.data
        slot.scale = scale
    return Rescaling(columns, rows, changed)


def _all_scales(here: Mapping[int, torch.Tensor], edges: int, device: torch.device, ranks: Ranks) -> list[torch.Tensor]:
    """The scales of all edges, of which every ``ranks.count``-th was chosen here."""
    came = [iter(tensors) for tensors in ranks.exchange(list(here.values()), device)]
    return [next(came[number % ranks.count]) for number in range(edges)]


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


def _exact(norm: nn.Module, scale: torch.Tensor) -> torch.Tensor:
    """The scales, powers of two, without those that a norm's weight or bias can't be divided by exactly."""
    exact = torch.ones_like(scale, dtype=torch.bool)
    for leaf in ("weight", "bias"):
        value = getattr(norm, leaf, None)
        if isinstance(value, nn.Parameter):
            exact &= (value.data.float() / scale).to(value.dtype).float() * scale == value.data.float()
    return torch.where(exact, scale, torch.ones_like(scale))


def _fold(producer: nn.Module, kind: str, scale: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Divide a producer's channels in place, except a linear's weight; gives the scales it came to, and changes."""
    changed: dict[str, torch.Tensor] = {}
    weight, bias = producer.weight, getattr(producer, "bias", None)
    assert isinstance(weight, nn.Parameter)
    if kind != "linear":
        offset = 1.0 if kind == "offset norm" else 0.0
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


class _Inputs:
    """Mean and largest magnitude of each column of a linear's inputs, and a sample: a few tokens of every batch."""

    def __init__(self, columns: int, device: torch.device, per_batch: int, before: Sequence[int]) -> None:
        self.total = torch.zeros(columns, dtype=torch.float64, device=device)
        self.largest = torch.zeros(columns, dtype=torch.float32, device=device)
        self.tokens = 0
        self.sample: list[torch.Tensor] = []
        self._per_batch = per_batch
        self._generator = torch.Generator().manual_seed(0)
        for tokens in before if per_batch else ():  # the same tokens whoever has the batches
            torch.randperm(tokens, generator=self._generator)

    def join(self, ranks: Ranks) -> None:
        """Take in what other processes have."""
        ranks.sum_(self.total)
        self.tokens = ranks.sum_number(self.tokens)
        theirs = ranks.exchange([self.largest, *self.sample], self.largest.device)
        self.largest = torch.stack([tensors[0] for tensors in theirs]).amax(0)
        self.sample = [sample for _, *samples in theirs for sample in samples]

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
    run: BlockRun,
    block: nn.Module,
    batches: int,
    edges: Sequence[Edge],
    mixtures: Sequence[MixtureEdge],
    prefix: str,
    method: ScalingQuantizer,
    ranks: Ranks,
    before: Sequence[int],
) -> list[tuple[Hessian | None, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Run all batches through the block as it is; for each edge what :class:`ScaledEdge` has of its inputs."""
    widths = {edge.linears[0]: len(edge.channels) for edge in edges}
    widths |= {mixture.experts: run.slots[prefix + mixture.experts].layout.hidden_size for mixture in mixtures}
    device = next(block.parameters()).device
    per_batch = math.ceil(method.sample_tokens / ranks.sum_number(batches))
    inputs = {name: _Inputs(width, device, per_batch, before) for name, width in widths.items()}
    moments = widths.items() if method.moments else ()
    sums = {name: HessianSum(prefix + name, width, device, ranks=ranks) for name, width in moments}

    def record(name: str, value: torch.Tensor) -> None:
        batch = value.reshape(-1, value.shape[-1])
        inputs[name].add(batch)
        if sums:
            sums[name].add(Arrival(batch))

    _check_edges(run, edges, prefix)
    for part, calls in _parts(run, batches, list(widths), prefix):
        for hidden, call in calls:
            with record_inputs(block, part, record), suppress(_ReachedError):
                call.output(hidden)
    gathered = []
    for name in widths:
        found = inputs[name]
        if not ranks.alone:
            found.join(ranks)
        if found.tokens == 0:
            raise CalibrationError(f"{prefix}{name}: no calibration token reached this linear; use more text")
        hessian = sums[name].hessian() if sums else None
        sample = torch.cat(found.sample) if found.sample else None
        gathered.append((hessian, (found.total / found.tokens).float(), found.largest, sample))
    return gathered


def _check_edges(run: BlockRun, edges: Sequence[Edge], prefix: str) -> None:
    """Refuse edges that don't hold on a batch; what experts give does not matter for that."""
    for hidden, entry in run.entries(range(1)):
        call = AnsweredCall.of(entry, stand_in)
        output = call.output(hidden)
        for edge in edges:
            if not edge_holds(edge, call, hidden, output):
                raise UnsupportedError(
                    f"{prefix}{edge.producer}: scaling its channels changes what this block computes, unlike the "
                    "first block of its kind; quantize this model with a method that moves no scales"
                )


class _ReachedError(Exception):
    """Ends a pass through a block at experts whose output is not known yet."""


def _parts(
    run: BlockRun, batches: int, names: Sequence[str], prefix: str
) -> Iterator[tuple[list[str], Iterator[tuple[torch.Tensor, BlockCall]]]]:
    """The named modules up to a layer's experts, and what all batches enter the block with; then those behind.

    What experts give for all batches is computed in between, one expert after the other.
    """
    sites = (run.site(name) for stop in run.plan.stops for name in stop.linears)
    order = dict.fromkeys(site.layer.removeprefix(prefix) for site in sites)
    left = [name for name in order if name in names or prefix + name in run.slots]
    answers: dict[ExpertsSlot, Mapping[int, torch.Tensor]] = {}
    while any(name in names for name in left):
        end = next((place for place, name in enumerate(left) if prefix + name in run.slots), len(left) - 1)
        slot = run.slots.get(prefix + left[end])
        visits: dict[int, Visit] = {}

        def calls(visits: dict[int, Visit] = visits) -> Iterator[tuple[torch.Tensor, BlockCall]]:
            for batch, (hidden, call) in enumerate(run.entries(range(batches))):

                def answer(experts: ExpertsSlot, visit: Visit, batch: int = batch) -> torch.Tensor:
                    if experts in answers:
                        return answers[experts][batch].clone()
                    visits[batch] = visit
                    raise _ReachedError

                yield hidden, AnsweredCall.of(call, answer)

        yield [name for name in left[: end + 1] if name in names], calls()
        left = left[end + 1 :]
        if slot is not None and any(name in names for name in left):
            answers[slot] = ExpertsRun(slot, visits).outputs()
