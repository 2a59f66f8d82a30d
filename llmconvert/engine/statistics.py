"""Second moments of a linear's inputs, accumulated batch by batch.

The Hessian of a linear's squared output error with respect to one row of its weight is ``2 XᵀX``, the same for every
row; dividing by the number of tokens instead changes neither codes nor relative damping.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from llmconvert.engine.precision import all_finite, bfloat16_products
from llmconvert.errors import CalibrationError

__all__ = ["Hessian", "HessianSum", "accumulate_hessian", "hessian_nbytes"]

# Enough rows per product to amortize reading and writing the accumulator; few enough to stay in cache.
_CHUNK_TOKENS = 2048
# Only tiles on and above the diagonal are multiplied; smaller tiles save more work but multiply more slowly.
_TILE = 256


@dataclass(frozen=True, slots=True)
class Hessian:
    """``matrix`` is ``XᵀX / tokens``, float32 ``[columns, columns]``, symmetric; ``tokens`` went into it.

    ``cross`` is ``OᵀX / tokens`` with the inputs ``O`` that the original model has at the same tokens, if asked for.
    """

    matrix: torch.Tensor
    tokens: int
    cross: torch.Tensor | None = None


class HessianSum:
    """A Hessian in the making, batch after batch; several can be filled in one pass.

    Batches are joined to chunks of about ``_CHUNK_TOKENS`` rows, by the same rule whatever made them, in float32 memory
    that every chunk uses again: made anew, each would find its place taken by what the batches have come to hold.

    Args:
        name: of the linear, for errors.
        columns: width of the inputs.
        device: where the inputs are.
        original: whether the original model's inputs come too, for :attr:`Hessian.cross`.
    """

    def __init__(self, name: str, columns: int, device: torch.device, *, original: bool = False) -> None:
        self._name, self._columns = name, columns
        self._total = torch.zeros((columns, columns), dtype=torch.float32, device=device)
        self._cross = torch.zeros_like(self._total) if original else None
        width = 2 * columns if original else columns
        self._buffer = torch.empty((_CHUNK_TOKENS, width), dtype=torch.float32, device=device)
        self._count = self._tokens = self._batches = 0
        #: Whether all are bfloat16 values on a CPU.
        self._exact = device.type == "cpu"

    def add(self, batch: torch.Tensor, original: torch.Tensor | None = None) -> None:
        """Add a batch ``[tokens, columns]`` of any floating dtype, with the original model's at the same tokens.

        Raises:
            CalibrationError: a value is not finite.
        """
        parts = (batch,) if original is None else (batch, original)
        for part in parts:
            if not all_finite(part):
                raise CalibrationError(
                    f"{self._name}: batch {self._batches} comes to this linear with values that are not finite; the "
                    "weights before it may be damaged, or need a wider dtype (bfloat16 or float32)"
                )
        self._batches += 1
        self._exact = self._exact and all(part.dtype == torch.bfloat16 for part in parts)
        for pieces in zip(*(part.split(_CHUNK_TOKENS) for part in parts), strict=True):
            rows = len(pieces[0])
            if self._count + rows > _CHUNK_TOKENS:
                self._flush()
            for index, piece in enumerate(pieces):
                columns = slice(index * self._columns, (index + 1) * self._columns)
                self._buffer[self._count : self._count + rows, columns] = piece
            self._count += rows

    def hessian(self) -> Hessian:
        """What has come together; nothing can be added any more.

        Raises:
            CalibrationError: no token reached the linear, or squares are too large.
        """
        self._flush()
        del self._buffer
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
        return Hessian(upper.div_(self._tokens), self._tokens, cross)

    def _flush(self) -> None:
        if self._count == 0:
            return
        rows, originals = self._buffer[: self._count].tensor_split([self._columns], dim=1)
        with bfloat16_products(enabled=self._exact):
            for start in range(0, self._columns, _TILE):  # the upper triangle, in whole tiles
                left = rows[:, start : start + _TILE]
                self._total[start : start + _TILE, start:].addmm_(left.T, rows[:, start:])
            if self._cross is not None:
                self._cross.addmm_(originals.T, rows)
        self._tokens += self._count
        self._count = 0


def accumulate_hessian(
    name: str,
    inputs: Iterable[torch.Tensor],
    columns: int,
    device: torch.device,
    originals: Iterable[torch.Tensor] | None = None,
) -> Hessian:
    """Sum ``xᵀx`` over batches.

    Args:
        name: of the linear, for errors.
        inputs: batches ``[tokens, columns]`` of any floating dtype; each is used up before the next is taken.
        columns: width of the inputs.
        device: where the inputs are.
        originals: the same batches in the original model, for :attr:`Hessian.cross`.

    Raises:
        CalibrationError: no token reached the linear, or an input is not finite.
    """
    total = HessianSum(name, columns, device, original=originals is not None)
    if originals is None:
        for batch in inputs:
            total.add(batch)
    else:
        for batch, original in zip(inputs, originals, strict=True):
            total.add(batch, original)
    return total.hessian()


def hessian_nbytes(columns: int, dtype: torch.dtype, *, original: bool = False) -> int:
    """Peak bytes of :func:`accumulate_hessian`: the matrix; a chunk of tokens in float32, and as it is multiplied.

    With the inputs of the ``original`` model, all of that twice.
    """
    return (4 * columns * columns + _CHUNK_TOKENS * columns * (dtype.itemsize + 4)) * (2 if original else 1)
