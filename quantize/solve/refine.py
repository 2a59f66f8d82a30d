"""Coordinate descent on GPTQ's objective (QuantEase): codes and scales improved in turn, each given all the others.

GPTQ decides each column once, before it knows what becomes of the columns after it. Here every column is looked at
again with the others in place: the code that is best for them is taken (coordinate descent, as in QuantEase, Behdin et
al. 2023, arXiv 2309.01885), and once a group's columns have been through, the scale that suits their codes best, by
least squares. Neither step can make the error larger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from llmconvert.compute.rows import over_rows
from llmconvert.quantize.numbers import Number
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve.group_scales import divisors
from llmconvert.quantize.solve.loops import gpu_kernels, levels_of
from llmconvert.quantize.tensor import QuantizedTensor, SuperBlockScales

__all__ = ["Scales", "refine", "refine_nbytes"]

Scales = Literal["moved", "kept"]

# Columns that are looked at before their changes are carried to the rest of their group in one product.
_COLUMNS = 128


def refine(
    weight: torch.Tensor,
    tensor: QuantizedTensor,
    hessian: torch.Tensor,
    sweeps: int,
    *,
    scales: Scales = "moved",
    loss: torch.Tensor | None = None,
) -> tuple[QuantizedTensor, torch.Tensor]:
    """Lower ``tr((Ŵ - W) H (Ŵ - W)ᵀ)``.

    Args:
        weight: ``W``, float32 or float64 ``[rows, columns]``.
        tensor: ``Ŵ`` to begin with; zero points are kept.
        hessian: ``H``, symmetric with a positive diagonal, ``[columns, columns]`` in the weight's dtype.
        sweeps: how often to go through all columns.
        scales: whether they are moved too, or kept: rows that are not here may share them.
        loss: each row's share of the form to begin with, if it is known.

    Returns:
        the improved weight, and each row's share of the form.
    """
    scheme = tensor.scheme
    groups = tensor.scale.shape[1]
    size = weight.shape[1] // groups
    codes = tensor.codes.T.contiguous()
    scale = tensor.factors.T.to(weight.dtype).contiguous()
    zero = torch.zeros_like(scale) if tensor.zero is None else tensor.zero.T.to(weight.dtype).contiguous()
    offset = None if tensor.offset is None else tensor.offset.T.to(weight.dtype).contiguous()
    # Transposed, as everything here: rows are independent, columns are not.
    error = (tensor.dequantize(weight.dtype) - weight).T.contiguous()
    loss = (hessian @ error).mul_(error).sum(0) if loss is None else loss.clone()
    for _ in range(sweeps):
        for group in range(groups):
            columns = slice(group * size, (group + 1) * size)
            within = hessian[columns, columns]
            # Half the gradient of the form: told when a group's turn comes, in place of being kept for all of them.
            local = hessian[columns] @ error
            before = local.clone()
            moved = _descend_group(local, within, codes[columns], divisors(scale[group], weight.dtype), scheme)
            loss += before.add_(local).mul_(moved).sum(0)
            del before
            level = scheme.number.values(codes[columns]).to(weight.dtype) - zero[group]
            if scales == "moved" and offset is None:
                change, gain = _scale_change(level, local, within, scale[group], _grid(tensor, group))
                moved.addcmul_(level, change)
                scale[group] += change
                loss += gain
            elif scales == "moved" and offset is not None:
                grid = _grid(tensor, group)
                change, shift, gain = _affine_change(level, local, within, scale[group], offset[group], grid)
                moved.addcmul_(level, change).add_(shift)
                scale[group] += change
                offset[group] += shift
                loss += gain
            error[columns] += moved
    divisor = tensor.divisor
    stored = (scale if divisor is None else scale * divisor).T.to(tensor.scale.dtype)
    if scheme.number.scales is not None:
        # Exactly what is stored: the way to it and back went through a division.
        stored = scheme.number.round_scale(stored, stored.dtype)
    stored = stored.contiguous()
    offsets = None if offset is None else offset.T.to(tensor.scale.dtype).contiguous()
    nested = tensor.nested
    if isinstance(nested, SuperBlockScales):
        nested = nested.moved(stored, offsets)
        stored, offsets = nested.steps, nested.offsets
    refined = QuantizedTensor(codes.T.contiguous(), stored, tensor.zero, scheme, nested, divisor, offsets)
    return refined, loss


def refine_nbytes(rows: int, columns: int) -> int:
    """Peak bytes of :func:`refine` in float32 beside its arguments, if one group is all columns.

    Codes twice; the error; a group's gradient, its changes, levels and what the Hessian makes of these.
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
    number = scheme.number
    for start in range(0, len(codes), _COLUMNS):
        part = slice(start, start + _COLUMNS)
        within = hessian[part, part].contiguous()
        arguments = gradient[part], within, codes[part], scale, moved[part]
        if gradient.device.type == "cpu":
            from llmconvert.quantize.solve.kernels import descend_columns

            arguments = gradient[part], within, codes[part].view(torch.int8), scale, moved[part]
            over_rows(descend_columns, codes.shape[1], *arguments, *number.limits, *levels_of(number, gradient))
        elif number.even and codes.dtype == torch.int8 and (kernels := gpu_kernels(gradient)):
            kernels.descend_columns(*arguments, *number.limits)
        else:
            _descend_plain(*arguments, number)
        for other in (slice(0, start), slice(start + _COLUMNS, None)):
            gradient[other].addmm_(hessian[other, part], moved[part])
    return moved


@dataclass(frozen=True, slots=True)
class _Grid:
    """Which scales and offsets a group can have.

    Attributes:
        step: the scales next to some, ``[rows]`` both.
        offset: the same for what is added.
        signed: whether scales below zero, and zero, are among them.
    """

    step: Callable[[torch.Tensor], torch.Tensor]
    offset: Callable[[torch.Tensor], torch.Tensor]
    signed: bool


def _grid(tensor: QuantizedTensor, group: int) -> _Grid:
    nested, number, dtype = tensor.nested, tensor.scheme.number, tensor.scale.dtype
    divisor = tensor.divisor
    if isinstance(nested, SuperBlockScales):
        return _Grid(partial(nested.nearest_step, group), partial(nested.nearest_offset, group), signed=True)

    def stored(values: torch.Tensor) -> torch.Tensor:
        if divisor is None:
            return number.round_scale(values, dtype).to(values.dtype)
        return (number.round_scale(values * divisor, dtype) / divisor).to(values.dtype)

    return _Grid(stored, stored, signed=tensor.scheme.block is not None)


def _scale_change(
    level: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, grid: _Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """What to add to a group's scales ``[rows]`` for levels ``[columns, rows]``, and what the form grows by then.

    Where nothing helps, zero.
    """
    slope = (level * gradient).sum(0)
    curvature = level.mul(hessian @ level).sum(0)
    wanted = grid.step(scale - slope / curvature)
    change = wanted - scale
    # The scale is stored in few digits: what rounding leaves of the improvement may be none. So may 0 / 0.
    gain = change * (2 * slope + change * curvature)
    helps = gain < 0
    if not grid.signed:
        helps &= wanted > 0
    zero = torch.zeros_like(change)
    return change.where(helps, zero), gain.where(helps, zero)


def _affine_change(
    level: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    grid: _Grid,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for a group's scales and offsets ``[rows]``, both at once."""
    product, ones = hessian @ level, hessian.sum(1, keepdim=True)
    slope, tilt = (level * gradient).sum(0), gradient.sum(0)
    ss, so, oo = (level * product).sum(0), product.sum(0), ones.sum()
    # Of the scale, the one that is best with the offset that goes with it; then the offset for it.
    free = scale - (slope * oo - tilt * so) / (ss * oo - so.square())
    change = grid.step(free) - scale
    shift = grid.offset(offset - (tilt + so * change) / oo) - offset
    gain = change * (2 * slope + change * ss + 2 * shift * so) + shift * (2 * tilt + shift * oo)
    helps = gain < 0
    zero = torch.zeros_like(change)
    return change.where(helps, zero), shift.where(helps, zero), gain.where(helps, zero)


def _descend_plain(
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    moved: torch.Tensor,
    number: Number,
) -> None:
    """What the kernels do, in torch, for any device and number."""
    for column in range(len(hessian)):
        before = number.values(codes[column]).to(gradient.dtype)
        best = number.nearest(before - gradient[column] / hessian[column, column] / scale)
        moved[column] = (number.values(best).to(gradient.dtype) - before) * scale
        codes[column] = best
        gradient.addr_(hessian[:, column], moved[column])
