"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): outliers of activations moved to the weights, for 8 bits in both.

A channel's inputs are divided, and its weights multiplied, by ``s = max|X|ᵅ / max|W|¹⁻ᵅ``. With ``α`` of one half both
then have the same largest magnitude, and a token's scale is no longer that of its one huge channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmconvert.errors import UnsupportedError
from llmconvert.quantize.base import Calibration, ScaledEdge
from llmconvert.quantize.finish import Finish, Finishing
from llmconvert.quantize.rescale import share_by_channel
from llmconvert.quantize.scheme import Kind

__all__ = ["SmoothQuant"]

_SMALLEST = 1e-5


@dataclass(frozen=True, slots=True)
class SmoothQuant(Finishing):
    """The method and its settings.

    Attributes:
        strength: ``α``, 0 to 1: how much of the range of activations goes to the weights.
        then: how the scaled weights are quantized: the ``nearest`` codes, or ``gptq``.
    """

    strength: float = 0.5
    then: Finish = "nearest"

    calibration: ClassVar[Calibration] = "inputs"
    original: ClassVar[bool] = False
    kinds: ClassVar[frozenset[Kind]] = frozenset({"int"})
    moments: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1 or self.then not in ("nearest", "gptq"):
            raise UnsupportedError(f"smoothquant: found {self}; strength is 0 to 1, then is nearest or gptq")

    def scales(self, edge: ScaledEdge, scale_dtype: torch.dtype) -> torch.Tensor:
        weights = torch.stack([target.weight.abs().amax(0) for target in edge.targets]).amax(0).float()
        weights = share_by_channel(weights, edge.channels, "amax").clamp(min=_SMALLEST)
        inputs = share_by_channel(edge.largest, edge.channels, "amax")
        scale = inputs.pow(self.strength) / weights.pow(1 - self.strength)
        # Where nothing ever comes in, nothing has to be moved.
        return torch.where(inputs > 0, scale.clamp(min=_SMALLEST), 1.0)

    def scales_nbytes(self, rows: int, columns: int) -> int:
        """The magnitudes of one weight."""
        return rows * columns * 4
