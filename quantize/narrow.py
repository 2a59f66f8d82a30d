"""Scales in a narrower dtype than they were computed in: a group whose scale fades to zero vanishes with it.

A layer that computes nothing loads and runs. So scales are held against the range of what stores them, at both ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from llmconvert.compute.narrowing import LOST, bounds, unheld
from llmconvert.compute.small_floats import E4M3_PARTS
from llmconvert.errors import UnsupportedError
from llmconvert.memory import row_slices
from llmconvert.quantize.tensor import NestedScales, QuantizedTensor

__all__ = ["check_held", "check_kept", "coarse_share", "half_scale_dtype", "half_scales"]

# Weights that are dequantized at a time to be looked at.
_WEIGHTS_AT_ONCE = 1 << 22
_FEW_WEIGHTS = 1 << 14
# What may lie among the subnormal numbers without a look at how much of it is zero.
_FEW = 0.01
# Of E4M3, the first code that has all bits of its mantissa, and the bits that are not the sign's.
_NORMAL, _MAGNITUDE = 1 << E4M3_PARTS.mantissa, (1 << (E4M3_PARTS.bits - 1)) - 1


def check_held(
    name: str, values: torch.Tensor, dtype: torch.dtype, squares: Callable[[], torch.Tensor], *, what: str = "scales"
) -> None:
    """Refuse a weight of which more than a hundredth, by norm, has scales that a dtype does not hold.

    Args:
        name: of the linear.
        values: what is to be stored in ``dtype``, of any shape.
        dtype: floating.
        squares: gives the sum of the squares of the weights that each value stands for, of the same shape, in float64:
            those of small weights are zero in float32.
        what: the values are, for the error.

    Raises:
        UnsupportedError: with what would hold them; also for a single value beyond the range.
    """
    if not bool(torch.isfinite(values).all()):
        raise UnsupportedError(
            f"{name}: a group's values lie farther apart than float32 holds, and it has no {what}; leave the layer "
            "dense with an override (scheme: none)"
        )
    lost = unheld(values, dtype)
    if not bool(lost.any()):
        return
    advice = (
        f"{bounds(dtype)}. compressed-tensors keeps scales in the model's own dtype: take that format, of the model "
        "in bfloat16 or float32; or leave the layer dense with an override (scheme: none)"
    )
    largest = values.abs().max().item()
    if largest > torch.finfo(dtype).max:
        name_of = str(dtype).removeprefix("torch.")
        raise UnsupportedError(f"{name}: one of its {what} is beyond {name_of} ({largest:g}); {advice}")
    weights = squares().double()
    share = float((weights[lost].sum() / weights.sum().clamp(min=torch.finfo(torch.float64).tiny)).sqrt())
    if share > LOST:
        smallest = values[lost].abs().min().item()
        raise UnsupportedError(
            f"{name}: {what} of {share:.0%} of it (by norm) are too small ({smallest:.2g}), and would be zero or near "
            f"it; {advice}"
        )


def check_kept(name: str, tensor: QuantizedTensor, dtype: torch.dtype, weight: Callable[[], torch.Tensor]) -> None:
    """Refuse codes that stand for no weights: beyond what the model's dtype holds, or all zero where weights are not.

    Args:
        name: of the linear.
        tensor: what was chosen for it.
        dtype: of the model, which readers dequantize to.
        weight: gives the weights; asked for where all codes stand for zero.

    Raises:
        UnsupportedError: they do.
    """
    rows, largest = tensor.shape[0], 0.0
    whole = isinstance(tensor.nested, NestedScales)
    together = rows if whole else tensor.scheme.rows or rows
    held = _most(tensor) <= torch.finfo(dtype).max
    for part in row_slices(tensor.shape, _FEW_WEIGHTS if held else _WEIGHTS_AT_ONCE, together=together):
        if held and largest:  # one weight that is not zero tells the rest
            return
        values = (tensor if whole else tensor.rows(part.start, part.stop)).dequantize(dtype)
        largest = max(largest, float(values.abs().max())) if bool(torch.isfinite(values).all()) else math.inf
        if largest == math.inf:
            raise UnsupportedError(
                f"{name}: rounded to {tensor.scheme}, some of its weights are beyond what the model's dtype holds "
                f"({bounds(dtype)}), and would be infinite or no numbers; leave it dense with an override "
                "(scheme: none)"
            )
    if not largest and bool(weight().any()):
        # Numbers of 8 bits are what they are in every format; powers of two reach down to 2⁻¹²⁷.
        own = tensor.scheme.number.scales is not None
        other = (
            "a scheme whose scales are powers of two (mxfp4)" if own else "compressed-tensors with scales in float32"
        )
        raise UnsupportedError(
            f"{name}: its weights are so small that {tensor.scheme} makes all of them zero; leave it dense with an "
            f"override (scheme: none), or take {other}"
        )


def _most(tensor: QuantizedTensor) -> float:
    """A bound of the magnitudes of all values, which is not finite where a scale is not."""
    level = max(map(abs, tensor.scheme.number.limits))
    if tensor.zero is not None:
        level += float(tensor.zero.abs().max())
    added = 0.0 if tensor.offset is None else float(tensor.offset.abs().max())
    return level * float(tensor.factors.abs().max()) + added


def coarse_share(tensor: QuantizedTensor, weight: Callable[[], torch.Tensor]) -> float | None:
    """How much of a weight has lost digits below the one float32 scale that all of it lies under.

    That scale is set by the largest weight. What lies 2¹⁵ times below it is among E4M3's subnormal numbers, whose steps
    no longer shrink with the value: of NVFP4 the scales of groups, of E4M3 with a scale for the tensor the weights.
    From about a half on, the error of all the others is above what the number has otherwise.

    Args:
        tensor: what was chosen for it.
        weight: gives the weights, ``[rows, columns]``; asked for where some of it is zero, which loses nothing.

    Returns:
        the share of groups, or of weights; None of numbers whose scales are not below one of the whole tensor.
    """
    scales = tensor.scheme.number.scales
    by_group = scales is not None and scales.shared
    if not by_group and (tensor.scheme.rows is not None or tensor.codes.dtype != torch.float8_e4m3fn):
        return None
    stored = tensor.scale.to(torch.float8_e4m3fn) if by_group else tensor.codes
    slices = list(row_slices(tuple(stored.shape), _WEIGHTS_AT_ONCE))
    small = sum(int(_subnormal(stored[part]).sum()) for part in slices)
    if small < _FEW * stored.numel():
        return small / stored.numel()
    values, nothing = weight(), 0
    for part in slices:
        empty = values[part].to(stored.device) == 0
        empty = empty.unflatten(1, (stored.shape[1], -1)).all(-1) if by_group else empty
        nothing += int(empty.sum())
        small -= int((empty & _subnormal(stored[part])).sum())
    return small / max(stored.numel() - nothing, 1)


def _subnormal(stored: torch.Tensor) -> torch.Tensor:
    """Which E4M3 numbers lie below the normal ones; zeros do."""
    return (stored.view(torch.uint8) & _MAGNITUDE) < _NORMAL


def half_scales(name: str, tensor: QuantizedTensor) -> torch.Tensor:
    """The scales of a weight in float16, ``[rows, groups]``.

    Raises:
        UnsupportedError: see :func:`check_held`.
    """

    def squares() -> torch.Tensor:
        grouped = tensor.scheme.number.values(tensor.codes).reshape(*tensor.scale.shape, -1).double()
        if tensor.zero is not None:
            grouped -= tensor.zero.unsqueeze(-1)
        return grouped.mul_(tensor.scale.unsqueeze(-1)).square_().sum(-1)

    check_held(name, tensor.scale, torch.float16, squares)
    return tensor.scale.to(torch.float16)


def half_scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where scales are stored in float16: in which dtype to choose them, for a model in ``dtype``.

    A runtime that computes in bfloat16 rounds the scales it reads to that. Scales chosen in bfloat16 are not changed by
    this, and float16 holds them as they are from 2⁻¹⁷ up; below, they move by at most 2⁻²⁵.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
