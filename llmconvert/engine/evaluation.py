"""Logits of a streamed model: one pass over all windows, in the memory of one block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from llmconvert.engine.discovery import discover
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.stream import Stream
from llmconvert.progress import SILENT, Progress
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["stream_logits"]


def stream_logits(
    checkpoint: Checkpoint,
    windows: Sequence[torch.Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    progress: Progress = SILENT,
) -> Iterator[torch.Tensor]:
    """The model's logits for each window, computed in the memory of one block.

    Args:
        checkpoint: dense weights.
        windows: token ids, each ``[1, length]``.
        device: where to compute.
        dtype: of weights and activations; the checkpoint's own by default.
        progress: one unit per block.

    Yields:
        logits ``[1, length, vocabulary]`` per window, in order.

    Raises:
        UnsupportedError: the engine cannot run this architecture.
        CalibrationError: a hidden state is not finite.
    """
    skeleton = Skeleton(checkpoint, device, dtype)
    plans = discover(skeleton, max(window.shape[1] for window in windows))
    stream = Stream(skeleton, windows, plans, mode="replay", head=True)
    try:
        with progress.task("Evaluating", skeleton.block_count) as task:
            for _ in stream.blocks():
                task.advance()
        yield from stream.logits()
    finally:
        stream.close()
