"""``AᵀB`` of bfloat16 matrices, summed in float32, with the dot products of AVX-512 BF16.

torch's products of bfloat16 give bfloat16 on a CPU, and oneDNN reads float32 as bfloat16 with AMX alone: without it a
Hessian would be multiplied at the rate of float32. The instruction is twice as fast
(:mod:`~llmconvert.compute.dot_kernels`, loaded when a product is asked for: plans compile nothing).

Rows of the operands are the summed dimension, so two of them are laid together (:func:`pack_pairs`): a lane then holds
a column at two neighbouring rows. Each entry is summed by one thread, in the order of its rows, however many threads
there are.
"""

from __future__ import annotations

import torch

from llmconvert.compute.precision import LANES, cpu_has
from llmconvert.compute.rows import over_rows

__all__ = ["LANES", "add_products", "load_dot_products", "pack_pairs", "use_dot_products"]


def use_dot_products() -> bool:
    """Whether these products are the fastest here: AVX-512 BF16 without AMX, for which oneDNN has its own."""
    return cpu_has("avx512_bf16") and not cpu_has("amx_bf16")


def pack_pairs(values: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Lay rows together in pairs, and columns in panels.

    Args:
        values: bfloat16 ``[rows, columns]``, an even number of rows and whole panels.
        packed: memory for it, at least as many int32 as pairs of values.

    Returns:
        A view of ``packed``, int32 ``[panels, pairs, LANES]``.
    """
    from llmconvert.compute.dot_kernels import pack

    rows, columns = values.shape
    panels = packed[: rows // 2 * columns].view(columns // LANES, rows // 2, LANES)
    over_rows(pack, rows // 2, values.view(torch.int16), panels)
    return panels


def add_products(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, upper: bool = False) -> None:
    """Add ``AᵀB`` of two packed operands of as many pairs to ``total``, float32 ``[columns of A, columns of B]``.

    With ``upper`` only tiles that reach the diagonal or lie above it are multiplied.
    """
    from llmconvert.compute.dot_kernels import TILE_PANELS, multiply, tiles_left

    panels = len(left), len(right)
    tiles = sum(tiles_left(group, *panels, upper) for group in range(-(-len(right) // TILE_PANELS)))
    over_rows(multiply, tiles, left, right, total, upper)


def load_dot_products() -> None:
    """Load the kernels, or compile them where no earlier process has, so that no linear waits for it.

    Does nothing where :func:`use_dot_products` says no.
    """
    if not use_dot_products():
        return
    values, packed = torch.zeros((2, 2 * LANES), dtype=torch.bfloat16), torch.empty(2 * LANES, dtype=torch.int32)
    pack_pairs(values, packed)
    packed = pack_pairs(values[:, :LANES], packed)  # columns of a wider matrix are another layout
    add_products(torch.zeros((LANES, LANES)), packed, packed)
