"""Hessians in solvers: shrinkage, damping, Cholesky factor in place, quadratic form of an error.

``H = L Lᵀ`` with ``L`` lower triangular: for wide layers these matrices are the largest thing in memory, so everything
happens in the memory of ``H``, whose upper triangle stays as it is: panel by panel, with LAPACK on the diagonal and
matrix products doing the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from llmconvert.compute.precision import bfloat16_products
from llmconvert.engine.statistics import Hessian
from llmconvert.errors import CalibrationError
from llmconvert.memory import row_slices, rows_at_once

__all__ = [
    "lower_factor_",
    "lower_factor_nbytes",
    "mirror_upper_",
    "own_ridge",
    "permute_",
    "quadratic_form",
    "quadratic_nbytes",
    "with_damping",
]

T = TypeVar("T")

# LAPACK does matrices of this size in half the time that smaller panels take; with larger ones, its own updates behind
# a panel and clearing the other triangle of the factor take longer than ours.
_PANEL = 576
# Rows and columns that are moved or updated at a time.
_STRIPE = 256
# Rows are converted in slices of about this many weights.
_WEIGHTS_AT_ONCE = 1 << 23
# Columns of the Hessian multiplied at a time.
_PANEL_COLUMNS = 256
_MAX_DAMPING = 1.0

# Of one token by ten columns and of one by column, held-out text wants about this much of the diagonal, and not more
# (bench/results/2026-11-30-starved-experts-epyc.md).
_MOST_SHRUNK = 0.6


def own_ridge(hessian: Hessian, shrinkage: float) -> float:
    """By what share of itself the diagonal grows, so that moments of few tokens are drawn toward it.

    How columns vary together is partly chance, and a solver that believes it makes up for rounding errors on these
    tokens alone; each column's own energy is known much better. So ``H' = (n H + κ D) / (n + κ)`` with ``n`` tokens and
    the diagonal ``D`` (Schäfer and Strimmer 2005), which is ``H + (κ / n) D`` but for a factor that no solver minds.
    Moments with another model's inputs stay as they are: on the tokens that κ stands for both models agree.

    Args:
        hessian: of as many tokens as have been summed.
        shrinkage: κ by the columns; 0 for moments as they are. The share of ``D`` in ``H'`` is 0.6 at most.
    """
    most = _MOST_SHRUNK / (1 - _MOST_SHRUNK)
    return min(most, shrinkage * len(hessian.matrix) / max(1, hessian.tokens))


def lower_factor_(matrix: torch.Tensor) -> bool:
    """Overwrite the lower triangle of a symmetric ``[n, n]`` matrix with ``L``, ``matrix = L Lᵀ``.

    The upper triangle is neither read nor changed.

    Returns:
        whether the matrix was positive definite; if not, its lower triangle holds nothing of use.
    """
    for start in range(0, len(matrix), _PANEL):
        stop = start + _PANEL
        corner, below = matrix[start:stop, start:stop], matrix[stop:, start:stop]
        # LAPACK's matrices are stored by columns: as the upper one, the factor comes in the order that the matrix has.
        factor, info = torch.linalg.cholesky_ex(corner.T, upper=True)
        if int(info) != 0:
            return False
        corner.triu_(1).add_(factor.T)
        if len(below):
            below.copy_(torch.linalg.solve_triangular(factor, below, upper=True, left=False))
        del factor
        rest = matrix[stop:, stop:]
        for row in range(0, len(rest), _STRIPE):
            own = below[row : row + _STRIPE]
            rest[row : row + _STRIPE, :row].addmm_(own, below[:row].T, alpha=-1)
            rest[row : row + _STRIPE, row : row + _STRIPE].sub_((own @ own.T).tril_())
    return True


def lower_factor_nbytes(columns: int) -> int:
    """Peak bytes of :func:`lower_factor_` in float32 beside the matrix: a factor, and what is below it twice."""
    panel = min(columns, _PANEL)
    return 4 * panel * (panel + 2 * (columns - panel))


def mirror_upper_(matrix: torch.Tensor) -> None:
    """Overwrite the triangle below the diagonal with the one above it."""
    for start in range(0, len(matrix), _STRIPE):
        stop = start + _STRIPE
        corner = matrix[start:stop, start:stop].triu_()
        corner.add_(corner.triu(1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T


def permute_(matrix: torch.Tensor, order: torch.Tensor) -> None:
    """Reorder rows and columns of a square matrix alike: entry ``[i, j]`` becomes ``[order[i], order[j]]``."""
    for start in range(0, len(matrix), _STRIPE):
        rows = matrix[start : start + _STRIPE]
        rows.copy_(rows.index_select(1, order))
    for start in range(0, len(matrix), _STRIPE):
        columns = matrix[:, start : start + _STRIPE]
        columns.copy_(columns.index_select(0, order))


def with_damping(name: str, hessian: Hessian, first: float, attempt: Callable[[float], T | None]) -> T:
    """What ``attempt`` gives for the least damping that suffices: a share of the mean diagonal, growing tenfold.

    Args:
        name: of a linear, for errors.
        hessian: what is to be factorized, for errors.
        first: the share to begin with.
        attempt: called with a share of the mean diagonal; gives None if it does not suffice.

    Raises:
        CalibrationError: not even the mean diagonal itself does.
    """
    damping = first
    while damping <= _MAX_DAMPING:
        found = attempt(damping)
        if found is not None:
            return found
        damping *= 10
    raise CalibrationError(
        f"{name}: the Hessian of its inputs ({hessian.tokens} tokens, {len(hessian.matrix)} columns) cannot be "
        f"factorized even with damping {_MAX_DAMPING}; use more calibration text, or quantize this linear with rtn"
    )


def quadratic_form(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr(W H Wᵀ)``, to about three digits where the processor multiplies bfloat16 faster.

    Args:
        weight: ``[rows, columns]``, or an error of one; computed in the dtype of ``hessian``.
        hessian: symmetric, ``[columns, columns]``.
    """
    columns = weight.shape[1]
    total = 0.0
    for rows in row_slices(weight.shape, _WEIGHTS_AT_ONCE):
        part = weight[rows].to(hessian.dtype)
        energy = part.new_zeros(len(part))
        for start in range(0, columns, _PANEL_COLUMNS):
            panel = slice(start, start + _PANEL_COLUMNS)
            own = part[:, panel]
            with bfloat16_products():
                product = own @ hessian[panel, panel]
                # The matrix is symmetric: what lies above its diagonal tiles counts twice, what lies below not at all.
                product.addmm_(part[:, :start], hessian[:start, panel], alpha=2)
            energy += product.mul_(own).sum(-1)
        total += float(energy.sum(dtype=torch.float64))
    return total


def quadratic_nbytes(rows: int, columns: int) -> int:
    """Peak bytes of :func:`quadratic_form` in float32 beside its arguments."""
    height = rows_at_once(rows, columns, _WEIGHTS_AT_ONCE)
    return 4 * height * (columns + _PANEL_COLUMNS)
