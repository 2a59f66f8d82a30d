"""Rotations folded into the weights (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456): outliers are spread out.

The hidden state is multiplied by an orthogonal matrix ``Q`` for good: embeddings and everything that writes to the
residual stream are rotated by it, everything that reads from it by its inverse. RMS norms don't notice, once their
weights have gone to the linears behind them. The same is done to each head's values and the output projection. The
model computes what it computed; no channel is large any more, in weights or in activations.

``Q`` is a randomized Hadamard matrix: random signs, then the Kronecker product of Hadamard matrices for the power of
two in its size and of a discrete Hartley matrix, which exists for every size, for the rest.

What reads and what writes is discovered (:mod:`llmconvert.engine.edges`), and tried before the work on two blocks of
random weights. Architectures for which it is not so are refused: LayerNorm, which subtracts a mean, and norms with
weights behind attention or MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import nn

from llmconvert.engine.architecture.config import with_split_embeddings
from llmconvert.engine.discovery import PROBE_LENGTH, discover
from llmconvert.engine.edges import Edge, find_edges
from llmconvert.engine.evaluation import stream_logits
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.synthetic import SyntheticCheckpoint, shallow
from llmconvert.errors import UnsupportedError
from llmconvert.storage.checkpoint import Checkpoint, CheckpointView
from llmconvert.storage.dense import require_dense

__all__ = ["RotatedCheckpoint", "Rotation", "rotate_checkpoint"]

_PROBE_BLOCKS = 2
_LARGEST_FACTOR = 64
#: How far logits may differ after rounding to a dtype; a wrong rotation changes them altogether.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}


class Rotation:
    """An orthogonal matrix of any size that is cheap to multiply by.

    Args:
        size: of the matrix.
        seed: of its signs.
    """

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.signs = (2 * torch.randint(2, (size,), generator=generator) - 1).float()
        power = size & -size
        self._factors: list[torch.Tensor] = []
        while power > 1:
            step = min(power, _LARGEST_FACTOR)
            self._factors.append(_hadamard(step))
            power //= step
        odd = size // (size & -size)
        if odd > 1:
            self._factors.append(_hartley(odd))

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """``values @ Q`` for float32 ``[…, size]``."""
        rotated = values * self.signs.to(values)
        for factor in self._factors:
            # The first of the remaining axes is contracted, and becomes the last: after all factors they are in order.
            split = rotated.reshape(-1, len(factor), values.shape[-1] // len(factor))
            rotated = torch.matmul(split.transpose(1, 2), factor.to(values))
        return rotated.reshape(values.shape)


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a tensor is made.

    Attributes:
        source: the tensor it is made from.
        norm: a norm whose weight multiplies its columns first, and what is added to that.
        steps: what is done to it in float32, one after the other.
        by_rows: whether every row is made from the same row of the source.
    """

    source: str
    norm: tuple[str, float] | None = None
    steps: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = ()
    by_rows: bool = True


class RotatedCheckpoint(CheckpointView):
    """``base`` with rotations folded into its tensors as they are read; see :func:`rotate_checkpoint`."""

    def __init__(self, base: Checkpoint, recipes: Mapping[str, _Recipe], *, untie: bool) -> None:
        super().__init__(base)
        self._recipes = recipes
        if untie:
            self.config = with_split_embeddings(base.config)
            made = {name: recipe for name, recipe in recipes.items() if name not in base.infos}
            added = {name: replace(base.infos[recipe.source], name=name) for name, recipe in made.items()}
            self.infos = {**base.infos, **added}

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        recipe = self._recipes.get(name)
        if recipe is None:
            return self.base.read_rows(name, start, stop)
        if recipe.by_rows:
            value = self.base.read_rows(recipe.source, start, stop).float()
        else:
            value = self.base[recipe.source].float()
        if recipe.norm is not None:
            norm, offset = recipe.norm
            value = value * (self.base[norm].float() + offset)
        for step in recipe.steps:
            value = step(value)
        value = value.to(self.infos[name].dtype)
        return value if recipe.by_rows else value[start:stop].clone()


def rotate_checkpoint(
    source: Checkpoint, *, residual: bool = True, values: bool = True, seed: int = 0
) -> RotatedCheckpoint:
    """A dense checkpoint with its residual stream, and the values of each head, rotated; nothing is read yet.

    Embeddings that the output head shares are split: the norm before the head goes into one of them.

    Raises:
        UnsupportedError: the architecture does not compute the same when rotated so; says why.
    """
    require_dense(source, "a source to rotate")
    skeleton = Skeleton(source, torch.device("cpu"))
    kind = skeleton.architecture.model_type
    if any(skeleton.experts):
        raise UnsupportedError(
            f"architecture {kind!r}: rotations are not folded into mixtures of experts here; leave rotate out"
        )
    folding = _Folding(skeleton, kind, seed)
    if residual:
        folding.rotate_residual()
    if values:
        folding.rotate_values()
    _try_out(skeleton, folding, kind)
    return folding.view(source)


class _Folding:
    """The recipes of all tensors of a model, found from its structure."""

    def __init__(self, skeleton: Skeleton, kind: str, seed: int) -> None:
        self._skeleton, self._kind, self._seed = skeleton, kind, seed
        self._edges = find_edges(skeleton, discover(skeleton))
        self._recipes: dict[str, _Recipe] = {}
        self._untie = False

    def view(self, source: Checkpoint) -> RotatedCheckpoint:
        """``source`` rotated; it may be another checkpoint of the same names, with fewer blocks."""
        known = {name: recipe for name, recipe in self._recipes.items() if recipe.source in source}
        return RotatedCheckpoint(source, known, untie=self._untie)

    def rotate_residual(self) -> None:
        width = self._skeleton.architecture.hidden_size
        rotation = Rotation(width, self._seed)
        for index in range(self._skeleton.block_count):
            self._rotate_block(index, width, rotation)
        self._rotate_outside(width, rotation)

    def rotate_values(self) -> None:
        found = 0
        for index, edges in enumerate(self._edges):
            for edge in edges:
                if edge.kind == "linear" and edge.across:
                    self._rotate_heads(self._skeleton.prefix(index), edge)
                    found += 1
        if not found:
            raise UnsupportedError(
                f"architecture {self._kind!r}: no linear gives the values that attention passes on, so they can't be "
                "rotated; leave it out (values: false)"
            )

    def _rotate_block(self, index: int, width: int, rotation: Rotation) -> None:
        prefix, sites = self._skeleton.prefix(index), self._skeleton.sites
        readers: set[str] = set()
        for edge in self._edges[index]:
            if edge.kind == "linear":
                continue
            behind = [sites[prefix + name] for name in edge.linears]
            self._move_norm(prefix + edge.producer, edge.kind, [site.tensor for site in behind])
            for site in behind:
                self._add(site.parameter, rotation.apply)
                readers.add(site.name)
        for site in self._skeleton.sites_of(index):
            if site.name in readers:
                continue
            if site.rows != width:
                self._refuse(f"{site.name} neither takes what a norm gives, and nobody else, nor writes hidden states")
            self._add(site.parameter, lambda value: rotation.apply(value.T).T, by_rows=False)
            if f"{site.name}.bias" in self._skeleton.names:
                self._add(f"{site.name}.bias", rotation.apply, by_rows=False)
        if not readers:
            self._refuse("no norm before a linear could give its weights to it")

    def _rotate_outside(self, width: int, rotation: Rotation) -> None:
        model, names = self._skeleton.model, self._skeleton.names
        modules = {name: part for name, part in model.named_modules() if not self._skeleton.holds(name)}
        embedding = next(name for name, part in modules.items() if part is model.get_input_embeddings())
        head = next(name for name, part in modules.items() if part is model.get_output_embeddings())
        norms = [name for name, part in modules.items() if _is_norm(part, width)]
        if len(norms) != 1:
            self._refuse(f"expected one norm of {width} channels behind the blocks, found {norms or 'none'}")
        others = set(names) - {f"{embedding}.weight", f"{head}.weight", f"{head}.bias", f"{norms[0]}.weight"}
        stray = sorted(name for name in others if not self._skeleton.holds(name))
        if stray:
            self._refuse(f"{stray[0]} lies outside the blocks, and what it does to hidden states is not known")
        norm_type = type(modules[norms[0]])
        kinds = {
            edge.kind
            for edges, block in zip(self._edges, self._skeleton.blocks, strict=True)
            for edge in edges
            if isinstance(block.get_submodule(edge.producer), norm_type)
        }
        if len(kinds) != 1:
            self._refuse(f"{norms[0]} is unlike the norms in the blocks")
        source = names[f"{embedding}.weight"]
        stored = names.get(f"{head}.weight", f"{head}.weight")
        self._untie = self._skeleton.architecture.tied
        self._recipes[stored] = _Recipe(source if self._untie else stored)
        self._move_norm(norms[0], next(iter(kinds)), [stored])
        self._recipes[stored] = replace(self._recipes[stored], steps=(rotation.apply,))
        self._recipes[source] = _Recipe(source, steps=(rotation.apply,))

    def _move_norm(self, norm: str, kind: str, linears: Sequence[str]) -> None:
        """Give a norm's weight to the linears behind it (names in the checkpoint), and leave it as if it had none."""
        names = self._skeleton.names
        if f"{norm}.bias" in names:
            self._refuse(f"{norm} adds a bias")
        weight, offset = names[f"{norm}.weight"], 1.0 if kind == "offset norm" else 0.0
        for linear in linears:
            recipe = self._recipes.get(linear, _Recipe(linear))
            self._recipes[linear] = replace(recipe, norm=(weight, offset))
        self._recipes[weight] = _Recipe(weight, steps=(lambda value: torch.full_like(value, 1 - offset),))

    def _rotate_heads(self, prefix: str, edge: Edge) -> None:
        size = self._skeleton.architecture.head_dim
        starts = sorted(set(edge.channels[::size].tolist()))
        heads = edge.channels.view(-1, size)
        if not torch.equal(heads, heads[:, :1] + torch.arange(size)):
            self._refuse(f"{prefix}{edge.producer} does not keep the {size} values of a head together")
        rotation = Rotation(size, self._seed + 1)

        def rows(value: torch.Tensor) -> torch.Tensor:
            for start in starts:
                part = value[start : start + size]
                value[start : start + size] = rotation.apply(part.T).T if part.dim() > 1 else rotation.apply(part)
            return value

        def columns(value: torch.Tensor) -> torch.Tensor:
            return rotation.apply(value.reshape(len(value), -1, size)).reshape(value.shape)

        self._add(f"{prefix}{edge.producer}.weight", rows, by_rows=False)
        if f"{prefix}{edge.producer}.bias" in self._skeleton.names:
            self._add(f"{prefix}{edge.producer}.bias", rows, by_rows=False)
        for name in edge.linears:
            self._add(self._skeleton.sites[prefix + name].parameter, columns)

    def _add(self, name: str, step: Callable[[torch.Tensor], torch.Tensor], *, by_rows: bool = True) -> None:
        stored = self._skeleton.names[name]
        recipe = self._recipes.get(stored, _Recipe(stored))
        self._recipes[stored] = replace(recipe, steps=(*recipe.steps, step), by_rows=recipe.by_rows and by_rows)

    def _refuse(self, reason: str) -> NoReturn:
        raise UnsupportedError(
            f"architecture {self._kind!r}: its residual stream can't be rotated, because {reason}; leave it out "
            "(residual: false)"
        )


def _try_out(skeleton: Skeleton, folding: _Folding, kind: str) -> None:
    """Compare logits on random weights, two blocks deep.

    Raises:
        UnsupportedError: they differ by more than rounding.
    """
    plain = SyntheticCheckpoint(skeleton, shallow(skeleton, _PROBE_BLOCKS))
    ids = torch.arange(PROBE_LENGTH).unsqueeze(0)
    cpu = torch.device("cpu")
    (before,), (after,) = (
        list(stream_logits(checkpoint, [ids], device=cpu)) for checkpoint in (plain, folding.view(plain))
    )
    error = float((after.float() - before.float()).norm() / before.float().norm())
    if not error < _TOLERANCE[skeleton.dtype]:
        raise UnsupportedError(
            f"architecture {kind!r}: rotated, it computes something else (tried on random weights); it may subtract "
            "means, or have norms with weights behind attention or MLP; quantize it without rotations"
        )


def _is_norm(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and tuple(weight.shape) == (width,) and not any(module.children())


def _hadamard(size: int) -> torch.Tensor:
    """The orthogonal Hadamard matrix of a power of two (Sylvester's)."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def _hartley(size: int) -> torch.Tensor:
    """The orthogonal matrix of the discrete Hartley transform, ``cos + sin`` of ``2π i j / size``."""
    places = torch.arange(size, dtype=torch.float64)
    angles = 2 * math.pi * (torch.outer(places, places) % size) / size
    return ((torch.cos(angles) + torch.sin(angles)) / math.sqrt(size)).float()
