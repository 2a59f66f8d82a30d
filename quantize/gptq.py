"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): rounding column by column, each error corrected by the columns after.

With the Hessian ``H`` of the linear's inputs, quantizing column ``j`` with error ``e`` is best answered by moving the
remaining columns by ``-e · U[j, j+1:] / U[j, j]``, where ``H⁻¹ = Uᵀ U`` and ``U`` is upper triangular. Columns go in
order of falling diagonal (act-order); scales are chosen before, on the columns in their own order (static groups), so
the result needs no column index and every kernel can read it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmconvert.engine.statistics import Hessian
from llmconvert.errors import CalibrationError
from llmconvert.quantize.kernels import over_rows, solve_columns
from llmconvert.quantize.scales import GroupScales, search_scales
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor

__all__ = ["GptqOptions", "Prepared", "inverse_factor", "prepare", "quantize_gptq", "solve_nbytes"]

_MAX_DAMPING = 1.0


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """Settings of the algorithm.

    Attributes:
        damping: share of the mean diagonal that is added to the diagonal; grows tenfold until ``H`` factorizes.
        block: columns solved before their errors are carried to the rest in one product.
        scale_steps: fractions of a group's range that are tried as its scale.
        narrowest: the smallest of these fractions.
    """

    damping: float = 0.01
    block: int = 128
    scale_steps: int = 26
    narrowest: float = 0.5


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all linears at one stop share: the order of columns, the factor in that order, and the damping it took."""

    order: torch.Tensor
    factor: torch.Tensor
    diagonal: torch.Tensor
    damping: float


def prepare(name: str, hessian: Hessian, options: GptqOptions, dtype: torch.dtype = torch.float32) -> Prepared:
    """Order the columns and factorize the inverse Hessian.

    Args:
        name: of the linears, for errors.
        hessian: overwritten is nothing; a column whose inputs were all zero gets a diagonal of one.
        options: damping.
        dtype: of the factorization.

    Raises:
        CalibrationError: no damping up to the mean diagonal itself makes the matrix factorizable.
    """
    diagonal = hessian.matrix.diagonal().to(dtype)
    order = torch.argsort(diagonal, descending=True, stable=True)
    damping = options.damping
    while damping <= _MAX_DAMPING:
        factor = inverse_factor(hessian.matrix, order, damping, dtype)
        if factor is not None:
            return Prepared(order, factor, diagonal, damping)
        damping *= 10
    raise CalibrationError(
        f"{name}: the Hessian of its inputs ({hessian.tokens} tokens, {diagonal.shape[0]} columns) cannot be "
        f"factorized even with damping {_MAX_DAMPING}; use more calibration text, or quantize this linear with rtn"
    )


def inverse_factor(
    matrix: torch.Tensor, order: torch.Tensor, damping: float, dtype: torch.dtype
) -> torch.Tensor | None:
    """The upper triangular ``U`` with ``(P H Pᵀ + damping · mean diagonal)⁻¹ = Uᵀ U``; None if it does not exist.

    One Cholesky factorization and one triangular inverse: with the order reversed, ``H = L Lᵀ`` turns into
    ``H = R Rᵀ`` with ``R`` upper triangular, and ``U = R⁻¹``.
    """
    backwards = order.flip(0)
    work = matrix[backwards][:, backwards].to(dtype)
    diagonal = work.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    lower, info = torch.linalg.cholesky_ex(work)
    if int(info) != 0:
        return None
    identity = torch.eye(len(order), dtype=dtype, device=matrix.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip(0, 1)


def quantize_gptq(
    name: str,
    weight: torch.Tensor,
    prepared: Prepared,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    options: GptqOptions,
    scales: GroupScales | None = None,
) -> QuantizedTensor:
    """Quantize one weight, or several with the same inputs stacked over their rows.

    Args:
        name: for errors.
        weight: ``[rows, columns]``.
        prepared: from :func:`prepare`; its dtype is what is computed in.
        scheme: bits, grouping, symmetry.
        scale_dtype: what scales are stored as.
        options: scale search and block size.
        scales: given scales; searched for when None.

    Raises:
        CheckpointError: the weight has values that are not finite.
    """
    work = weight.to(prepared.factor.dtype)
    if scales is None:
        scales = search_scales(
            name, work, prepared.diagonal, scheme, scale_dtype, steps=options.scale_steps, narrowest=options.narrowest
        )
    scale, zero = scales.per_column(work.shape[1], work.dtype)
    order = prepared.order
    permuted = _solve(work[:, order], scale[:, order], zero[:, order], prepared.factor, scheme, options.block)
    codes = torch.empty_like(permuted)
    codes[:, order] = permuted
    return QuantizedTensor(codes, scales.scale, scales.zero, scheme)


def solve_nbytes(rows: int, columns: int) -> int:
    """Peak bytes of :func:`prepare` and :func:`quantize_gptq` in float32, beside the Hessian and the weight.

    ``n²`` terms: the permuted copy, its Cholesky factor, the identity, the inverse and its flipped copy, 4 bytes each.
    ``rows · n`` terms: the float32 weight, its permuted copy, scale and zero per column with permuted copies, codes
    twice, and the scale candidates of at most 4,096 rows.
    """
    factorization = 5 * 4 * columns * columns
    solution = 4 * columns * columns + rows * columns * (6 * 4 + 2)
    return max(factorization, solution)


def _solve(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    factor: torch.Tensor,
    scheme: Scheme,
    block: int,
) -> torch.Tensor:
    """Codes int8 ``[rows, columns]`` for columns already in order; ``weight`` is used up."""
    rows, columns = weight.shape
    codes = torch.empty((rows, columns), dtype=torch.int8, device=weight.device)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part = slice(start, stop)
        errors = torch.empty((rows, stop - start), dtype=weight.dtype, device=weight.device)
        _solve_block(weight[:, part], scale[:, part], zero[:, part], codes[:, part], errors, factor[part, part], scheme)
        if stop < columns:
            weight[:, stop:].addmm_(errors, factor[part, stop:], alpha=-1)
    return codes


def _solve_block(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
    factor: torch.Tensor,
    scheme: Scheme,
) -> None:
    low, high = float(scheme.code_min), float(scheme.code_max)
    if weight.device.type == "cpu":
        line = weight.contiguous()
        out = torch.empty(codes.shape, dtype=torch.int8)
        over_rows(
            solve_columns, (line, scale.contiguous(), zero.contiguous(), out, errors), (factor.contiguous(), low, high)
        )
        codes.copy_(out)
        return
    for column in range(weight.shape[1]):
        value, step, origin = weight[:, column], scale[:, column], zero[:, column]
        code = torch.clamp(torch.round(value / step) + origin, low, high)
        codes[:, column] = code.to(torch.int8)
        error = (value - (code - origin) * step) / factor[column, column]
        errors[:, column] = error
        weight[:, column + 1 :].addr_(error, factor[column, column + 1 :], alpha=-1)
