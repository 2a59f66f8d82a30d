"""Memory of a training, stated before it starts; what does not fit is refused."""

from __future__ import annotations

import torch

from llmconvert.context import Context
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.errors import CapacityError
from llmconvert.memory import available_nbytes
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.training.loss import prediction_nbytes

__all__ = ["backward_nbytes", "fits", "require_memory"]

# What one token leaves for the backward pass, in copies of the block's widths.
_HIDDEN_COPIES, _INNER_COPIES = 12, 4
# What norms compute in float32 and give back, in copies of the hidden state: where all else has 16 bits, holes stay
# between what is kept.
_HOLES = 4
_USABLE = 0.9


def backward_nbytes(checkpoint: Checkpoint, length: int, dtype: torch.dtype) -> int:
    """Bytes of activations that a window of ``length`` tokens leaves for its backward pass, of both models' hidden
    states after every block, and of its predictions' loss."""
    model = Architecture.of(checkpoint.config)
    widths = (_HIDDEN_COPIES + 2) * model.hidden_size + _INNER_COPIES * model.inner_size
    holes = _HOLES * model.hidden_size * torch.float32.itemsize if dtype.itemsize < torch.float32.itemsize else 0
    graph = length * model.layers * (widths * dtype.itemsize + holes)
    return graph + prediction_nbytes(length, model.vocab_size, dtype)


def fits(needed: int, context: Context) -> bool:
    """Whether the context allows so many bytes, or else nine tenths of what is free."""
    free = context.memory if context.memory is not None else _USABLE * available_nbytes(context.device)
    return needed <= free


def require_memory(needed: int, who: str, parts: str, advice: str, context: Context) -> None:
    """Refuse a training that does not fit.

    Args:
        needed: bytes.
        who: needs them, for the error.
        parts: what they are for.
        advice: what to do instead.

    Raises:
        CapacityError: more than the context allows, or than is free.
    """
    free = context.memory if context.memory is not None else available_nbytes(context.device)
    words = "may be used" if context.memory is not None else "are free"
    if not fits(needed, context):
        raise CapacityError(
            f"{who} needs about {needed / 1e6:,.0f} MB ({parts}), {free / 1e6:,.0f} MB {words}; {advice}"
        )
