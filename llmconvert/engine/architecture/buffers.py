"""Buffers that no checkpoint holds: computed by the model's own class, where it initializes weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmconvert.engine.architecture.boundary import WHOLE, foreign_settings
from llmconvert.errors import CheckpointError, UnsupportedError

__all__ = ["restore_buffers"]

# Tables of a million positions are smaller than this.
_LARGEST_BUFFER = 1 << 30


@dataclass(frozen=True, slots=True)
class _Blank:
    """Memory for a buffer that is still to be computed: NaN, or where a dtype has none, watched for being written."""

    tensor: torch.Tensor
    version: int

    @classmethod
    def like(cls, buffer: torch.Tensor, device: torch.device) -> _Blank:
        missing = math.nan if buffer.is_floating_point() or buffer.is_complex() else 0
        tensor = torch.full_like(buffer, missing, device=device)
        return cls(tensor, tensor._version)

    def is_left(self, found: torch.Tensor | None) -> bool:
        """Whether the module that has it holds ``found`` now, and so nothing was computed, or not all of it."""
        if found is None or found.numel() == 0:
            return False
        return bool(found.isnan().any()) or (found is self.tensor and found._version == self.version)


def restore_buffers(model: PreTrainedModel, device: torch.device, *, idle: Collection[str], most: int) -> None:
    """Compute the non-persistent buffers of a model (rotary frequencies, embedding scales); weights stay as they are.

    transformers computes them where it initializes weights: in a module's own turn, or in that of one around it. So
    these modules take their turn here, with the weights marked as initialized.

    Args:
        model: on any device.
        device: where the buffers are made.
        idle: names of modules whose buffers nobody is going to read.
        most: bytes that none may exceed, if it is larger than a gigabyte.

    Raises:
        UnsupportedError: the model's class leaves some as they were.
        CheckpointError: the config asks for one that is too large.
    """
    transient: list[tuple[str, nn.Module, str, _Blank]] = []
    kind = model.config.model_type
    modules = {path: module for path, module in model.named_modules() if path not in idle}
    _check_sizes(modules, most)
    with foreign_settings(f"architecture {kind!r}: its buffers cannot be computed"):
        for module in model.modules():
            module._is_hf_initialized = True
            for weight in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                weight._is_hf_initialized = True
        for path, module in modules.items():
            for name in sorted(module._non_persistent_buffers_set):
                if (buffer := module._buffers[name]) is not None:
                    for part in _around(model, path):
                        part._is_hf_initialized = False
                    blank = _Blank.like(buffer, device)
                    module._buffers[name] = blank.tensor
                    transient.append((f"{path}.{name}", module, name, blank))
        model.initialize_weights()
    for path, module, name, blank in transient:
        if blank.is_left(module._buffers[name]):
            raise UnsupportedError(
                f"architecture {kind!r}: nothing computes {path!r}, which no checkpoint holds, from these "
                f"settings, so it cannot be run block by block; {WHOLE}"
            )


def _around(model: nn.Module, path: str) -> Iterator[Any]:
    """A module and all those that it lies in."""
    names = path.split(".") if path else []
    yield from (model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1))


def _check_sizes(modules: Mapping[str, nn.Module], most: int) -> None:
    """Buffers grow with the positions that a config allows, some with their square; weights don't."""
    for path, module in modules.items():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.nbytes > max(_LARGEST_BUFFER, most):
                raise CheckpointError(
                    f"config.json asks for a buffer of {buffer.nbytes:,} bytes, '{path}.{name}'; the whole checkpoint "
                    f"has {most:,}"
                )
