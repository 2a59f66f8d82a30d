"""Second moments of a linear's inputs (GPTQ's Hessian, ``XᵀX``), accumulated batch by batch.

The Hessian of a linear's squared output error with respect to one row of its weight is ``2 XᵀX``, the same for every
row; dividing by the number of tokens instead changes neither codes nor relative damping.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from llmconvert.compute.dot_products import LANES, add_products, pack_pairs, use_dot_products
from llmconvert.compute.precision import all_finite, bfloat16_products
from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.errors import CalibrationError

__all__ = ["Aim", "Arrival", "Departure", "Hessian", "HessianSum", "accumulate_hessian", "hessian_nbytes"]

# Enough rows per product to amortize reading and writing the accumulator; few enough to stay in cache. Even.
_CHUNK_TOKENS = 2048
# Only tiles on and above the diagonal are multiplied; smaller tiles save more work but multiply more slowly.
_TILE = 256


class Arrival(NamedTuple):
    """What a batch brings to a linear.

    Attributes:
        inputs: of the linear, ``[tokens, columns]`` of any floating dtype.
        residual: what its output is added to, ``[tokens, width]``, if that is known and asked for.
    """

    inputs: torch.Tensor
    residual: torch.Tensor | None = None


class Departure(NamedTuple):
    """What a batch leaves a linear with.

    Attributes:
        outputs: of the linear without its bias, ``[tokens, rows]`` of any floating dtype.
        residual: what they are added to, as large.
    """

    outputs: torch.Tensor
    residual: torch.Tensor


@dataclass(frozen=True, slots=True)
class Aim:
    """What a linear that adds to the residual stream is to give.

    Attributes:
        rows: of its weight.
        residual: how much of what the residual stream has lost before it is to be made up for.
    """

    rows: int
    residual: float


@dataclass(frozen=True, slots=True)
class Hessian:
    """``matrix`` is ``XᵀX / tokens``, float32 ``[columns, columns]``, symmetric; ``tokens`` went into it.

    Of what the original model has at the same tokens, one of two more: ``cross`` is ``OᵀX / tokens`` with its inputs
    ``O``. ``aim`` is ``YᵀX / tokens``, ``[rows, columns]``, with what the linear is to give: ``Y = O Wᵀ + λ D``, the
    original's outputs and a part of what these are added to there, less what they are added to here.
    """

    matrix: torch.Tensor
    tokens: int
    cross: torch.Tensor | None = None
    aim: torch.Tensor | None = None


class HessianSum:
    """A Hessian in the making, batch after batch; several can be filled in one pass.

    Batches are joined to chunks of about ``_CHUNK_TOKENS`` rows, by the same rule whatever made them, in memory that
    every chunk uses again: made anew, each would find its place taken by what the batches have come to hold. It is
    float32, or bfloat16 where all values are and these are multiplied into float32 the fastest: on GPUs, and by some
    processors' dot products.

    Args:
        name: of the linear, for errors.
        columns: width of the inputs.
        device: where the inputs are.
        original: whether the original model's inputs come too, for :attr:`Hessian.cross`.
        aim: for :attr:`Hessian.aim` instead, the outputs and residuals of the original. Linears that add to the
            residual stream mostly have fewer rows than columns, so it takes fewer products.
        ranks: the processes that each add a part of the batches; all get the Hessian of all of them.
    """

    def __init__(
        self,
        name: str,
        columns: int,
        device: torch.device,
        *,
        original: bool = False,
        aim: Aim | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._name, self._columns, self._ranks = name, columns, ranks
        self._total = torch.zeros((columns, columns), dtype=torch.float32, device=device)
        self._cross = torch.zeros_like(self._total) if original and aim is None else None
        rows, self._residual = (0, 0.0) if aim is None else (aim.rows, aim.residual)
        self._aim = torch.zeros((rows, columns), dtype=torch.float32, device=device) if rows else None
        self._width = columns + (rows or (columns if original else 0))
        self._buffer = torch.empty(0, device=device)
        self._packed = torch.empty(0, dtype=torch.int32)
        self._pairs = device.type == "cpu" and _paired(columns, rows)
        self._keeps_halves = self._pairs or device.type == "cuda"
        self._count = self._tokens = self._batches = 0
        #: Whether all are bfloat16 values on a CPU.
        self._exact = device.type == "cpu"

    @property
    def tokens(self) -> int:
        """How many have been added."""
        return self._tokens + self._count

    def add(self, batch: Arrival, original: Arrival | Departure | None = None) -> None:
        """Add a batch, with what the original model has at the same tokens if that was announced.

        For an aim that is a departure, and both have residuals.

        Raises:
            CalibrationError: a value is not finite.
        """
        parts = [batch.inputs]
        if self._aim is not None:
            assert isinstance(original, Departure) and batch.residual is not None
            parts += [original.outputs, original.residual, batch.residual]
        elif isinstance(original, Arrival):
            parts.append(original.inputs)
        for part in parts:
            if not all_finite(part):
                raise CalibrationError(
                    f"{self._name}: batch {self._batches} comes to this linear with values that are not finite; the "
                    "weights before it may be damaged, or need a wider dtype (bfloat16 or float32)"
                )
        self._batches += 1
        halves = all(part.dtype == torch.bfloat16 for part in parts)
        self._exact = self._exact and halves
        self._make_room(torch.bfloat16 if halves and self._keeps_halves else torch.float32)
        for pieces in zip(*(part.split(_CHUNK_TOKENS) for part in parts), strict=True):
            rows = len(pieces[0])
            if self._count + rows > _CHUNK_TOKENS:
                self._flush()
            inputs, others = self._parts(self._count, self._count + rows)
            inputs.copy_(pieces[0])
            if self._aim is not None:
                others.copy_(pieces[2]).sub_(pieces[3]).mul_(self._residual).add_(pieces[1])
            elif self._cross is not None:
                others.copy_(pieces[1])
            self._count += rows

    def hessian(self) -> Hessian:
        """What has come together; nothing can be added any more.

        Raises:
            CalibrationError: no token reached the linear, or squares are too large.
        """
        self._flush()
        del self._buffer, self._packed
        self._join()
        if self._tokens == 0:
            raise CalibrationError(
                f"{self._name}: no calibration token reached this linear; use more or other calibration text, "
                "or leave the linear unquantized with an override"
            )
        if not torch.isfinite(self._total.diagonal()).all():
            raise CalibrationError(
                f"{self._name}: the squares of its calibration inputs are too large for float32; "
                "the weights before it may be damaged, or leave the linear unquantized with an override"
            )
        upper = self._total.triu_()
        # In place, tile by tile: a transposed copy would need the same memory again.
        for start in range(0, self._columns, _TILE):
            stop = start + _TILE
            tile = upper[start:stop, start:stop]
            tile += tile.triu(1).T
            upper[stop:, start:stop] = upper[start:stop, stop:].T
        cross = None if self._cross is None else self._cross.div_(self._tokens)
        aim = None if self._aim is None else self._aim.div_(self._tokens)
        return Hessian(upper.div_(self._tokens), self._tokens, cross, aim)

    def _join(self) -> None:
        """Add what other processes have."""
        if self._ranks.alone:
            return
        self._tokens = self._ranks.sum_number(self._tokens)
        for start in range(0, self._columns, _TILE):  # what lies on and above the diagonal
            rows = self._total[start : start + _TILE, start:]
            rows.copy_(self._ranks.sum_(rows.contiguous()))
        for more in (self._cross, self._aim):
            if more is not None:
                self._ranks.sum_(more)

    def _parts(self, start: int, stop: int) -> tuple[torch.Tensor, ...]:
        """Rows of the buffer: this model's inputs, and the original's or what is aimed at, if that is asked for."""
        return self._buffer[start:stop].tensor_split((self._columns,), dim=1)

    def _make_room(self, dtype: torch.dtype) -> None:
        """A buffer of this dtype; what is in one of another is multiplied first."""
        if len(self._buffer) and self._buffer.dtype == dtype:
            return
        self._flush()
        self._buffer = torch.empty((_CHUNK_TOKENS, self._width), dtype=dtype, device=self._buffer.device)
        pairs = self._buffer.numel() // 2 if dtype == torch.bfloat16 and self._pairs else 0
        self._packed = torch.empty(pairs, dtype=torch.int32)

    def _flush(self) -> None:
        if self._count == 0:
            return
        # What is aimed at is rounded where bfloat16 is what products take, as the original's outputs were before.
        if self._pairs and self._buffer.dtype == torch.bfloat16:
            self._add_pairs()
        else:
            with bfloat16_products(enabled=self._exact):
                self._add_rows()
        self._tokens += self._count
        self._count = 0

    def _add_rows(self) -> None:
        rows, others = self._parts(0, self._count)
        for start in range(0, self._columns, _TILE):  # the upper triangle, in whole tiles
            left = rows[:, start : start + _TILE]
            _add_product(self._total[start : start + _TILE, start:], left, rows[:, start:])
        if self._cross is not None:
            _add_product(self._cross, others, rows)
        if self._aim is not None:
            _add_product(self._aim, others, rows)

    def _add_pairs(self) -> None:
        end = self._count + self._count % 2
        self._buffer[self._count : end] = 0
        parts = self._parts(0, end)
        lengths = [part.numel() // 2 for part in parts]
        places = self._packed[: sum(lengths)].split(lengths)
        rows, others = map(pack_pairs, parts, places)
        add_products(self._total, rows, rows, upper=True)
        if self._cross is not None:
            add_products(self._cross, others, rows)
        if self._aim is not None:
            add_products(self._aim, others, rows)


def accumulate_hessian(
    name: str,
    inputs: Iterable[torch.Tensor],
    columns: int,
    device: torch.device,
    originals: Iterable[torch.Tensor] | None = None,
    *,
    ranks: Ranks = ALONE,
) -> Hessian:
    """Sum ``xᵀx`` over batches.

    Args:
        name: of the linear, for errors.
        inputs: batches ``[tokens, columns]`` of any floating dtype; each is used up before the next is taken.
        columns: width of the inputs.
        device: where the inputs are.
        originals: the same batches in the original model, for :attr:`Hessian.cross`.
        ranks: see :class:`HessianSum`.

    Raises:
        CalibrationError: no token reached the linear, or an input is not finite.
    """
    total = HessianSum(name, columns, device, original=originals is not None, ranks=ranks)
    if originals is None:
        for batch in inputs:
            total.add(Arrival(batch))
    else:
        for batch, original in zip(inputs, originals, strict=True):
            total.add(Arrival(batch), Arrival(original))
    return total.hessian()


def hessian_nbytes(columns: int, dtype: torch.dtype, *, original: bool = False, aimed: int = 0) -> int:
    """Peak bytes of a :class:`HessianSum`: the matrix; a chunk of tokens in float32, and as it is multiplied.

    With the inputs of the ``original`` model, all of that twice; or, with an aim of ``aimed`` rows, as much as this is
    wide. Chunks kept in bfloat16 take less.
    """
    width = columns + (aimed or (columns if original else 0))
    return width * (4 * columns + _CHUNK_TOKENS * (dtype.itemsize + 4))


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add ``AᵀB``, of either dtype, in float32."""
    if left.dtype == torch.float32:
        total.addmm_(left.T, right)
        return
    for part, columns in zip(total.split(_TILE), left.split(_TILE, dim=1), strict=True):
        part.add_(torch.mm(columns.T, right, out_dtype=torch.float32))


def _paired(*widths: int) -> bool:
    """Whether bfloat16 matrices of these widths are multiplied as they are."""
    return use_dot_products() and not any(width % LANES for width in widths)
