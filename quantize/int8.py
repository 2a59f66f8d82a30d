"""LLM.int8 weights (Dettmers et al. 2022, arXiv 2208.07339), bit for bit as bitsandbytes: a row's absmax is 127.

bitsandbytes quantizes float16 values, so weights are rounded to that first. It multiplies by ``127 / largest``, where
round-to-nearest elsewhere divides by the scale: near ties that makes a difference.
"""

from __future__ import annotations

import torch

from llmconvert.errors import CheckpointError
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor

__all__ = ["round_to_int8"]


def round_to_int8(name: str, weight: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    """The nearest code of every weight; scales are float32, a 127th of each row's largest magnitude.

    Args:
        name: of the weight, for errors.
        weight: ``[rows, columns]``, any floating dtype.
        scheme: of kind absmax.

    Raises:
        CheckpointError: the weight has values that are not finite, or not in float16.
    """
    half = weight.to(torch.float16)
    largest = half.abs().amax(1, keepdim=True).float()
    if not torch.isfinite(largest).all():
        raise CheckpointError(
            f"tensor {name!r} has values that are not finite in float16, to which bitsandbytes rounds; "
            "the checkpoint is damaged, or take another scheme"
        )
    codes = torch.round(half * (127.0 / largest)).where(largest > 0, 0).to(torch.int8)
    # By a tensor: a GPU multiplies by the inverse of a number, which is off by a bit.
    return QuantizedTensor(codes, largest / largest.new_tensor(127.0), None, scheme)
