"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): activation outliers are migrated into the weights, for W8A8.

A channel's inputs are divided, and its weights multiplied, by ``s = max|X|ᵅ / max|W|¹⁻ᵅ``. With ``α`` of one half both
then have the same largest magnitude, and a token's scale is no longer that of its one huge channel.

How much should move differs from layer to layer. So ``α`` is searched for each edge: inputs at a sample of tokens, and
the weights, are rounded as a runtime would for each ``α`` of a grid, and the one whose products are nearest to the
exact ones is taken, or no scaling at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from llmconvert.compute.activations import quantize_input
from llmconvert.errors import UnsupportedError
from llmconvert.memory import row_slices, rows_at_once
from llmconvert.quantize.methods.base import Calibration, Numbers, ScaledEdge, Target
from llmconvert.quantize.methods.nearest import Finish, Finishing
from llmconvert.quantize.methods.rescale import share_by_channel
from llmconvert.quantize.methods.rtn import round_full_range

__all__ = ["SmoothQuant"]

_SMALLEST = 1e-5
# Strengths that are tried beside no scaling: 0, 0.05 … 1.
_GRID = 20
# Rows are tried in slices of about this many weights, for the sake of the float32 copies.
_WEIGHTS_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class SmoothQuant(Finishing):
    """The method and its settings.

    Attributes:
        strength: ``α``, 0 to 1: how much of the range of activations goes to the weights; or ``search`` it per edge.
        then: how the scaled weights are quantized: the ``nearest`` codes, or ``gptq``.
    """

    strength: float | Literal["search"] = "search"
    then: Finish = "nearest"

    calibration: ClassVar[Calibration] = "inputs"
    original: ClassVar[bool] = False
    numbers: ClassVar[Numbers] = "scaled"
    moments: ClassVar[bool] = False
    sample_tokens: ClassVar[int] = 1024

    def __post_init__(self) -> None:
        number = isinstance(self.strength, int | float) and 0 <= self.strength <= 1
        if not (number or self.strength == "search") or self.then not in ("nearest", "gptq"):
            raise UnsupportedError(f"smoothquant: found {self}; strength is 0 to 1 or search, then is nearest or gptq")

    def scales(self, edge: ScaledEdge, scale_dtype: torch.dtype) -> torch.Tensor:
        if self.strength != "search":
            return _smoothing(edge, self.strength)
        assert edge.sample is not None
        sample = edge.sample.float()
        candidates = [torch.ones_like(edge.largest), *(_smoothing(edge, step / _GRID) for step in range(_GRID + 1))]
        losses = torch.zeros(len(candidates), device=sample.device)
        for target in edge.targets:
            losses += _losses(target, sample, candidates, scale_dtype)
        return candidates[int(losses.argmin())]

    def scales_nbytes(self, rows: int, columns: int) -> int:
        """A slice of rows: weights, scaled, quotients, codes in float32; the sample as it is rounded; outputs twice."""
        height = rows_at_once(rows, columns, _WEIGHTS_AT_ONCE)
        tokens = 2 * self.sample_tokens
        return 4 * (height * columns * 6 + tokens * columns * 4 + tokens * height * 3) + rows * columns * 4


def _smoothing(edge: ScaledEdge, strength: float) -> torch.Tensor:
    """The paper's scales, float32 ``[columns]``."""
    weights = torch.stack([target.weight.abs().amax(0) for target in edge.targets]).amax(0).float()
    weights = share_by_channel(weights, edge.channels, "amax").clamp(min=_SMALLEST)
    inputs = share_by_channel(edge.largest, edge.channels, "amax")
    scale = inputs.pow(strength) / weights.pow(1 - strength)
    # Where nothing ever comes in, nothing has to be moved.
    return torch.where(inputs > 0, scale.clamp(min=_SMALLEST), 1.0)


def _losses(
    target: Target, sample: torch.Tensor, candidates: Sequence[torch.Tensor], scale_dtype: torch.dtype
) -> torch.Tensor:
    """Error of a linear's outputs under each candidate, inputs and weights rounded; ``[candidates]``.

    Squared, over tokens, relative to what the token gives; what gives less than most counts as much as the median, for
    it is added to a stream in which it is small.
    """
    errors = torch.zeros((len(candidates), len(sample)), device=sample.device)
    energy = torch.zeros(len(sample), device=sample.device)
    kind = target.scheme.input_kind
    for part in row_slices(target.weight.shape, _WEIGHTS_AT_ONCE):
        weight = target.weight[part].float()
        expected = sample @ weight.T
        energy += expected.square().sum(1)
        for candidate, error in zip(candidates, errors, strict=True):
            scaled = weight * candidate
            rounded = round_full_range(Target(target.name, scaled, target.scheme), scale_dtype)
            inputs = sample / candidate
            if kind is not None:
                if kind.calibrated:
                    kind = kind.at(kind.scale_for(float(inputs.abs().max()), sample.dtype))
                inputs = quantize_input(inputs, kind)
            error += torch.addmm(expected, inputs, rounded.dequantize(torch.float32).T, alpha=-1).square_().sum(1)
    return (errors / torch.maximum(energy, energy.median()).clamp_min(torch.finfo(torch.float32).tiny)).mean(1)
