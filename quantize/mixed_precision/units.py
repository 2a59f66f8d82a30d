"""Units of mixed precision: linears that runtimes fuse (q/k/v, gate/up) always have one scheme."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from llmconvert.engine.discovery import BlockPlan
from llmconvert.engine.sites import head_tensor
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import UsageError
from llmconvert.quantize.formats.base import FileFormat, Format
from llmconvert.quantize.formats.experts import gates_of
from llmconvert.quantize.matrix import check_combination
from llmconvert.quantize.methods.base import Method
from llmconvert.quantize.scheme import Scheme

__all__ = ["FusedUnit", "Storage", "embedding_tensor", "fused_units", "outer_tensors", "outer_units", "units_of"]


@dataclass(frozen=True, slots=True)
class FusedUnit:
    """Linears that must have the same scheme.

    Attributes:
        linears: module names, in calling order.
        shapes: ``(rows, columns)`` of each.
        block: index of theirs; of what comes before or behind all blocks -1, or their number.
        experts: whether they are the experts of all layers.
        outer: ``head`` or ``embedding``, which are outside the blocks.
    """

    linears: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    block: int
    experts: bool = False
    outer: Literal["head", "embedding"] | None = None

    @property
    def weights(self) -> int:
        """How many numbers they have in all."""
        return sum(rows * columns for rows, columns in self.shapes)

    @property
    def columns(self) -> int:
        """Width of the input that they share."""
        return self.shapes[0][1]


def fused_units(skeleton: Skeleton, blocks: Sequence[BlockPlan]) -> tuple[FusedUnit, ...]:
    """The units of a model, in the order in which it calls them; linears it never calls are in none.

    All experts of a mixture are one, since runtimes read one scheme for all of them; it is that of the first block that
    has some. Routers and gates are in none.
    """
    gates, sites = gates_of(skeleton), skeleton.sites
    found: list[FusedUnit] = []
    experts: list[str] = []
    first = 0
    for block in blocks:
        for stop in block.stops:
            names = tuple(name for name in stop.linears if name not in gates)
            if names and sites[names[0]].kind == "expert":
                first = first if experts else block.index
                experts += names
            elif names:
                found.append(FusedUnit(names, tuple(sites[name].shape for name in names), block.index))
    if experts:
        whole = FusedUnit(tuple(experts), tuple(sites[name].shape for name in experts), first, experts=True)
        place = next((place for place, unit in enumerate(found) if unit.block > first), len(found))
        found.insert(place, whole)
    return tuple(found)


def units_of(skeleton: Skeleton, blocks: Sequence[BlockPlan], layout: Format) -> tuple[FusedUnit, ...]:
    """What can have a scheme of its own in a format: fused linears as one, or in files that say the type of every
    tensor each linear by itself, and embedding and head."""
    units = fused_units(skeleton, blocks)
    if not isinstance(layout, FileFormat):
        return units
    single = (
        replace(unit, linears=(name,), shapes=(shape,))
        for unit in units
        for name, shape in zip(unit.linears, unit.shapes, strict=True)
    )
    return (*single, *outer_units(skeleton))


def embedding_tensor(skeleton: Skeleton) -> str | None:
    """The checkpoint's tensor of the embedding."""
    return next((site.tensor for site in skeleton.outer.values() if site.kind in ("embedding", "tied")), None)


def outer_tensors(skeleton: Skeleton) -> dict[Literal["embedding", "head"], str]:
    """Embedding and head by these words → the checkpoint's tensors; one that is both is an embedding."""
    embedding, head = embedding_tensor(skeleton), head_tensor(skeleton.outer)
    found: dict[Literal["embedding", "head"], str] = {} if embedding is None else {"embedding": embedding}
    return found if head in (None, embedding) else {**found, "head": head or ""}


def outer_units(skeleton: Skeleton) -> tuple[FusedUnit, ...]:
    """Embedding and head, those of them that there are."""
    blocks = {"embedding": -1, "head": skeleton.block_count}
    found: list[FusedUnit] = []
    for word, name in outer_tensors(skeleton).items():
        rows, columns = skeleton.checkpoint.infos[name].shape
        found.append(FusedUnit((word,), ((rows, columns),), blocks[word], outer=word))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Storage:
    """What a method can choose and a format can hold, for a model in ``dtype``."""

    method: Method
    format: Format
    dtype: torch.dtype

    def nbytes(self, shape: tuple[int, int], scheme: Scheme | None) -> int:
        """Bytes of a linear of that shape; ``None`` is for one that stays as it is."""
        rows, columns = shape
        if scheme is None:
            return rows * columns * self.dtype.itemsize
        scales = self.format.scale_dtype(scheme, self.dtype)
        return sum(spec.nbytes for spec in self.format.specs("linear", shape, scheme, scales))

    def accepts(self, scheme: Scheme, shape: tuple[int, int], beside: Sequence[Scheme] = ()) -> bool:
        """Whether a linear of that shape can have the scheme, in one model with those ``beside`` it."""
        try:
            check_combination(self.method, scheme, self.format)
            scheme.check_fits("linear", shape[1])
            self.nbytes(shape, scheme)
            # Some formats hold one scheme per model.
            self.format.quantization_config({**{str(other): other for other in beside}, "linear": scheme}, ())
        except UsageError:
            return False
        return True
