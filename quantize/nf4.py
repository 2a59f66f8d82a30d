"""NF4 with double quantization, as QLoRA (Dettmers et al. 2023, arXiv 2305.14314) has it, bit for bit as bitsandbytes.

A group's scale is its largest magnitude. With double quantization the scales, less their mean, are quantized in turn:
256 at a time to 8-bit dynamic floats (Dettmers 2016, arXiv 1511.04561).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from llmconvert.errors import CheckpointError
from llmconvert.quantize.codes import nearest_codes
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import NestedScales, QuantizedTensor

__all__ = ["NESTED_GROUP", "dynamic_levels", "nest_scales", "round_to_nf4", "unnest_scales"]

#: Scales that share a scale of their own.
NESTED_GROUP = 256
# bitsandbytes divides by no less.
_SMALLEST = 1e-38
_EXPONENTS = 7
_STEPS = 65_535


def round_to_nf4(name: str, weight: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    """The nearest level of every weight; scales are float32.

    Args:
        name: of the weight, for errors.
        weight: ``[rows, columns]``, float32.
        scheme: of kind nf4.

    Raises:
        CheckpointError: the weight has values that are not finite.
    """
    rows, columns = weight.shape
    grouped = weight.float().reshape(rows, scheme.groups(columns), -1)
    scale = grouped.abs().amax(-1)
    if not torch.isfinite(scale).all():
        raise CheckpointError(f"tensor {name!r} has values that are not finite; the checkpoint is damaged")
    codes = nearest_codes((grouped * (1.0 / scale.clamp(min=_SMALLEST)).unsqueeze(-1)).clamp_(-1, 1), scheme)
    tensor = QuantizedTensor(codes.reshape(rows, columns), scale, None, replace(scheme, nested=False))
    if not scheme.nested:
        return tensor
    nested = nest_scales(scale)
    return QuantizedTensor(tensor.codes, unnest_scales(nested).view(scale.shape), None, scheme, nested)


def nest_scales(scale: torch.Tensor) -> NestedScales:
    """Quantize scales.

    Args:
        scale: float32, of any shape; flattened.
    """
    offset = scale.mean()
    centred = (scale - offset).reshape(-1)
    padded = torch.nn.functional.pad(centred, (0, -len(centred) % NESTED_GROUP)).view(-1, NESTED_GROUP)
    absmax = padded.abs().amax(-1)
    levels = dynamic_levels(scale.device)
    values = padded * (1.0 / absmax.clamp(min=_SMALLEST)).unsqueeze(-1)
    # bitsandbytes looks levels up in a table of 2¹⁶ steps; what lies next to a middle falls where its step does.
    values = torch.floor((values + 1) * 0.5 * _STEPS + 0.5) / _STEPS * 2 - 1
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(values, middles).where(absmax.unsqueeze(-1) > 0, 0).to(torch.uint8)
    return NestedScales(codes.view(-1)[: len(centred)].contiguous(), absmax, offset)


def unnest_scales(nested: NestedScales) -> torch.Tensor:
    """The scales that were quantized, float32 ``[rows · groups]``."""
    values = dynamic_levels(nested.codes.device)[nested.codes.int()]
    return values * nested.absmax.repeat_interleave(NESTED_GROUP)[: len(values)] + nested.offset


def dynamic_levels(device: torch.device | None = None) -> torch.Tensor:
    """The 256 values of 8-bit dynamic floats, ascending, float32; the smaller one is, the fewer bits it has."""
    positive: list[float] = []
    for exponent in range(_EXPONENTS):
        edges = torch.linspace(0.1, 1, (1 << exponent) + 1, dtype=torch.float32)
        positive += ((10 ** (exponent - _EXPONENTS + 1)) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
    values = sorted([*positive, *(-value for value in positive), 0.0, 1.0])
    return torch.tensor(values, dtype=torch.float32, device=device)
