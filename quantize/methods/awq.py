"""AWQ (Lin et al. 2023, arXiv 2306.00978): salient input channels are scaled up before rounding, their producers down.

For linears ``W`` with inputs ``X``, a grid of scales ``s = aᵅ`` is tried, ``a`` being the mean magnitude of each input
channel, and the one with the least ``‖(Q(W s) / s − W) X‖²`` wins. All that this needs to know of ``X`` is its second
moment ``H``: with ``Δ`` for the weight's error, the loss is ``tr(Δ H Δᵀ)`` exactly, and no forward pass is run in the
search. Like AutoAWQ, scales also take account of how much of their group's range the weights of a channel use.

The scaled weights are then rounded with group scales of least error, weighted by the scaled inputs (the paper's
clipping), or handed to GPTQ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from llmconvert.errors import UnsupportedError
from llmconvert.memory import row_slices, rows_at_once
from llmconvert.quantize.methods.base import Calibration, Numbers, ScaledEdge, Target
from llmconvert.quantize.methods.nearest import Finish, Finishing
from llmconvert.quantize.methods.rescale import share_by_channel
from llmconvert.quantize.methods.rtn import round_full_range
from llmconvert.quantize.solve.hessian import quadratic_form

__all__ = ["Awq"]

_SMALLEST = 1e-4
# Rows are rounded in slices of about this many weights, for the sake of the float32 copies.
_WEIGHTS_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class Awq(Finishing):
    """The method and its settings.

    Attributes:
        grid: how many exponents are tried, from 0 up to but not 1.
        weights: divide by the weights' share of their groups' range, to the power ``1 − α``; ``both`` tries either way.
        then: how the scaled weights are quantized: the ``nearest`` codes, or ``gptq``.
    """

    grid: int = 20
    weights: bool | Literal["both"] = True
    then: Finish = "nearest"

    calibration: ClassVar[Calibration] = "inputs"
    original: ClassVar[bool] = False
    numbers: ClassVar[Numbers] = "solved"
    moments: ClassVar[bool] = True
    sample_tokens: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.weights not in (True, False, "both") or self.then not in ("nearest", "gptq") or self.grid < 1:
            raise UnsupportedError(
                f"awq: found {self}; weights is true, false or both, then is nearest or gptq, and grid is at least 1"
            )

    def scales(self, edge: ScaledEdge, scale_dtype: torch.dtype) -> torch.Tensor:
        assert edge.hessian is not None
        candidates = [torch.ones_like(edge.mean), *self.candidates(edge)]
        losses = [0.0] * len(candidates)
        for target in edge.targets:
            for number, candidate in enumerate(candidates):
                losses[number] += _loss(target, candidate, edge.hessian.matrix, scale_dtype)
        return candidates[min(range(len(candidates)), key=losses.__getitem__)]

    def scales_nbytes(self, rows: int, columns: int) -> int:
        """A slice of rows: weights, scaled weights, quotients and codes in float32, and the error's product with H."""
        at_once = rows_at_once(rows, columns, _WEIGHTS_AT_ONCE) * columns
        return at_once * 4 * 6

    def candidates(self, edge: ScaledEdge) -> Iterator[torch.Tensor]:
        """The scales to try beside none, float32 ``[columns]``."""
        inputs = share_by_channel(edge.mean, edge.channels, "mean")
        used = share_by_channel(_used_range(edge.targets, edge.mean), edge.channels, "mean")
        for weigh in (False, True) if self.weights == "both" else (self.weights,):
            for step in range(self.grid):
                exponent = step / self.grid
                scale = inputs.pow(exponent)
                if weigh:
                    scale = scale / (used.pow(1 - exponent) + _SMALLEST)
                scale = scale.clamp(min=_SMALLEST)
                scale = scale / (scale.max() * scale.min()).sqrt()
                yield scale.log2().round_().exp2_() if edge.binary else scale


def _loss(target: Target, scale: torch.Tensor, hessian: torch.Tensor, scale_dtype: torch.dtype) -> float:
    """Squared output error per token of a weight rounded under a scale, over its groups' full range."""
    loss = 0.0
    for part in row_slices(target.weight.shape, _WEIGHTS_AT_ONCE):
        weight = target.weight[part].float()
        scaled = weight * scale
        scheme = target.scheme.unnested
        rounded = round_full_range(Target(target.name, scaled, scheme), scale_dtype).dequantize(torch.float32)
        loss += quadratic_form(rounded.div_(scale).sub_(weight), hessian)
    return loss


def _used_range(targets: Iterable[Target], like: torch.Tensor) -> torch.Tensor:
    """Mean over all rows of each weight's share of the largest one in its group, float32 ``[columns]``."""
    columns, count = len(like), 0
    total = torch.zeros_like(like)
    for target in targets:
        count += len(target.weight)
        for rows in row_slices(target.weight.shape, _WEIGHTS_AT_ONCE):
            part = target.weight[rows].float().abs()
            grouped = part.reshape(len(part), target.scheme.groups(columns), -1)
            total += (grouped / (grouped.amax(-1, keepdim=True) + 1e-6)).reshape(part.shape).sum(0)
    return total / count
