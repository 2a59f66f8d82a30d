"""What comes of a streamed model behind its last block: logits, or what the output head is given for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from llmconvert.compute.precision import Products
from llmconvert.engine.coroutine import stand_at_linear
from llmconvert.engine.discovery import discover
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.statistics import Arrival
from llmconvert.engine.stream import Stream
from llmconvert.progress import SILENT, Progress
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["head_inputs", "stream_logits"]


def stream_logits(
    checkpoint: Checkpoint,
    windows: Sequence[torch.Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    progress: Progress = SILENT,
    passed: Callable[[Skeleton], None] | None = None,
    products: Products = "exact",
) -> Iterator[torch.Tensor]:
    """The model's logits for each window, computed in the memory of one block.

    Args:
        checkpoint: dense weights.
        windows: token ids, each ``[1, length]``.
        device: where to compute.
        dtype: of weights and activations; the checkpoint's own by default.
        progress: one unit per block.
        passed: given the model once all windows have left its blocks and head, for what was counted on the way.
        products: how the model multiplies; ``"exact"`` ones take up to nine times as long as ``"wide"`` ones on
            processors without instructions for bfloat16.

    Yields:
        logits ``[1, length, vocabulary]`` per window, in order.

    Raises:
        UnsupportedError: the engine cannot run this architecture.
        CalibrationError: a hidden state is not finite.
    """
    skeleton = Skeleton(checkpoint, device, dtype, products=products)
    plans = discover(skeleton, max(window.shape[1] for window in windows))
    stream = Stream(skeleton, windows, plans, mode="replay", head=True)
    try:
        with progress.task("Evaluating", skeleton.block_count) as task:
            for _ in stream.blocks():
                task.advance()
        yield from stream.logits()
        if passed is not None:
            passed(skeleton)
    finally:
        stream.close()


def head_inputs(stream: Stream) -> Iterator[Arrival]:
    """What each batch brings to the output head, ``[tokens, width]``, when the last of ``stream.blocks()`` is current.

    Nothing else can be asked of the stream then; the head itself need not be loaded.
    """
    head = stream.skeleton.model.get_output_embeddings()
    assert head is not None
    hook = head.register_forward_pre_hook(stand_at_linear)
    try:
        for coroutine in stream.departures(stream.skeleton.block_count - 1):
            value = coroutine.run_to_head(head)
            if value is not None:
                yield Arrival(value.flatten(0, -2))
    finally:
        hook.remove()
