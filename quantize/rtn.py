"""Round to nearest: every weight to the closest level of its group, no calibration.

Scales cover each group's full range, or minimize its squared error when ``search`` is asked for.
"""

from __future__ import annotations

import torch

from llmconvert.quantize.scales import GroupScales, full_range_scales, search_scales
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor

__all__ = ["quantize_rtn", "round_to_codes"]


def quantize_rtn(
    name: str, weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, *, search: bool = False
) -> QuantizedTensor:
    """Quantize a weight ``[rows, columns]`` without statistics.

    Args:
        name: for errors.
        weight: any floating dtype; computed in float32.
        scheme: bits, grouping, symmetry.
        scale_dtype: what scales are stored as.
        search: choose each group's scale by least squared error instead of covering its full range.

    Raises:
        CheckpointError: the weight has values that are not finite.
    """
    work = weight.float()
    if search:
        scales = search_scales(name, work, torch.ones(work.shape[1], device=work.device), scheme, scale_dtype)
    else:
        scales = full_range_scales(name, work, scheme, scale_dtype)
    return round_to_codes(work, scales, scheme)


def round_to_codes(weight: torch.Tensor, scales: GroupScales, scheme: Scheme) -> QuantizedTensor:
    """The nearest code of every weight, for given scales."""
    rows, columns = weight.shape
    grouped = weight.reshape(rows, scales.scale.shape[1], -1)
    codes = torch.round(grouped / scales.scale.unsqueeze(-1).to(weight.dtype))
    if scales.zero is not None:
        codes += scales.zero.unsqueeze(-1)
    codes = codes.clamp_(scheme.code_min, scheme.code_max).to(torch.int8)
    return QuantizedTensor(codes.reshape(rows, columns), scales.scale, scales.zero, scheme)
