"""Importance matrix (llama.cpp's ``llama-imatrix``): GGML blocks whose errors are weighted by the mean squared inputs.

An error in a weight changes the output by the error times the input, so the mean squared error of an output is
``Σ importance · error²`` as far as inputs are uncorrelated, where importance is the mean square of a column's inputs:
the diagonal of the linear's Hessian. llama.cpp calls the whole an importance matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from llmconvert.engine.discovery import discover
from llmconvert.engine.memory import choose_mode
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.stream import Stream
from llmconvert.errors import CalibrationError
from llmconvert.gguf.ggml.blocks import Codec
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.methods.base import Calibration, Numbers
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["Imatrix", "collect_importance"]


@dataclass(frozen=True, slots=True)
class Imatrix:
    """The method; it has no settings."""

    calibration: ClassVar[Calibration] = "squares"
    original: ClassVar[bool] = False
    numbers: ClassVar[Numbers] = "none"

    def encode(self, codec: Codec, rows: torch.Tensor, squares: torch.Tensor | None) -> torch.Tensor:
        """As :class:`~llmconvert.quantize.methods.base.GgmlQuantizer` says."""
        return torch.from_numpy(codec.encode(rows.numpy(), None if squares is None else squares.numpy()))


def collect_importance(
    source: Checkpoint,
    windows: Sequence[torch.Tensor],
    *,
    device: torch.device | None = None,
    memory_budget: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, torch.Tensor]:
    """Mean squares of the inputs of every linear in the decoder blocks, which all have their original weights.

    One forward pass, in the memory of one block.

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
                        importance[skeleton.sites[name].tensor] = mean
                task.advance()
    finally:
        stream.close()
    return importance
