"""What of a model text reaches: its list of decoder blocks, and the modules beside it that token ids alone pass.

A multimodal model holds more than a decoder: towers for images and sound, projectors, blocks that attend to images.
Which those are is not looked up per family. The whole model runs once on fake tensors (shapes, no data) with token ids
as its only input; what is neither called nor read on the way is idle: its weights are never loaded, and stay as they
are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, PreTrainedModel

from llmconvert.engine.architecture.auto import has_parts
from llmconvert.engine.architecture.boundary import WHOLE, foreign_settings
from llmconvert.engine.architecture.experts import find_experts
from llmconvert.engine.architecture.families import IMAGE_LAYERS
from llmconvert.engine.architecture.model import build_meta_model, find_blocks, fix_frequencies, main_blocks

__all__ = ["Reach", "find_reach", "on_shapes"]

# Long enough for windows and convolutions to be what they are.
_LENGTH = 16


@dataclass(frozen=True, slots=True)
class Reach:
    """Where text goes in a model.

    Attributes:
        blocks: name of the list of decoder blocks.
        positions: which of the list's blocks text passes, in order: all, but for those that attend to images.
        idle: names of all modules that text never meets, those inside them included.
    """

    blocks: str
    positions: tuple[int, ...]
    idle: frozenset[str]

    def prefix(self, index: int) -> str:
        """What the names of a block's parameters begin with, e.g. ``model.layers.0.``."""
        return f"{self.blocks}.{self.positions[index]}."

    def needs(self, state: str) -> bool:
        """Whether a parameter or buffer, or a matrix of an expert, by its name, takes part in what text gives."""
        if not self.idle:
            return True
        parts = state.split(".")
        return not any(".".join(parts[:end]) in self.idle for end in range(1, len(parts)))


def find_reach(model: PreTrainedModel, config: PretrainedConfig, dtype: torch.dtype, attention: str) -> Reach:
    """Where text goes in ``model``; a plain decoder is passed whole, and nothing is run.

    What has parts, blocks for images, or several lists that could be those of the decoder, is run.

    Args:
        model: on the meta device; stays as it is.
        config: it was built from.
        dtype: likewise.
        attention: likewise.

    Raises:
        UnsupportedError: the model does not run on token ids alone, or its decoder blocks cannot be told.
    """
    found = find_blocks(model)
    parts = has_parts({"model_type": config.model_type}) or getattr(config, IMAGE_LAYERS, None)
    if not parts and len(found) == 1:
        name = next(iter(found))
        return Reach(name, tuple(range(len(found[name]))), frozenset())
    reached = _trace(build_meta_model(config, dtype, attention), config.model_type)
    passed = {
        name: tuple(index for index in range(len(blocks)) if f"{name}.{index}" in reached)
        for name, blocks in found.items()
    }
    passed = {name: positions for name, positions in passed.items() if positions}
    name = main_blocks(model, {name: found[name] for name in passed})
    idle = frozenset(name for name, _ in model.named_modules() if name and name not in reached)
    return Reach(name, passed[name], idle)


@contextmanager
def on_shapes(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Let ``model``, on the meta device, run on fake tensors of ``device`` inside the block.

    Where a forward looks at values, it finds all of them to be other than zero (a mask chooses all that there is), and
    numbers that it takes out of a tensor to be zero: what it calls then may be more than what it calls for a text.
    """
    with FakeTensorMode(), torch.no_grad():
        for module in model.modules():
            for name, tensor in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            for name, tensor in module.named_parameters(recurse=False):
                value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
        with _unlogged(), _AssumedValues():
            yield


class _AssumedValues(TorchDispatchMode):
    """Answers operators that ask a fake tensor for values."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except (DataDependentOutputException, DynamicOutputShapeException):  # a constant's value is known
            if func is torch.ops.aten.nonzero.default:
                return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
            if func is torch.ops.aten.where.default:
                return _everywhere(args[0])
            if func is torch.ops.aten.index.Tensor:
                masks = [_everywhere(one) if _is_mask(one) else [one] for one in args[1]]
                return func(args[0], [place for places in masks for place in places])
            if func is torch.ops.aten._local_scalar_dense.default:
                dtype = args[0].dtype
                return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0
            raise


def _is_mask(index: object) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _everywhere(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Places of as many values as a tensor has, an index for each of its dimensions."""
    return [tensor.new_empty(tensor.numel(), dtype=torch.long) for _ in range(tensor.dim())]


@contextmanager
def _unlogged() -> Iterator[None]:
    """torch writes a traceback to the log before it raises; what is raised says it in one line."""
    log = logging.getLogger(FakeTensorMode.__module__)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _trace(model: PreTrainedModel, kind: str) -> frozenset[str]:
    """The modules that token ids reach, by name: what is called, what an operator reads from, and what holds such."""
    fix_frequencies(model)
    inside: dict[str, set[str]] = {}
    for name, experts, _ in list(find_experts(model)):
        inside[name] = {f"{name}.{part}" for part, _ in experts.named_modules() if part}
        model.set_submodule(name, _Experts(experts))
    reached: set[str] = set()
    with on_shapes(model, torch.device("cpu")):
        owners: dict[int, str] = {}
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda _, args, name=name: reached.add(name))
            for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                owners[value.untyped_storage()._cdata] = name
        ids = torch.zeros((1, _LENGTH), dtype=torch.long)
        with (
            foreign_settings(f"architecture {kind!r} cannot be traced on text alone", WHOLE),
            _Readings(owners, reached),
        ):
            model(input_ids=ids, use_cache=False)
    parents = {name[:end] for name in reached for end, letter in enumerate(name) if letter == "."}
    parts = {part for name in reached & inside.keys() for part in inside[name]}
    return frozenset(reached | parents | parts)


class _Experts(nn.Module):
    """Stands in for the experts of a layer, whose forward asks for values."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.num_experts = getattr(experts, "num_experts", 0)

    def forward(self, hidden: torch.Tensor, *routing: Any) -> torch.Tensor:
        return torch.zeros_like(hidden)


class _Readings(TorchDispatchMode):
    """Notes which modules' parameters and buffers operators read, by their storages."""

    def __init__(self, owners: Mapping[int, str], reached: set[str]) -> None:
        super().__init__()
        self._owners, self._reached = owners, reached

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):
                owner = self._owners.get(value.untyped_storage()._cdata)
                if owner is not None:
                    self._reached.add(owner)
        return func(*args, **(kwargs or {}))
