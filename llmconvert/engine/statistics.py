"""Second moments of a linear's inputs, accumulated batch by batch.

The Hessian of a linear's squared output error with respect to one row of its weight is ``2 XᵀX``, the same for every
row; dividing by the number of tokens instead changes neither codes nor relative damping.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from llmconvert.engine.precision import all_finite, bfloat16_products
from llmconvert.errors import CalibrationError

__all__ = ["Hessian", "accumulate_hessian", "hessian_nbytes"]

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
    total = torch.zeros((columns, columns), dtype=torch.float32, device=device)
    cross = None if originals is None else torch.zeros_like(total)
    if originals is not None:
        inputs = (torch.cat(pair, 1) for pair in zip(inputs, originals, strict=True))
    tokens = 0
    for rows, exact in _chunks(_finite(name, inputs), columns if originals is None else 2 * columns, device):
        tokens += rows.shape[0]
        _add_products(total, rows[:, :columns], exact)
        if cross is not None:
            with bfloat16_products(enabled=exact):
                cross.addmm_(rows[:, columns:].T, rows[:, :columns])
    if tokens == 0:
        raise CalibrationError(
            f"{name}: no calibration token reached this linear; use more or other calibration text, "
            "or leave the linear unquantized with an override"
        )
    if not torch.isfinite(total.diagonal()).all():
        raise CalibrationError(
            f"{name}: the squares of its calibration inputs are too large for float32; "
            "the weights before it may be damaged, or leave the linear unquantized with an override"
        )
    upper = total.triu_()
    # In place, tile by tile: a transposed copy would need the same memory again.
    for start in range(0, columns, _TILE):
        stop = start + _TILE
        tile = upper[start:stop, start:stop]
        tile += tile.triu(1).T
        upper[stop:, start:stop] = upper[start:stop, stop:].T
    return Hessian(upper.div_(tokens), tokens, None if cross is None else cross.div_(tokens))


def hessian_nbytes(columns: int, dtype: torch.dtype, *, original: bool = False) -> int:
    """Peak bytes of :func:`accumulate_hessian`: the matrix; a chunk of tokens in float32, and as it is multiplied.

    With the inputs of the ``original`` model, all of that twice.
    """
    return (4 * columns * columns + _CHUNK_TOKENS * columns * (dtype.itemsize + 4)) * (2 if original else 1)


def _finite(name: str, inputs: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Pass batches on; one with a value that is not finite is refused with its number."""
    for number, batch in enumerate(inputs):
        if not all_finite(batch):
            raise CalibrationError(
                f"{name}: batch {number} comes to this linear with values that are not finite; the weights before it "
                "may be damaged, or need a wider dtype (bfloat16 or float32)"
            )
        yield batch


def _add_products(total: torch.Tensor, rows: torch.Tensor, exact: bool) -> None:
    """Add ``rowsᵀ rows`` to the upper triangle of ``total``, whole tiles of it."""
    with bfloat16_products(enabled=exact):
        for start in range(0, len(total), _TILE):
            total[start : start + _TILE, start:].addmm_(rows[:, start : start + _TILE].T, rows[:, start:])


def _chunks(inputs: Iterable[torch.Tensor], columns: int, device: torch.device) -> Iterator[tuple[torch.Tensor, bool]]:
    """Batches joined to chunks of about ``_CHUNK_TOKENS`` rows, by the same rule whatever made the batches.

    Yields float32 rows in memory that the next chunk will use again, and whether they are bfloat16 values on a CPU.
    One buffer for all: chunks made anew would each find their place taken by what the batches have come to hold.
    """
    buffer = torch.empty((_CHUNK_TOKENS, columns), dtype=torch.float32, device=device)
    count, exact = 0, device.type == "cpu"
    for batch in inputs:
        exact = exact and batch.dtype == torch.bfloat16
        for part in batch.split(_CHUNK_TOKENS):
            if count + part.shape[0] > _CHUNK_TOKENS:
                yield buffer[:count], exact
                count = 0
            buffer[count : count + part.shape[0]] = part
            count += part.shape[0]
    if count:
        yield buffer[:count], exact
