"""A checkpoint as the class of its model holds it: with tensors that transformers makes of those that are stored.

By the table of its class transformers cuts some tensors into several while it loads them (queries, keys and values in
one), turns some around, stacks some (the experts of a layer) or puts them one behind the other. What is made here is
made of rows of the stored tensors, read when they are asked for: of a stack only the experts that are wanted.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    Split,
    Transpose,
    WeightConverter,
)

from llmconvert.engine.architecture.expert_storage import Conversion, Conversions, is_joined
from llmconvert.storage.checkpoint import Checkpoint, CheckpointView, TensorInfo

__all__ = ["HeldTensors", "Made", "as_held", "made_tensors"]

_DIGITS = re.compile(r"(\d+)")
_FUSED = frozenset({MergeModulelist, Concatenate})


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor that is made of others: for each row of it the parts that are put one behind the other.

    Attributes:
        stacks: the stored tensors. Of one stack, they follow each other by dimension ``axis``; of several, each stack
            becomes one row, in which its tensors follow each other by their first dimension.
        shape: of the whole.
        start: of its rows, in what the tensors of the only stack give.
        axis: 0 or 1.
        turned: whether rows and columns are the other way round in the stored tensor, which is the only one.
        stacked: whether each stack is a row.
        turns: of two tensors that the only one has in turns by dimension ``axis``, which it is.
    """

    stacks: tuple[tuple[str, ...], ...]
    shape: tuple[int, ...]
    start: int = 0
    axis: int = 0
    turned: bool = False
    stacked: bool = False
    turns: int | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """The stored tensors that it takes."""
        return tuple(itertools.chain.from_iterable(self.stacks))

    def read_rows(self, base: Checkpoint, start: int, stop: int) -> torch.Tensor:
        """Rows of the whole, in memory of the caller's own."""
        if self.stacked:
            rows = [torch.cat([base[part] for part in parts])[None] for parts in self.stacks[start:stop]]
            return torch.cat(rows) if rows else torch.empty((0, *self.shape[1:]), dtype=self.dtype(base))
        (parts,) = self.stacks
        if self.turned:
            return base[parts[0]].T[start:stop].contiguous()
        if self.turns is not None and self.axis == 0:
            return base.read_rows(parts[0], 2 * start, 2 * stop)[self.turns :: 2].contiguous()
        if self.turns is not None:
            return base.read_rows(parts[0], start, stop)[:, self.turns :: 2].contiguous()
        if self.axis == 1:
            return torch.cat([base.read_rows(part, start, stop) for part in parts], dim=1)
        return _consecutive(base, parts, self.start + start, self.start + stop)

    def dtype(self, base: Checkpoint) -> torch.dtype:
        """Of all of its parts."""
        return base.infos[self.sources[0]].dtype


def _consecutive(base: Checkpoint, parts: Sequence[str], start: int, stop: int) -> torch.Tensor:
    """Rows of tensors one behind the other by their first dimension."""
    pieces: list[torch.Tensor] = []
    offset = 0
    for part in parts:
        rows = base.infos[part].shape[0]
        begin, end = max(start - offset, 0), min(stop - offset, rows)
        if begin < end:
            pieces.append(base.read_rows(part, begin, end))
        offset += rows
    return torch.cat(pieces) if pieces else base.read_rows(parts[0], 0, 0)


class HeldTensors(CheckpointView):
    """``base`` with tensors that are made of its own, in the place of these.

    Args:
        base: that has them as they are stored.
        made: by name.

    Attributes:
        made: the same, with those that ``base`` itself has made and that are still there.
    """

    def __init__(self, base: Checkpoint, made: Mapping[str, Made]) -> None:
        super().__init__(base)
        self._made = dict(made)
        by_source: dict[str, list[str]] = {}
        for name, one in made.items():
            for source in one.sources:
                by_source.setdefault(source, []).append(name)
        infos: dict[str, TensorInfo] = {}
        for name, info in base.infos.items():
            if name not in by_source:
                infos[name] = info
            for target in by_source.get(name, ()):
                one = self._made[target]
                infos.setdefault(target, TensorInfo(target, one.dtype(base), one.shape, info.shard))
        self.infos = infos
        before = base.made if isinstance(base, HeldTensors) else {}
        self.made: Mapping[str, Made] = {name: one for name, one in before.items() if name in infos} | self._made

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        made = self._made.get(name)
        return super().read_rows(name, start, stop) if made is None else made.read_rows(self.base, start, stop)

    def prefetch(self, names: Iterable[str]) -> None:
        of_made = (self._made[name].sources if name in self._made else (name,) for name in names)
        super().prefetch(itertools.chain.from_iterable(of_made))


@dataclass(slots=True)
class _Group:
    """Tensors that transformers makes one or several parameters of, by the pattern of the table that each has."""

    converter: WeightConverter
    parts: dict[str, list[str]] = field(default_factory=dict)

    def in_order(self) -> list[list[str]]:
        """Pattern after pattern, the tensors of each by their numbers; empty where some pattern has none."""
        found = [self.parts.get(pattern, []) for pattern in self.converter.source_patterns]
        return [sorted(names, key=_natural) for names in found] if all(found) else []


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in _DIGITS.split(name)]


def made_tensors(
    conversions: Conversions, checkpoint: Checkpoint, wanted: Callable[[str, Conversion], bool]
) -> dict[str, Made]:
    """What transformers makes of tensors of a checkpoint, by the names of the model's parameters.

    Args:
        conversions: of the model.
        checkpoint: whose headers are looked at.
        wanted: whether to make a parameter, given its name and how transformers makes it. Of several that are made
            together it is the first one's.

    Returns:
        What is made in a way that is known here, and has the shape that the class wants. All else is left out.
    """
    groups: dict[str, _Group] = {}
    for name in checkpoint:
        target, conversion = conversions.target(name)
        if conversion is not None and wanted(target, conversion):
            groups.setdefault(target, _Group(conversion.converter)).parts.setdefault(conversion.pattern, []).append(
                name
            )
    shapes = conversions.shapes
    made: dict[str, Made] = {}
    for target, group in groups.items():
        found = _made_of(checkpoint, group, _targets(group.converter, target), shapes)
        if found and all(shapes.get(name) == one.shape for name, one in found.items()):
            made |= found
    return made


def _targets(converter: WeightConverter, first: str) -> list[str]:
    """All parameters that a converter makes, given the first of them."""
    before, pattern, behind = first.partition(converter.target_patterns[0])
    return [before + target + behind for target in converter.target_patterns] if pattern else [first]


def _made_of(
    checkpoint: Checkpoint, group: _Group, targets: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Made]:
    parts, operations = group.in_order(), group.converter.operations
    kinds = {type(operation) for operation in operations}
    if not parts or not all(target in shapes for target in targets):
        return {}
    first = checkpoint.infos[parts[0][0]].shape
    flat = tuple(itertools.chain.from_iterable(parts))
    if kinds == {ErnieFuseAndSplitTextVisionExperts}:
        size = math.ceil(len(parts[0]) / len(targets))
        shares = [[names[place * size : (place + 1) * size] for names in parts] for place in range(len(targets))]
        return {target: _stacked(checkpoint, share) for target, share in zip(targets, shares, strict=True)}
    if MergeModulelist in kinds and kinds <= _FUSED and len(targets) == 1:
        return {targets[0]: _stacked(checkpoint, parts)}
    operation = operations[0]
    if isinstance(operation, Interleave) and len(operations) == 2 and isinstance(operations[1], Chunk):
        axis = operation.dim
        both = not operation.inverse and axis == operations[1].dim and axis in (0, 1) and len(targets) == 2
        half = (*first[:axis], first[axis] // 2, *first[axis + 1 :])
        alone = len(flat) == 1 and first[axis] % 2 == 0
        return {
            target: Made((flat,), half, axis=axis, turns=turn) for turn, target in enumerate(targets) if both and alone
        }
    if len(operations) > 1:
        return {}
    if isinstance(operation, Chunk | Split) and operation.dim == 0 and len(flat) == 1:
        starts = itertools.accumulate((shapes[target][0] for target in targets), initial=0)
        cut = zip(targets, starts, strict=False)
        whole = sum(shapes[target][0] for target in targets) == first[0]
        return {target: Made((flat,), (shapes[target][0], *first[1:]), start) for target, start in cut if whole}
    if isinstance(operation, Transpose) and {operation.dim0, operation.dim1} == {0, 1} and len(first) == 2:
        return {targets[0]: Made((flat,), first[::-1], turned=True)} if len(flat) == 1 else {}
    if isinstance(operation, Concatenate) and operation.dim in (0, 1) and len(targets) == 1:
        sizes = [checkpoint.infos[part].shape for part in flat]
        if len({size[: operation.dim] + size[operation.dim + 1 :] for size in sizes}) > 1:
            return {}
        total = sum(size[operation.dim] for size in sizes)
        shape = (*first[: operation.dim], total, *first[operation.dim + 1 :])
        return {targets[0]: Made((flat,), shape, axis=operation.dim)}
    return {}


def _stacked(checkpoint: Checkpoint, parts: Sequence[Sequence[str]]) -> Made:
    """Of each number one tensor of each kind, one behind the other; of all numbers these, one on top of the other."""
    rows = tuple(zip(*parts, strict=False))
    shapes = [checkpoint.infos[part].shape for part in rows[0]] if rows else []
    height = sum(shape[0] for shape in shapes)
    return Made(rows, (len(rows), height, *(shapes[0][1:] if shapes else ())), stacked=True)


def as_held(conversions: Conversions, checkpoint: Checkpoint, needed: Callable[[str], bool]) -> Checkpoint:
    """A checkpoint with what text needs as the class has it, where it is neither stored so nor read part by part.

    Experts with a tensor for each matrix, and parameters of several tensors one behind the other, are read as they are
    stored.

    Args:
        conversions: of the model.
        checkpoint: any of the model.
        needed: whether a state, by its name in the model, is going to be loaded.
    """

    def wanted(target: str, conversion: Conversion) -> bool:
        by_parts = MergeModulelist in conversion.kinds or is_joined(conversions.model, target, conversion)
        return needed(target) and not by_parts

    made = made_tensors(conversions, checkpoint, wanted)
    return HeldTensors(checkpoint, made) if made else checkpoint
