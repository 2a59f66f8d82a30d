"""Squared output errors and energies from second moments of the inputs: a quadratic form of the weights."""

from __future__ import annotations

import torch

from llmconvert.compute.precision import bfloat16_products

__all__ = ["quadratic_form", "quadratic_nbytes"]

# Rows are converted in slices of about this many weights.
_WEIGHTS_AT_ONCE = 1 << 23
# Columns of the Hessian multiplied at a time.
_PANEL_COLUMNS = 256


def quadratic_form(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr(W H Wᵀ)``, to about three digits where the processor multiplies bfloat16 faster.

    Args:
        weight: ``[rows, columns]``, or an error of one; computed in the dtype of ``hessian``.
        hessian: symmetric, ``[columns, columns]``.
    """
    rows, columns = weight.shape
    height = max(1, _WEIGHTS_AT_ONCE // columns)
    total = 0.0
    for top in range(0, rows, height):
        part = weight[top : top + height].to(hessian.dtype)
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
    height = min(rows, max(1, _WEIGHTS_AT_ONCE // columns))
    return 4 * height * (columns + _PANEL_COLUMNS)
