"""What becomes of numbers in a narrower floating dtype: beyond its range they are infinite, below it they fade to zero.

float16 reaches from 65,504 down to 2⁻²⁴, in steps of 2⁻²⁴ below 2⁻¹⁴. A model has single numbers below that as a matter
of course, and none of them matters; a tensor most of which lies there vanishes. So what is lost is weighed: a tensor
keeps its meaning while no more than a hundredth of its norm is gone.
"""

from __future__ import annotations

import torch

__all__ = ["FADED", "LOST", "bounds", "unheld"]

#: Relative error from which on a number counts as lost: it lies among the last few steps above zero, or beyond.
FADED = 0.125
#: Share of a tensor's norm that may be lost.
LOST = 0.01


def unheld(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Which finite values other than zero ``dtype`` does not hold, to within :data:`FADED`; bool of the same shape."""
    wide = values if values.dtype == torch.float64 else values.float()
    return (wide.to(dtype).to(wide.dtype) - wide).abs() > FADED * wide.abs()


def bounds(dtype: torch.dtype) -> str:
    """The range of a dtype in words, for errors."""
    limits = torch.finfo(dtype)
    name = str(dtype).removeprefix("torch.")
    return f"{name} holds numbers from {limits.smallest_normal * limits.eps:.2g} to {limits.max:g}"
