"""Importance of a linear's columns: the mean square of its inputs, which is the diagonal of its Hessian.

An error in a weight changes the output by the error times the input, so the mean squared error of an output is
``Σ importance · error²`` as far as inputs are uncorrelated. llama.cpp calls the whole an importance matrix.
One forward pass over the original weights, in the memory of one block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmconvert.engine.discovery import discover
from llmconvert.engine.memory import choose_mode
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.stream import Stream
from llmconvert.errors import CalibrationError
from llmconvert.progress import SILENT, Progress
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["collect_importance"]


def collect_importance(
    source: Checkpoint,
    windows: Sequence[torch.Tensor],
    *,
    device: torch.device | None = None,
    memory_budget: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, torch.Tensor]:
    """Mean squares of the inputs of every linear in the decoder blocks.

    Args:
        source: dense weights.
        windows: calibration token ids, each ``[1, length]``.
        device: where to compute, the CPU by default.
        memory_budget: bytes the process may use; what is free by default.
        progress: one unit per block.

    Returns:
        Checkpoint name of a weight → float32 ``[columns]``.

    Raises:
        CalibrationError: no text, or activations that are not finite.
        CapacityError: memory does not suffice.
    """
    if not windows:
        raise CalibrationError("an importance matrix needs calibration text and was given none")
    skeleton = Skeleton(source, device or torch.device("cpu"), fast_products=True)
    lengths = [window.shape[1] for window in windows]
    blocks = discover(skeleton, max(lengths))
    memory = choose_mode(skeleton, blocks, lengths, 0, memory_budget, None)
    importance: dict[str, torch.Tensor] = {}
    stream = Stream(skeleton, windows, blocks, mode=memory.mode)
    try:
        with progress.task("Measuring importance", skeleton.block_count) as task:
            for run in stream.blocks():
                for stop in run.plan.stops:
                    total, tokens = torch.zeros(stop.columns, dtype=torch.float64), 0
                    for rows in run.inputs(stop.linears[0]):
                        total += rows.float().square().sum(0, dtype=torch.float64).cpu()
                        tokens += len(rows)
                    mean = (total / max(tokens, 1)).float()
                    if not torch.isfinite(mean).all():
                        raise CalibrationError(f"{stop.linears[0]}: its calibration inputs are not finite")
                    for name in stop.linears:
                        importance[skeleton.names[f"{name}.weight"]] = mean
                task.advance()
    finally:
        stream.close()
    return importance
