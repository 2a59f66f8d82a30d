"""The inner loops of GPTQ on a GPU, in Triton: what :mod:`~llmconvert.quantize.solve.kernels` has for the CPU.

A program takes a few rows through a block of columns, one column after the other. What is carried to the block's other
columns stays in registers, so that a column costs no kernel launch and no trip to memory. Only float32 is known here;
the plain torch counterparts, in the modules that call these, do the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["descend_columns", "solve_columns"]

# Rows of a program: few, since the rows of one linear are to keep all multiprocessors busy.
_ROWS = 16
# Adding it leaves no bits for a fraction, and rounds half to even; for values below 2²².
_NO_FRACTION = tl.constexpr(12582912.0)


def solve_columns(
    errors: torch.Tensor,
    carried: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    codes: torch.Tensor,
    loss: torch.Tensor,
    order: torch.Tensor,
    added: torch.Tensor,
    factor: torch.Tensor,
    start: int,
    code_min: float,
    code_max: float,
) -> None:
    """Quantize a block of columns; arguments as for :func:`.kernels.solve_columns`, contiguous."""
    rows, block = errors.shape[1], len(factor)
    size = len(errors) // len(scales)
    matrices = errors, carried, scales, zeros, codes, loss, order, added, factor
    _solve[_programs(rows)](
        *matrices, start, rows, size, block, code_min, code_max, triton.next_power_of_2(block), _ROWS
    )


def descend_columns(
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    moved: torch.Tensor,
    code_min: float,
    code_max: float,
) -> None:
    """Improve codes; arguments as for :func:`llmconvert.quantize.solve.kernels.descend_columns`, contiguous."""
    count, rows = gradient.shape
    matrices = gradient, hessian, codes, scale, moved
    _descend[_programs(rows)](*matrices, rows, count, code_min, code_max, triton.next_power_of_2(count), _ROWS)


def _programs(rows: int) -> tuple[int]:
    return (triton.cdiv(rows, _ROWS),)


@triton.jit
def _solve(
    errors,
    carried,
    scales,
    zeros,
    codes,
    loss,
    order,
    added,
    factor,
    start,
    rows,
    size,
    block,
    low,
    high,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = own < rows
    columns = tl.arange(0, BLOCK)
    known = (columns < block)[:, None] & inside[None, :]
    tile = tl.load(carried + columns[:, None] * rows + own[None, :], mask=known, other=0.0)
    total = tl.load(loss + own, mask=inside, other=0.0)
    for count in range(block):
        column = block - 1 - count
        place = tl.load(order + start + column)
        pivot = tl.load(factor + column * block + column)
        group = place // size * rows + own
        step = tl.load(scales + group, mask=inside, other=1.0)
        origin = tl.load(zeros + group, mask=inside, other=0.0)
        here = errors + (start + column).to(tl.int64) * rows + own
        value = tl.load(here, mask=inside, other=0.0)
        wanted = value + tl.div_rn(_line(tile, columns, column), pivot)
        code = _nearest(tl.div_rn(wanted, step), low - origin, high - origin) + origin
        tl.store(codes + place * rows + own, code.to(tl.int8), mask=inside)
        level = (code - origin) * step
        wrong = value - level
        tl.store(here, wrong, mask=inside)
        missed = (wanted - level) * pivot
        total += missed * missed - tl.load(added + place) * wrong * wrong
        share = tl.load(factor + column * block + columns, mask=columns < column, other=0.0)
        tile += share[:, None] * wrong[None, :]
    tl.store(loss + own, total, mask=inside)


@triton.jit
def _descend(
    gradient,
    hessian,
    codes,
    scale,
    moved,
    rows,
    count,
    low,
    high,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = own < rows
    columns = tl.arange(0, BLOCK)
    known = (columns < count)[:, None] & inside[None, :]
    places = gradient + columns[:, None] * rows + own[None, :]
    tile = tl.load(places, mask=known, other=0.0)
    step = tl.load(scale + own, mask=inside, other=1.0)
    for column in range(count):
        here = column * rows + own
        level = tl.load(codes + here, mask=inside, other=0).to(tl.float32)
        slope = tl.div_rn(_line(tile, columns, column), tl.load(hessian + column * count + column))
        best = _nearest(level - tl.div_rn(slope, step), low, high)
        change = (best - level) * step
        tl.store(codes + here, best.to(tl.int8), mask=inside)
        tl.store(moved + here, change, mask=inside)
        share = tl.load(hessian + column * count + columns, mask=columns < count, other=0.0)
        tile += share[:, None] * change[None, :]
    tl.store(places, tile, mask=known)


@triton.jit
def _line(tile, columns, column):
    """One column of a tile that lies in registers, which have no addresses."""
    return tl.sum(tl.where((columns == column)[:, None], tile, 0.0), 0)


@triton.jit
def _nearest(value, low, high):
    """The whole number next to each value, within bounds that are whole numbers."""
    return tl.minimum(tl.maximum(value, low), high) + _NO_FRACTION - _NO_FRACTION
