"""A triangular factor in place: ``H = L Lᵀ`` with ``L`` lower triangular.

For wide layers these matrices are the largest thing in memory, so everything happens in the memory of ``H``, whose
upper triangle stays as it is: panel by panel, with LAPACK on the diagonal and matrix products doing the rest.
"""

from __future__ import annotations

import torch

__all__ = ["lower_factor_", "lower_factor_nbytes", "mirror_upper_", "permute_"]

# LAPACK does matrices of this size in half the time that smaller panels take.
_PANEL = 768
# Rows and columns that are moved or updated at a time.
_STRIPE = 256


def lower_factor_(matrix: torch.Tensor) -> bool:
    """Overwrite the lower triangle of a symmetric ``[n, n]`` matrix with ``L``, ``matrix = L Lᵀ``.

    The upper triangle is neither read nor changed.

    Returns:
        whether the matrix was positive definite; if not, its lower triangle holds nothing of use.
    """
    for start in range(0, len(matrix), _PANEL):
        stop = start + _PANEL
        corner, below = matrix[start:stop, start:stop], matrix[stop:, start:stop]
        factor, info = torch.linalg.cholesky_ex(corner)
        if int(info) != 0:
            return False
        corner.triu_(1).add_(factor)
        if len(below):
            below.copy_(torch.linalg.solve_triangular(factor.T, below, upper=True, left=False))
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
