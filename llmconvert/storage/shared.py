"""Views of checkpoints that share all tensors but a few, held in memory once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llmconvert.storage.checkpoint import Checkpoint, CheckpointView

__all__ = ["share_tensors"]


class _Shared(CheckpointView):
    """Tensors outside ``apart`` are read and cast once, and given to whoever asks."""

    def __init__(
        self, base: Checkpoint, kept: dict[str, torch.Tensor], apart: frozenset[str], placed: tuple[Any, ...]
    ) -> None:
        super().__init__(base)
        self._kept = kept
        self._apart = apart
        self._placed = placed

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._apart:
            return super().__getitem__(name)
        if name not in self._kept:
            tensor = super().__getitem__(name)
            device, dtype = self._placed
            self._kept[name] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        return self._kept[name]


def share_tensors(
    checkpoints: Sequence[Checkpoint], apart: frozenset[str], device: torch.device, dtype: torch.dtype | None
) -> list[Checkpoint]:
    """Views of checkpoints that are equal but for the tensors ``apart``; what is equal is held once.

    It is held on ``device`` in ``dtype``, its own if None.
    """
    kept: dict[str, torch.Tensor] = {}
    return [_Shared(checkpoint, kept, apart, (device, dtype)) for checkpoint in checkpoints]
