"""A triangular factor in place: ``H = R Rᵀ`` with ``R`` upper triangular.

Second-order methods that go through the columns from the first to the last need the factor of the Hessian that is upper
triangular, which is found from its last column backwards. For wide layers these matrices are the largest thing in
memory, so everything happens in the memory of ``H``: panel by panel, with matrix products doing the work.
"""

from __future__ import annotations

import torch

__all__ = ["mirror_lower_", "permute_", "upper_factor_"]

_PANEL = 256


def upper_factor_(matrix: torch.Tensor) -> bool:
    """Overwrite the upper triangle of a symmetric ``[n, n]`` matrix with ``R``, ``matrix = R Rᵀ``.

    The lower triangle is neither read nor changed.

    Returns:
        whether the matrix was positive definite; if not, its upper triangle holds nothing of use.
    """
    for start in reversed(range(0, len(matrix), _PANEL)):
        stop = start + _PANEL
        corner = matrix[start:stop, start:stop]
        # Reversing both dimensions turns the upper triangle into the lower one, which is what gets read.
        lower, info = torch.linalg.cholesky_ex(corner.flip(0, 1))
        if int(info) != 0:
            return False
        factor = lower.flip(0, 1)
        _set_upper(corner, factor)
        above = matrix[:start, start:stop]
        above.copy_(torch.linalg.solve_triangular(factor.T, above, upper=False, left=False))
        for row in range(0, start, _PANEL):
            end = row + _PANEL
            matrix[row:end, row:end].sub_((above[row:end] @ above[row:end].T).triu_())
            matrix[row:end, end:start].addmm_(above[row:end], above[end:].T, alpha=-1)
    return True


def mirror_lower_(matrix: torch.Tensor) -> None:
    """Overwrite the triangle above the diagonal with the one below it."""
    for start in range(0, len(matrix), _PANEL):
        stop = start + _PANEL
        corner = matrix[start:stop, start:stop]
        _set_upper(corner, corner.tril(-1).T + corner.diagonal().diag())
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T


def permute_(matrix: torch.Tensor, order: torch.Tensor) -> None:
    """Reorder rows and columns of a square matrix alike: entry ``[i, j]`` becomes ``[order[i], order[j]]``."""
    for start in range(0, len(matrix), _PANEL):
        rows = matrix[start : start + _PANEL]
        rows.copy_(rows.index_select(1, order))
    for start in range(0, len(matrix), _PANEL):
        columns = matrix[:, start : start + _PANEL]
        columns.copy_(columns.index_select(0, order))


def _set_upper(target: torch.Tensor, value: torch.Tensor) -> None:
    upper = torch.ones_like(target, dtype=torch.bool).triu_()
    target.copy_(torch.where(upper, value, target))
