"""Range search for scales and zero points: per group of columns, least weighted squared error, before any rounding.

Each group's range (its extreme values) is shrunk in steps; the candidate with the least
``Σ_j h_j (w_j - ŵ_j)²`` wins, where ``h`` is the diagonal of the Hessian: columns whose inputs are large count more.
Scales are rounded to the dtype they are stored in before they are compared, so what is chosen is what is written.
"""

from __future__ import annotations

import torch

from llmconvert.compute.rows import over_rows
from llmconvert.compute.scale_numbers import E8M0
from llmconvert.errors import CheckpointError
from llmconvert.quantize.narrow import check_held
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve.affine import affine_range, affine_scales, is_affine
from llmconvert.quantize.solve.group_scales import GroupScales, block_scales

__all__ = ["full_range_scales", "search_scales"]

# Candidates hold several floats per weight group; this bounds their memory.
_ROWS_AT_ONCE = 4096
_SMALLEST_E4M3 = 2.0**-9


def full_range_scales(
    name: str, weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, *, divisor: torch.Tensor | None = None
) -> GroupScales:
    """Scales that cover each group's extreme values; what :func:`search_scales` starts from.

    Args:
        name: of the weight, for errors.
        weight: ``[rows, columns]``, float32 or float64.
        scheme: bits, grouping, symmetry.
        scale_dtype: what scales are stored as.
        divisor: of all scales, for numbers that have one.

    Raises:
        CheckpointError: the weight has values that are not finite.
        UnsupportedError: they are so small that ``scale_dtype`` holds no scales for them.
    """
    extremes = affine_range if is_affine(scheme) else _group_range
    low, high = extremes(name, weight, scheme, scale_dtype)
    one = torch.ones(1, dtype=weight.dtype, device=weight.device)
    scale, zero = _candidates(low, high, one, scheme, scale_dtype, divisor)
    stored = scale[..., 0].to(_stored_dtype(scheme, scale_dtype)).contiguous()
    offset = low.to(scale_dtype) if scheme.number.minima else None
    zeros = None if scheme.symmetric else zero[..., 0].to(torch.int8).contiguous()
    return GroupScales(stored, zeros, offset, divisor=divisor)


def search_scales(
    name: str,
    weight: torch.Tensor,
    importance: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    *,
    steps: int = 26,
    narrowest: float = 0.5,
    stride: int = 1,
    divisor: torch.Tensor | None = None,
) -> GroupScales:
    """Scales with the least weighted error among ``steps`` fractions of the full range, from 1 down to ``narrowest``.

    Numbers whose levels are finer below the largest (E2M1) are tried with scales beyond the full range too. Those of
    GGML's types have a search of their own (:func:`~.group_scales.block_scales`), which the type's own quantization of
    scales takes part in, and so have scales with biases (:func:`~.affine.affine_scales`).

    Args:
        name: of the weight, for errors.
        weight: ``[rows, columns]``, float32 or float64.
        importance: ``[columns]``, what a squared error in each column costs.
        scheme: bits, grouping, symmetry.
        scale_dtype: what scales are stored as.
        steps: how many fractions to try.
        narrowest: the smallest of them.
        stride: above one, only every so many fractions are tried, and then those around the best of them.
        divisor: of all scales, for numbers that have one.

    Raises:
        CheckpointError: the weight has values that are not finite.
        UnsupportedError: they are so small that ``scale_dtype`` holds no scales for them.
    """
    if scheme.block is not None:
        return block_scales(name, weight, importance, scheme)
    if is_affine(scheme):
        return affine_scales(
            name, weight, importance, scheme, scale_dtype, steps=steps, narrowest=narrowest, stride=stride
        )
    low, high = _group_range(name, weight, scheme, scale_dtype)
    rows, groups = low.shape
    ratios = _ratios(scheme, steps, narrowest, weight)
    grouped = weight.reshape(rows, groups, -1)
    weights = importance.to(weight).reshape(groups, -1).contiguous()
    scale = torch.empty((rows, groups), dtype=_stored_dtype(scheme, scale_dtype), device=weight.device)
    zero = None if scheme.symmetric else torch.empty((rows, groups), dtype=torch.int8, device=weight.device)
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        scales, zeros = _candidates(low[part], high[part], ratios, scheme, scale_dtype, divisor)
        factors = scales if divisor is None else scales / divisor
        best = _best(grouped[part], factors, zeros, weights, scheme, stride).unsqueeze(-1)
        scale[part] = scales.gather(-1, best).squeeze(-1).to(scale.dtype)
        if zero is not None:
            zero[part] = zeros.gather(-1, best).squeeze(-1).to(torch.int8)
    return GroupScales(scale, zero, divisor=divisor)


def _stored_dtype(scheme: Scheme, scale_dtype: torch.dtype) -> torch.dtype:
    """What chosen scales are held in."""
    return scale_dtype if scheme.number.scales is None else torch.float32


def _ratios(scheme: Scheme, steps: int, narrowest: float, like: torch.Tensor) -> torch.Tensor:
    """The fractions of a group's full range to try."""
    if scheme.number.scales is E8M0:
        # What covers the group is rounded up to a power of two; beside it there are those before and after.
        return like.new_tensor([1.0, 0.5, 2.0])
    return torch.linspace(scheme.number.widest, narrowest, steps, dtype=like.dtype, device=like.device)


def _group_range(
    name: str, weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest value of each group, zero included, each ``[rows, groups]``."""
    grouped = weight.reshape(weight.shape[0], scheme.groups(weight.shape[1]), -1)
    low, high = grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise CheckpointError(f"tensor {name!r} has values that are not finite; the checkpoint is damaged")
    span, steps = _span(low, high, scheme)
    check_held(name, span / steps, scale_dtype, lambda: grouped.double().square().sum(-1))
    return low, high


def _span(low: torch.Tensor, high: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, float]:
    """What a group's codes have to reach over, and how many steps of the scale that is."""
    number = scheme.number
    if number.symmetric and not number.minima:
        return torch.maximum(-low, high), number.largest
    code_min, code_max = number.limits
    return high - low, code_max - code_min


def _candidates(
    low: torch.Tensor,
    high: torch.Tensor,
    ratios: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    divisor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points ``[rows, groups, ratios]`` in the weight's dtype, scales rounded to the stored dtype."""
    number = scheme.number
    code_min, code_max = number.limits
    span, steps = _span(low, high, scheme)
    scale = span.unsqueeze(-1) * ratios / steps
    scale = number.round_scale(scale if divisor is None else scale * divisor, scale_dtype).to(low.dtype)
    # A group of zeros, or one that is next to nothing and whose scale fades, needs some scale that is not zero.
    scale = torch.where(scale > 0, scale, 1.0 if divisor is None else _SMALLEST_E4M3)
    if scheme.symmetric:
        return scale.contiguous(), torch.zeros_like(scale)
    zero = code_min - torch.round(low.unsqueeze(-1) * ratios / scale)
    return scale.contiguous(), zero.clamp_(code_min, code_max).contiguous()


def _best(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    importance: torch.Tensor,
    scheme: Scheme,
    stride: int = 1,
) -> torch.Tensor:
    """Index of the best candidate of each group, int64 ``[rows, groups]``."""
    if weight.device.type == "cpu" and scheme.number.even:
        from llmconvert.quantize.solve.search_kernels import best_candidates

        rows, groups, _ = weight.shape
        best = torch.zeros((rows, groups), dtype=torch.int64)
        limits = scheme.number.limits
        over_rows(best_candidates, rows, weight.contiguous(), scales, zeros, best, importance, stride, *limits)
        return best
    parts = scheme.number.parts
    if weight.device.type == "cpu" and parts is not None:
        from llmconvert.quantize.solve.float_kernels import best_float_candidates

        rows, groups, _ = weight.shape
        best = torch.zeros((rows, groups), dtype=torch.int64)
        shape = parts.mantissa, parts.least, parts.largest
        over_rows(best_float_candidates, rows, weight.contiguous(), scales.contiguous(), best, importance, *shape)
        return best
    return _best_plain(weight, scales, zeros, importance, scheme, stride)


def _best_plain(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    importance: torch.Tensor,
    scheme: Scheme,
    stride: int = 1,
) -> torch.Tensor:
    """What the kernel does, in torch, for any device and any number."""
    number = scheme.number
    code_min, code_max = number.limits
    best = torch.zeros(weight.shape[:2], dtype=torch.int64, device=weight.device)
    least = torch.full(weight.shape[:2], torch.inf, dtype=weight.dtype, device=weight.device)
    last = scales.shape[-1] - 1

    def attempt(index: torch.Tensor) -> None:
        nonlocal best, least
        scale, zero = (values.gather(-1, index.unsqueeze(-1)) for values in (scales, zeros))
        if number.even:
            level = torch.clamp(torch.round(weight / scale), code_min - zero, code_max - zero)
        else:
            level = number.values(number.nearest(weight / scale)).to(weight.dtype)
        loss = (importance * (weight - level * scale).square()).sum(-1)
        best = torch.where(loss < least, index, best)
        least = torch.minimum(loss, least)

    for coarse in range(0, last + 1, stride):
        attempt(torch.full_like(best, coarse))
    centre = best
    for offset in (*range(1 - stride, 0), *range(1, stride)):
        attempt((centre + offset).clamp_(0, last))
    return best
