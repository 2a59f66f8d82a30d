"""Second moments of a linear's inputs, accumulated batch by batch.

The Hessian of a linear's squared output error with respect to one row of its weight is ``2 XᵀX``, the same for every
row; dividing by the number of tokens instead changes neither codes nor relative damping.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from llmconvert.errors import CalibrationError

__all__ = ["Hessian", "accumulate_hessian", "hessian_nbytes"]

# Enough rows per product to amortize reading and writing the accumulator; few enough to stay in cache.
_CHUNK_TOKENS = 4096
# Only tiles on and above the diagonal are multiplied; smaller tiles save more work but multiply more slowly.
_TILE = 512


@dataclass(frozen=True, slots=True)
class Hessian:
    """``matrix`` is ``XᵀX / tokens``, float32 ``[columns, columns]``, symmetric; ``tokens`` went into it."""

    matrix: torch.Tensor
    tokens: int


def accumulate_hessian(name: str, inputs: Iterable[torch.Tensor], columns: int, device: torch.device) -> Hessian:
    """Sum ``xᵀx`` over batches.

    Args:
        name: of the linear, for errors.
        inputs: batches ``[tokens, columns]`` of any floating dtype; each is used up before the next is taken.
        columns: width of the inputs.
        device: where the inputs are.

    Raises:
        CalibrationError: no token reached the linear, or an input is not finite.
    """
    total = torch.zeros((columns, columns), dtype=torch.float32, device=device)
    tokens = 0
    for chunk in _chunks(inputs):
        tokens += chunk.shape[0]
        _add_products(total, chunk)
        del chunk  # before the next is put together
    if tokens == 0:
        raise CalibrationError(
            f"{name}: no calibration token reached this linear; use more or other calibration text, "
            "or leave the linear unquantized with an override"
        )
    if not torch.isfinite(total.diagonal()).all():
        raise CalibrationError(f"{name}: its calibration inputs are not finite; the weights before it may be damaged")
    upper = total.triu_()
    # In place, tile by tile: a transposed copy would need the same memory again.
    for start in range(0, columns, _TILE):
        stop = start + _TILE
        tile = upper[start:stop, start:stop]
        tile += tile.triu(1).T
        upper[stop:, start:stop] = upper[start:stop, stop:].T
    return Hessian(upper.div_(tokens), tokens)


def hessian_nbytes(columns: int, dtype: torch.dtype) -> int:
    """Peak bytes of :func:`accumulate_hessian`: the matrix, one chunk of tokens as given, and in float32."""
    return 4 * columns * columns + _CHUNK_TOKENS * columns * (dtype.itemsize + 4)


def _add_products(total: torch.Tensor, chunk: torch.Tensor) -> None:
    """Add ``chunkᵀ chunk`` to the upper triangle of ``total``, whole tiles of it."""
    exact = chunk.dtype == torch.bfloat16 and chunk.device.type == "cpu"
    rows = chunk.float()
    with _bfloat16_products(enabled=exact):
        for start in range(0, len(total), _TILE):
            total[start : start + _TILE, start:].addmm_(rows[:, start : start + _TILE].T, rows[:, start:])


def _chunks(inputs: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Batches joined to chunks of about ``_CHUNK_TOKENS`` rows, by the same rule whatever made the batches."""
    held: list[torch.Tensor] = []
    count = 0
    for batch in inputs:
        for part in batch.split(_CHUNK_TOKENS):
            if count + part.shape[0] > _CHUNK_TOKENS:
                yield _joined(held)
                count = 0
            held.append(part)
            count += part.shape[0]
    if count:
        yield _joined(held)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """One tensor of all parts; the list is emptied, so that they are not kept beside it."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    parts.clear()
    return whole


@contextmanager
def _bfloat16_products(*, enabled: bool) -> Iterator[None]:
    """Let oneDNN read float32 operands as bfloat16. Exact for values that are bfloat16; sums stay float32."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if enabled:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
