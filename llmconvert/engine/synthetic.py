"""Random weights in a checkpoint's shapes, for what an architecture computes whatever its weights."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from llmconvert.engine.architecture.config import with_size
from llmconvert.engine.skeleton import Skeleton
from llmconvert.storage.checkpoint import Checkpoint, CheckpointView

__all__ = ["SyntheticCheckpoint", "shallow"]

_VOCABULARY = 64


class SyntheticCheckpoint(CheckpointView):
    """Random weights under the names of ``base``, made so that nothing in a forward pass is zero or huge.

    Vectors are multiples of 1/64 (biases of 1/1024) up to a half: one plus them, times a small power of two, minus
    one, is exact in every dtype. Matrices outside the blocks have equal rows, which take the memory of one.

    Args:
        skeleton: whose checkpoint it stands for.
        base: the names, shapes and config to use instead of that checkpoint's; its rows all differ.
    """

    def __init__(self, skeleton: Skeleton, base: Checkpoint | None = None) -> None:
        super().__init__(skeleton.checkpoint if base is None else base)
        self._alike = _outside(skeleton) if base is None else frozenset()

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        info = self.infos[name]
        if not info.dtype.is_floating_point:
            return super().read_rows(name, start, stop)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if len(info.shape) < 2:
            value = torch.randint(1, 33, info.shape, generator=generator) / 64
            value *= 2 * torch.randint(2, info.shape, generator=generator) - 1
            if name.endswith("bias"):
                value /= 16  # so that none decides alone on which side of a ReLU its channel is
        elif name in self._alike:
            value = torch.randn(info.shape[1:], generator=generator).to(info.dtype)
            return value.expand((stop - start, *info.shape[1:]))
        else:
            value = torch.randn(info.shape, generator=generator).div_(math.sqrt(info.shape[-1]))
        value = value.to(info.dtype)
        return value[start:stop] if info.shape else value


class _Shallow(CheckpointView):
    """Some of the tensors, fewer tokens."""

    def __init__(self, skeleton: Skeleton, names: set[str], config: Mapping[str, Any]) -> None:
        base = skeleton.checkpoint
        super().__init__(base)
        self.config = config
        vocabulary, outside = skeleton.architecture.vocab_size, _outside(skeleton)
        self.infos = {
            name: replace(info, shape=(_VOCABULARY, *info.shape[1:]))
            if name in outside and info.shape[0] == vocabulary
            else info
            for name, info in base.infos.items()
            if name in names
        }


def shallow(skeleton: Skeleton, blocks: int) -> Checkpoint:
    """The first ``blocks`` of a model with a small vocabulary, under its names, to be filled with random weights.

    Only good for :class:`SyntheticCheckpoint`.
    """
    config, depth = skeleton.checkpoint.config, skeleton.block_count
    kept = {
        stored
        for name, stored in skeleton.names.items()
        if not any(name.startswith(skeleton.prefix(index)) for index in range(blocks, depth))
    }
    return _Shallow(skeleton, kept, with_size(config, depth, layers=blocks, vocabulary=_VOCABULARY))


def _outside(skeleton: Skeleton) -> frozenset[str]:
    """Matrices outside the blocks, by their names in the checkpoint."""
    infos = skeleton.checkpoint.infos
    names = (stored for name, stored in skeleton.names.items() if not skeleton.holds(name))
    return frozenset(name for name in names if len(infos[name].shape) == 2)
