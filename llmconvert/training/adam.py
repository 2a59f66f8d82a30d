"""The direction of Adam's steps, for the optimizers of healing and of distillation."""

from __future__ import annotations

import torch

__all__ = ["adam_step", "corrections_of"]

_MEAN, _SQUARE = 0.9, 0.95
_TINY = 1e-12


def adam_step(
    gradient: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, corrections: tuple[float, float]
) -> torch.Tensor:
    """The direction of Adam (Kingma & Ba 2014, arXiv 1412.6980), about one in size.

    Args:
        gradient: float32.
        mean, square: running means, in any floating dtype, brought up to date.
        corrections: what these are divided by for having begun at zero.
    """
    first = torch.lerp(mean.float(), gradient, 1 - _MEAN)
    second = (square.float() * _SQUARE).addcmul_(gradient, gradient, value=1 - _SQUARE)
    mean.copy_(first)
    square.copy_(second)
    return first.div_(corrections[0]).div_(second.div_(corrections[1]).sqrt_().add_(_TINY))


def corrections_of(step: int) -> tuple[float, float]:
    """What running means are divided by at the ``step``-th step, the first being one."""
    return 1 - _MEAN**step, 1 - _SQUARE**step
