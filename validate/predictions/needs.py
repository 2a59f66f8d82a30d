"""Memory of comparing a model with artifacts of it, known from shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from llmconvert.context import Context
from llmconvert.engine.discovery import discover
from llmconvert.engine.memory import BASE_NBYTES, MemoryEstimate, activation_nbytes, tokenizer_nbytes
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.states import STATES_IN_MEMORY_NBYTES
from llmconvert.errors import LlmconvertError
from llmconvert.needs import Needs
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.validate.predictions.perplexity import COMPARING_NBYTES

__all__ = ["comparing_needs"]


def comparing_needs(
    model: Checkpoint,
    lengths: Sequence[int],
    artifacts: int,
    context: Context,
    dtype: torch.dtype | None = None,
    build: Callable[..., Skeleton] = Skeleton,
) -> Needs:
    """What :func:`~llmconvert.validate.predictions.compared.compare_models` takes for an original and artifacts of it.

    Args:
        model: the original, or one like it; dense weights.
        lengths: tokens of each window of the text.
        artifacts: how many are compared in one pass; with none, the model is scored alone.
        context: device.
        dtype: what evaluation computes in.
        build: builds the model on shapes.
    """
    longest = max(lengths)
    try:
        skeleton = build(model, context.device, dtype, products="wide")
        plans = discover(skeleton, longest)
    except LlmconvertError:  # a broken artifact is for the measurements to tell
        return Needs(memory=BASE_NBYTES)
    models, beside = 1 + artifacts, min(artifacts, 1) + 1
    own = lengths[:: context.ranks.count]
    states = models * sum(own) * skeleton.hidden_size * skeleton.dtype.itemsize
    kept = min(states, beside * STATES_IN_MEMORY_NBYTES)
    # Of each model as it is read and as it is computed with; of more artifacts, blocks are there one after the other.
    blocks = 2 * max(skeleton.block_nbytes(index) for index in range(skeleton.block_count))
    inside = beside * blocks + activation_nbytes(plans, skeleton, own, "replay")
    # When the last block is left, the original's logits of a window wait for each artifact's, which are then compared.
    logits = longest * skeleton.architecture.vocab_size * skeleton.dtype.itemsize
    behind = (beside - 1) * logits + max(plans[-1].behind_nbytes, logits + COMPARING_NBYTES)
    behind += skeleton.product_nbytes(longest, head=True)
    parts = {
        "base": BASE_NBYTES,
        "tokenizer": tokenizer_nbytes(model),
        # Where an artifact's embeddings and head are the original's, they are so once both have been read.
        "embeddings and heads": models * skeleton.outer_nbytes(head=True),
        "two blocks": beside * blocks,
        "activations, or logits": max(inside, behind) - beside * blocks,
        "states": kept,
    }
    estimate = MemoryEstimate("replay", parts)
    return estimate.needs(context.device, disk=states - kept, passing=states - kept)
