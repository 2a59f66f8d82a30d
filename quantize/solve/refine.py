"""Coordinate descent on GPTQ's objective (QuantEase): codes and scales improved in turn, each given all the others.

GPTQ decides each column once, before it knows what becomes of the columns after it. Here every column is looked at
again with the others in place: the code that is best for them is taken (coordinate descent, as in QuantEase, Behdin et
al. 2023, arXiv 2309.01885), and once a group's columns have been through, the scale that suits their codes best, by
least squares. Neither step can make the error larger.
"""

from __future__ import annotations

import torch

from llmconvert.compute.rows import over_rows
from llmconvert.quantize.numbers import Number
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve.kernels import descend_columns, gpu_kernels
from llmconvert.quantize.tensor import QuantizedTensor

__all__ = ["refine", "refine_nbytes"]

# Columns that are looked at before their changes are carried to the rest of their group in one product.
_COLUMNS = 128


def refine(
    weight: torch.Tensor, tensor: QuantizedTensor, hessian: torch.Tensor, sweeps: int
) -> tuple[QuantizedTensor, torch.Tensor]:
    """Lower ``tr((Ŵ - W) H (Ŵ - W)ᵀ)``.

    Args:
        weight: ``W``, float32 or float64 ``[rows, columns]``.
        tensor: ``Ŵ`` to begin with; zero points are kept.
        hessian: ``H``, symmetric with a positive diagonal, ``[columns, columns]`` in the weight's dtype.
        sweeps: how often to go through all columns.

    Returns:
        the improved weight, and each row's share of the form.
    """
    scheme = tensor.scheme
    groups = tensor.scale.shape[1]
    size = weight.shape[1] // groups
    codes = tensor.codes.T.contiguous()
    scale = tensor.scale.T.to(weight.dtype).contiguous()
    zero = torch.zeros_like(scale) if tensor.zero is None else tensor.zero.T.to(weight.dtype).contiguous()
    # Half the gradient of the form. Transposed, as everything here: rows are independent, columns are not.
    gradient = hessian @ (tensor.dequantize(weight.dtype) - weight).T
    for _ in range(sweeps):
        for group in range(groups):
            columns = slice(group * size, (group + 1) * size)
            within = hessian[columns, columns]
            local = gradient[columns].clone()
            moved = _descend_group(local, within, codes[columns], scale[group], scheme)
            level = codes[columns].to(weight.dtype) - zero[group]
            change = _scale_change(level, local, within, scale[group], tensor.scale.dtype, scheme.number)
            scale[group] += change
            gradient.addmm_(hessian[columns].T, moved.addcmul_(level, change))
    stored = scale.T.to(tensor.scale.dtype).contiguous()
    refined = QuantizedTensor(codes.T.contiguous(), stored, tensor.zero, scheme)
    error = (refined.dequantize(weight.dtype) - weight).T
    return refined, gradient.mul_(error).sum(0)


def refine_nbytes(rows: int, columns: int) -> int:
    """Peak bytes of :func:`refine` in float32 beside its arguments, if one group is all columns.

    Codes twice; the gradient; a group's part of it, its changes, levels and what the Hessian makes of these.
    """
    return rows * columns * (2 + 4 * 5)


def _descend_group(
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    scheme: Scheme,
) -> torch.Tensor:
    """One sweep over a group's columns; codes and gradient ``[columns, rows]`` are changed.

    Returns:
        how far the weights moved, ``[columns, rows]``.
    """
    moved = torch.empty_like(gradient)
    limits = scheme.number.limits
    for start in range(0, len(codes), _COLUMNS):
        part = slice(start, start + _COLUMNS)
        within = hessian[part, part].contiguous()
        arguments = gradient[part], within, codes[part], scale, moved[part]
        if gradient.device.type == "cpu":
            over_rows(descend_columns, codes.shape[1], *arguments, *limits)
        elif kernels := gpu_kernels(gradient):
            kernels.descend_columns(*arguments, *limits)
        else:
            _descend_plain(*arguments, *limits)
        for other in (slice(0, start), slice(start + _COLUMNS, None)):
            gradient[other].addmm_(hessian[other, part], moved[part])
    return moved


def _scale_change(
    level: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    stored: torch.dtype,
    number: Number,
) -> torch.Tensor:
    """What to add to a group's scales ``[rows]`` for levels ``[columns, rows]``; where nothing helps, zero."""
    slope = (level * gradient).sum(0)
    curvature = level.mul(hessian @ level).sum(0)
    wanted = number.round_scale(scale - slope / curvature, stored).to(scale.dtype)
    change = wanted - scale
    # The scale is stored in few digits: what rounding leaves of the improvement may be none. So may 0 / 0.
    helps = (wanted > 0) & (change * (2 * slope + change * curvature) < 0)
    return torch.where(helps, change, torch.zeros_like(change))


def _descend_plain(
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    moved: torch.Tensor,
    code_min: float,
    code_max: float,
) -> None:
    """What the kernels do, in torch, for any device."""
    for column in range(len(hessian)):
        level = codes[column] - gradient[column] / hessian[column, column] / scale
        best = torch.clamp(torch.round(level), code_min, code_max)
        moved[column] = (best - codes[column]) * scale
        codes[column] = best.to(torch.int8)
        gradient.addr_(hessian[:, column], moved[column])
