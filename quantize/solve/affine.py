"""Search for scales and biases of affine groups, ``w = scale · code + bias``: both floats, rounded as they are stored.

Ranges that cover a smaller and smaller part of a group's values are tried. From each, codes are taken, and the scale
and bias that suit them best by weighted least squares: in turns, as in k-means on a line with evenly spaced means. The
scale is rounded to what it is stored in first and the bias then fitted to it and rounded, and what counts is the error
of the codes that are nearest under this pair. So rounding, which moves a bias in bfloat16 by up to a 32nd of a step in
4 bits and half a step in 8, takes part in the choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmconvert.compute.rows import over_rows
from llmconvert.errors import CheckpointError
from llmconvert.quantize.narrow import check_held
from llmconvert.quantize.numbers import AFFINE
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve.group_scales import GroupScales

__all__ = ["affine_range", "affine_scales", "fit_affine", "is_affine"]

# Turns of codes against scale and bias from the best range on.
_TURNS = 4


@dataclass(frozen=True, slots=True)
class _Groups:
    """Groups of a weight, and what an error in each column costs.

    Attributes:
        weight: ``[rows, groups, group size]``.
        importance: ``[groups, group size]``, non-negative; no group's is zero throughout.
        largest: code.
        stored: dtype of scales and biases.
    """

    weight: torch.Tensor
    importance: torch.Tensor
    largest: float
    stored: torch.dtype

    def sums(self, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """``[rows, groups, 4]``: the weighted squared error of the nearest codes ``q``, and the weighted sums of ``q``,
        ``q²`` and ``q w``."""
        if self.weight.device.type != "cpu":
            return self._sums_plain(scale, bias)
        from llmconvert.quantize.solve.search_kernels import affine_sums

        found = torch.empty((*scale.shape, 4), dtype=self.weight.dtype)
        over_rows(affine_sums, len(scale), self.weight, scale, bias, self.importance, found, self.largest)
        return found

    def _sums_plain(self, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """What the kernel does, in torch, for any device."""
        step, start = scale.unsqueeze(-1), bias.unsqueeze(-1)
        codes = ((self.weight - start) * (1 / step)).round_().clamp_(0, self.largest)
        errors = self.weight - (codes * step + start)
        parts = (errors.square(), codes, codes.square(), codes * self.weight)
        return torch.stack([(self.importance * part).sum(-1) for part in parts], -1)

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """As they are stored, in the weight's dtype."""
        return values.to(self.stored).to(values.dtype)

    def pair(self, scale: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A scale and bias as they are stored; a scale that rounds to nothing is one."""
        scale = self.rounded(scale)
        return scale.where(scale > 0, 1.0), self.rounded(bias)


def is_affine(scheme: Scheme) -> bool:
    """Whether groups have a scale and a bias that are floats of any sign; the minima of GGML's are at most zero."""
    return scheme.number.name == AFFINE.name


def affine_range(
    name: str, weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest value of each group, ``[rows, groups]`` both.

    Args:
        name: of the weight, for errors.
        weight: ``[rows, columns]``, float32 or float64.
        scheme: grouping and bits.
        scale_dtype: what scales and biases are stored as.

    Raises:
        CheckpointError: the weight has values that are not finite.
        UnsupportedError: they are so small, or so large, that ``scale_dtype`` holds no scales or biases for them.
    """
    grouped = weight.reshape(len(weight), scheme.groups(weight.shape[1]), -1)
    low, high = grouped.amin(-1), grouped.amax(-1)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise CheckpointError(f"tensor {name!r} has values that are not finite; the checkpoint is damaged")
    largest = scheme.number.limits[1]
    above = low.double().unsqueeze(-1)
    check_held(name, (high - low) / largest, scale_dtype, lambda: (grouped.double() - above).square().sum(-1))
    check_held(name, low, scale_dtype, lambda: grouped.double().square().sum(-1), what="biases")
    return low, high


def affine_scales(
    name: str,
    weight: torch.Tensor,
    importance: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    *,
    steps: int,
    narrowest: float,
    stride: int,
) -> GroupScales:
    """Scales and biases with the least weighted squared error that is found.

    Args:
        name, weight, scheme, scale_dtype: see :func:`affine_range`.
        importance: ``[columns]``, what a squared error in each column costs.
        steps, narrowest, stride: every ``stride``-th of ``steps`` parts of a group's range is tried, from 1 down to
            ``narrowest``.

    Raises:
        CheckpointError, UnsupportedError: see :func:`affine_range`.
    """
    low, high = affine_range(name, weight, scheme, scale_dtype)
    share = importance.to(weight).reshape(low.shape[1], -1)
    # Where no input was ever seen, all columns are alike.
    share = share.where(share.sum(-1, keepdim=True) > 0, 1.0).contiguous()
    groups = _Groups(weight.reshape(*low.shape, -1).contiguous(), share, scheme.number.limits[1], scale_dtype)
    best_scale, best_bias = groups.pair((high - low) / groups.largest, low)
    least = torch.full_like(low, torch.inf)

    def attempt(scale: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep a pair where it is better; gives the one that suits its codes."""
        nonlocal best_scale, best_bias, least
        sums = groups.sums(scale, bias)
        better = sums[..., 0] < least
        best_scale, best_bias = scale.where(better, best_scale), bias.where(better, best_bias)
        least = torch.minimum(sums[..., 0], least)
        return _fit(groups, sums, totals, scale)

    totals = torch.stack([share.sum(-1).expand_as(low), torch.einsum("rgc,gc->rg", groups.weight, share)], -1)
    for ratio in torch.linspace(1.0, narrowest, steps).tolist()[::stride]:
        fitted = attempt(*groups.pair((high - low) * (ratio / groups.largest), low * ratio))
        attempt(*fitted)
    for _ in range(_TURNS):
        fitted = attempt(best_scale, best_bias)
        if torch.equal(fitted[0], best_scale) and torch.equal(fitted[1], best_bias):
            break
        attempt(*fitted)
    return GroupScales(best_scale.to(scale_dtype), None, best_bias.to(scale_dtype))


def _fit(
    groups: _Groups, sums: torch.Tensor, totals: torch.Tensor, before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and bias that are best for codes by weighted least squares, as they are stored.

    Args:
        groups: the weight.
        sums: of the codes.
        totals: ``[rows, groups, 2]``, the importance in all, and the weighted sum of the weights.
        before: the scale that codes are of, which stays where all codes are alike.
    """
    (_, codes, squares, products), (weights, values) = sums.unbind(-1), totals.unbind(-1)
    spread = squares * weights - codes.square()
    scale = (products * weights - codes * values) / spread
    # In float32 the spread of codes that are all alike may come out as next to nothing instead of nothing.
    scale = groups.rounded(scale.where((spread > 1e-4 * squares * weights) & (scale > 0), before))
    scale = scale.where(scale > 0, before)
    return scale, groups.rounded((values - scale * codes) / weights)


def fit_affine(
    fitted: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, stored: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and bias that bring ``scale · codes + bias`` nearest to values in least squares, as they are stored.

    Args:
        fitted: ``[rows, groups, group size]``, float32.
        codes: of that shape and dtype.
        scale: ``[rows, groups, 1]``, which stays where all codes are alike or no positive one is found.
        stored: dtype.
    """
    centred = codes - codes.mean(-1, keepdim=True)
    energy = centred.square().sum(-1, keepdim=True)
    found = ((centred * fitted).sum(-1, keepdim=True) / energy).to(stored).float()
    scale = found.where((energy > 0) & (found > 0), scale)
    bias = (fitted - scale * codes).mean(-1, keepdim=True)
    return scale, bias.to(stored).float()
