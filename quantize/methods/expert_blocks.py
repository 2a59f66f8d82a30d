"""Methods that learn over whole blocks (SignRound) on blocks with experts: piece by piece, each of which fits.

What is no expert learns to give the block's output while its experts give what the original's do. Then every expert is
a block of its own: its matrices learn to give the output of the original expert, on the original's inputs, for the
tokens that the router sends it; where these are fewer than the inputs have columns, for all tokens of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch

from llmconvert.engine.coroutine import AnsweredCall
from llmconvert.engine.discovery import Stop
from llmconvert.engine.experts import ExpertsSlot, Visit
from llmconvert.engine.skeleton import BlockCall
from llmconvert.engine.stream import BlockRun
from llmconvert.quantize.methods.base import BlockData, BlockQuantizer, Solution, Target
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve.expert_moments import ExpertMoments

__all__ = ["OriginalAnswers", "learn_experts"]

Entries = Callable[[Iterable[int]], Iterator[tuple[torch.Tensor, BlockCall]]]


class OriginalAnswers:
    """What a block's experts give in the original model, for all batches; computed at once, one expert after the other.

    Args:
        original: the block in the original model.
    """

    def __init__(self, original: BlockRun) -> None:
        self._slots = original.slots
        layers = {original.site(name).layer: name for stop in original.plan.stops for name in stop.linears}
        for layer in original.slots:
            original.experts(layers[layer]).finish()

    def entries(self, run: BlockRun) -> Entries:
        """What batches enter a block with, in either model, and calls of it that these experts answer in."""
        return partial(self._answered, run)

    def _answered(self, run: BlockRun, batches: Iterable[int]) -> Iterator[tuple[torch.Tensor, BlockCall]]:
        for batch in batches:
            for hidden, call in run.entries((batch,)):
                yield hidden, AnsweredCall.of(call, partial(self._answer, batch))

    def _answer(self, batch: int, slot: ExpertsSlot, visit: Visit) -> torch.Tensor:
        # Each time another tensor: what goes on may be added to it in place.
        return self._slots[slot.name].answers[batch].clone()


def learn_experts(
    run: BlockRun,
    original: BlockRun,
    moments: ExpertMoments,
    method: BlockQuantizer,
    schemes: Mapping[str, Scheme],
    scale_dtype: torch.dtype,
) -> Iterator[tuple[str, Solution]]:
    """Quantize the experts of a block, one after the other, and put each into the running model.

    Args:
        run: of the block, whose other linears are quantized.
        original: the block in the original model.
        moments: of both.
        method: learns.
        schemes: by site.
        scale_dtype: of the quantized weights.

    Raises:
        CheckpointError, CalibrationError: see :class:`~llmconvert.quantize.methods.base.BlockQuantizer`.
    """
    for stops in _by_expert(run, schemes):
        targets: list[Target] = []
        started: dict[str, Solution] = {}
        for stop in stops:
            hessian = moments.hessian(stop)
            group = [Target(name, run.weight(name).clone(), schemes[name]) for name in stop.linears]
            started |= method.quantize(group, hessian, scale_dtype)
            del hessian
            for target in group:
                run.install(target.name, started[target.name].tensor.dequantize(target.weight.dtype))
            targets += group
        data = _data(run, original, moments, stops)
        solutions = method.refine(targets, started, data) if data.tokens else started
        for target in targets:
            solution = solutions[target.name]
            yield target.name, replace(solution, tokens=moments.tokens(target.name))
            run.install(target.name, solution.tensor.dequantize(target.weight.dtype))


def _by_expert(run: BlockRun, schemes: Mapping[str, Scheme]) -> Iterator[tuple[Stop, ...]]:
    """The stops of each expert of a block that has a scheme."""
    found: dict[tuple[str, int], list[Stop]] = {}
    for stop in run.plan.stops:
        site = run.site(stop.linears[0])
        if site.kind == "expert" and site.name in schemes:
            found.setdefault((site.layer, site.expert), []).append(stop)
    yield from map(tuple, found.values())


@dataclass(frozen=True, slots=True)
class _ExpertCall(BlockCall):
    """The expert that is loaded, as if it were a block; its matrices are named by projection."""

    slot: ExpertsSlot

    def output(self, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor] = MappingProxyType({})) -> torch.Tensor:
        return self.slot.output(hidden, weights)


def _data(run: BlockRun, original: BlockRun, moments: ExpertMoments, stops: Sequence[Stop]) -> BlockData:
    """An expert with what comes to it in both models; batches without a token for it are left out."""
    names = [name for stop in stops for name in stop.linears]
    first = run.site(names[0])
    here, there = run.experts(first.name), original.experts(first.name)
    chosen: list[tuple[int, torch.Tensor]] = []
    for batch, visit in here.visits.items():
        if moments.every or moments.tokens(first.name) < stops[0].columns:
            tokens = torch.arange(len(visit.hidden), device=visit.hidden.device)
        else:
            tokens, _ = visit.routed(first.expert)
        if len(tokens):
            chosen.append((batch, tokens))
    there.slot.load(first.expert)
    wanted = [there.slot.output(there.visits[batch].hidden[tokens]) for batch, tokens in chosen]
    there.slot.clear()
    call = _ExpertCall(here.slot, (), {}, here.slot)

    def entries(places: Iterable[int]) -> Iterator[tuple[torch.Tensor, BlockCall]]:
        for batch, tokens in (chosen[place] for place in places):
            yield here.visits[batch].hidden[tokens], call

    return BlockData(
        prefix=f"{first.layer}.",
        parameters={name: run.site(name).projection for name in names},
        stops=(),
        tokens=tuple(len(tokens) for _, tokens in chosen),
        entries=entries,
        originals=entries,
        outputs=lambda places: (wanted[place] for place in places),
    )
