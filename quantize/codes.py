"""Codes and the values they stand for, before any scale: integers, E4M3 floats, and the levels of NF4.

Sources: OCP 8-bit floating point (arXiv 2209.05433) for E4M3; QLoRA (Dettmers et al. 2023, arXiv 2305.14314) for NF4.
"""

from __future__ import annotations

import torch

from llmconvert.quantize.scheme import Scheme

__all__ = ["FP8", "NF4_LEVELS", "code_dtype", "code_values", "largest_value", "nearest_codes"]

#: Four exponent and three mantissa bits, no infinity, largest value 448.
FP8 = torch.float8_e4m3fn

#: The 16 values of NF4, quantiles of a normal distribution scaled to −1 … 1, as bitsandbytes has them.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def code_dtype(scheme: Scheme) -> torch.dtype:
    """What codes are held in."""
    return FP8 if scheme.kind == "fp8" else torch.int8


def largest_value(scheme: Scheme) -> float:
    """What the largest code of a scheme without zero points stands for, as a multiple of the scale.

    For integers half the range of all codes, −8 … 7 being 15 steps wide, as compressed-tensors has it.
    """
    if scheme.kind == "fp8":
        return torch.finfo(FP8).max
    if scheme.kind == "nf4":
        return NF4_LEVELS[-1]
    return (scheme.code_max - scheme.code_min) / 2


def nearest_codes(values: torch.Tensor, scheme: Scheme, zero: torch.Tensor | None = None) -> torch.Tensor:
    """The code next to each value.

    Args:
        values: weights over their scales, any floating dtype.
        scheme: of the codes.
        zero: what integer codes are moved by, broadcast to ``values``; None for none.

    Returns:
        codes of the same shape, in :func:`code_dtype`. Integers round half to even; between two levels of NF4 the
        lower one wins a tie.
    """
    if scheme.kind == "fp8":
        bound = torch.finfo(FP8).max
        return values.clamp(-bound, bound).to(FP8)
    if scheme.kind == "nf4":
        levels = torch.tensor(NF4_LEVELS, dtype=torch.float32, device=values.device)
        middles = (levels[1:] + levels[:-1]) / 2
        return torch.bucketize(values.float(), middles).to(torch.int8)
    codes = torch.round(values)
    if zero is not None:
        codes += zero
    return codes.clamp_(scheme.code_min, scheme.code_max).to(torch.int8)


def code_values(codes: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """What codes stand for as multiples of their scale, float32; zero points are not taken off."""
    if scheme.kind == "nf4":
        return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=codes.device)[codes.int()]
    return codes.float()
