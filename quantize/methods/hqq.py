"""HQQ (Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog): half-quadratic quantization, without calibration.

Scales and zero points minimize ``Σ |w − ŵ|ᵖ`` with ``p < 1``, which lets a few outliers have large errors. The
half-quadratic split adds a variable ``e`` for the errors and alternates: ``e`` is the error shrunk towards zero (a
generalized soft threshold, which only large errors survive), and scale and zero point are fitted to ``w − e``.

As there, the search begins at scales that cover the whole range, and the threshold is in units of the weights, which
few errors survive. (In units of the scale more do: of two models tried so, one got worse, one slightly better.) HQQ's
own zero points are floats; most formats here hold integers or none, and zero points are rounded then. MLX's are floats
(its biases). The scale is fitted as well, in closed form for the codes at hand. Each group keeps the best pair that it
came by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from llmconvert.engine.statistics import Hessian
from llmconvert.memory import rows_at_once
from llmconvert.quantize.methods.base import Calibration, Numbers, Solution, Target
from llmconvert.quantize.methods.rtn import round_rows
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve.affine import fit_affine
from llmconvert.quantize.solve.group_scales import GroupScales
from llmconvert.quantize.solve.scales import full_range_scales
from llmconvert.quantize.solve.shared_scales import share_scales
from llmconvert.quantize.tensor import QuantizedTensor

__all__ = ["Hqq"]

# Rows are solved in slices of about this many weights, whose float32 copies stay in the cache.
_WEIGHTS_AT_ONCE = 1 << 18


@dataclass(frozen=True, slots=True)
class Hqq:
    """The method and its settings.

    Attributes:
        norm: the exponent ``p``, above 0 and at most 1.
        beta: inverse of the threshold: the larger, the fewer errors count as outliers.
        growth: of ``beta`` in each iteration.
        iterations: how many.
    """

    norm: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    iterations: int = 20

    calibration: ClassVar[Calibration] = "none"
    original: ClassVar[bool] = False
    numbers: ClassVar[Numbers] = "even"

    def quantize(
        self, targets: Sequence[Target], hessian: Hessian | None, scale_dtype: torch.dtype
    ) -> dict[str, Solution]:
        return {target.name: Solution(self._solve(target, scale_dtype)) for target in targets}

    def nbytes(self, rows: int, columns: int) -> int:
        """A slice of rows in float32: weights, codes, errors, their shrunk parts and temporaries; all codes twice."""
        at_once = rows_at_once(rows, columns, _WEIGHTS_AT_ONCE) * columns
        return at_once * 4 * 8 + rows * columns * 2

    def search(self, name: str, weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> GroupScales:
        """Scales and zero points of ``weight``, float32 ``[rows, columns]``.

        Raises:
            CheckpointError: the weight has values that are not finite.
        """
        start = full_range_scales(name, weight, scheme, scale_dtype)
        if start.offset is not None:
            return self._search_affine(weight, start, scheme)
        grouped = weight.reshape(*start.scale.shape, -1)
        scale = start.scale.float().unsqueeze(-1)
        zero = torch.zeros_like(scale) if start.zero is None else start.zero.float().unsqueeze(-1)
        best_scale, best_zero = scale.clone(), zero.clone()
        least = torch.full_like(scale, torch.inf)
        beta = self.beta
        for _ in range(self.iterations):
            level = scheme.number.nearest(grouped / scale, zero).float()
            error = grouped - (level - zero) * scale
            loss = error.abs().pow_(self.norm).sum(-1, keepdim=True)
            better = loss < least
            least = torch.where(better, loss, least)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
            fitted = grouped - self._shrink(error, beta)
            scale, zero = _fit(fitted, level, scale, zero, scheme)
            scale = scheme.number.round_scale(scale, scale_dtype).float()
            beta *= self.growth
        stored = best_scale.squeeze(-1).to(scale_dtype)
        return GroupScales(stored, None if scheme.symmetric else best_zero.squeeze(-1).to(torch.int8))

    def _search_affine(self, weight: torch.Tensor, start: GroupScales, scheme: Scheme) -> GroupScales:
        """The same where zero points are floats, as in the original; stored as what is added: scale and bias."""
        assert start.offset is not None
        stored = start.scale.dtype
        grouped = weight.reshape(*start.scale.shape, -1)
        scale, bias = start.scale.float().unsqueeze(-1), start.offset.float().unsqueeze(-1)
        best_scale, best_bias, least = scale.clone(), bias.clone(), torch.full_like(scale, torch.inf)
        beta = self.beta
        for _ in range(self.iterations):
            level = scheme.number.nearest((grouped - bias) / scale).float()
            error = grouped - (level * scale + bias)
            loss = error.abs().pow_(self.norm).sum(-1, keepdim=True)
            better = loss < least
            least = torch.where(better, loss, least)
            best_scale, best_bias = torch.where(better, scale, best_scale), torch.where(better, bias, best_bias)
            scale, bias = fit_affine(grouped - self._shrink(error, beta), level, scale, stored)
            beta *= self.growth
        return GroupScales(best_scale.squeeze(-1).to(stored), None, best_bias.squeeze(-1).to(stored))

    def _shrink(self, error: torch.Tensor, beta: float) -> torch.Tensor:
        """The generalized soft threshold, ``sign(x) max(0, |x| − |x|ᵖ⁻¹ / β)``."""
        size = error.abs()
        # A small positive number instead of zero: the power is negative.
        threshold = size.clamp_min(1e-8).pow(self.norm - 1).div_(beta)
        return size.sub_(threshold).clamp_(min=0).mul_(error.sign())

    def _solve(self, target: Target, scale_dtype: torch.dtype) -> QuantizedTensor:
        def choose(weight: torch.Tensor, _: torch.Tensor | None) -> GroupScales:
            return self.search(target.name, weight, target.scheme, scale_dtype)

        shared = share_scales({target.name: target.weight}, target.scheme, scale_dtype)
        return round_rows(target, choose, _WEIGHTS_AT_ONCE, shared)


def _fit(
    fitted: torch.Tensor, level: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero point, then scale, that bring ``(level − zero) · scale`` nearest to ``fitted`` in least squares.

    Groups for which there is no positive scale keep theirs.
    """
    if not scheme.symmetric:
        zero = (level - fitted / scale).mean(-1, keepdim=True).round_().clamp_(*scheme.number.limits)
    steps = level - zero
    energy = steps.square().sum(-1, keepdim=True)
    found = (steps * fitted).sum(-1, keepdim=True) / energy
    return torch.where((energy > 0) & (found > 0), found, scale), zero
