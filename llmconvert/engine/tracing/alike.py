"""Blocks that do the same: what one did in a trace stands for the others, whose forward need not run then.

A model of fifty layers has a few kinds of them. Two blocks are of one kind if their modules are of the same classes,
with weights of the same shapes and the same settings, and the config says the same of both; what a block computes then
depends on what it is called with alone. Their numbers (``layer_idx``) choose a place in a cache, and there is none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from llmconvert.engine.tracing.recorder import BlockRecorder, ExpertShapes

__all__ = ["StandIn", "kinds_of"]

# What every module has, and what only says which block it is in.
_COMMON = frozenset({*vars(nn.Module()), "_is_hf_initialized", "layer_idx", "layer_id", "layer_index", "layer_number"})
_PLAIN = (bool, int, float, str, type(None))


def kinds_of(blocks: Sequence[nn.Module], configs: Sequence[PretrainedConfig]) -> list[Hashable]:
    """The kind of each block; those that are equal do the same.

    Args:
        blocks: all of a model's list.
        configs: of the model and of its decoder.
    """
    lists = [value for config in configs for value in vars(config).values() if isinstance(value, list | tuple)]
    said = [value for value in lists if len(value) == len(blocks)]
    holders = Counter(id(module) for block in blocks for module in _with_weights(block))
    kinds: list[Hashable] = []
    for position, block in enumerate(blocks):
        # One that shares modules with another is called with it, and has to be seen as often as it is.
        alone = all(holders[id(module)] == 1 for module in _with_weights(block))
        settings = tuple(repr(value[position]) for value in said)
        kinds.append((tuple(_parts(block)), settings, None if alone else position))
    return kinds


def _with_weights(block: nn.Module) -> list[nn.Module]:
    return [module for module in block.modules() if module._parameters]


def _parts(block: nn.Module) -> Iterator[Hashable]:
    for name, module in block.named_modules():
        values = (*module._parameters.items(), *module._buffers.items())
        shapes = tuple((leaf, value.shape, value.dtype) for leaf, value in values if value is not None)
        own = {key: value for key, value in vars(module).items() if key not in _COMMON}
        if isinstance(module, ExpertShapes):
            own["layout"] = repr(module.layout)
        yield name, type(module), shapes, tuple((key, _setting(value)) for key, value in sorted(own.items()))


def _setting(value: Any) -> Hashable:
    """A setting by its value; anything that is more than one is itself alone."""
    if isinstance(value, list | tuple | set | frozenset):
        return (type(value), tuple(map(_setting, value)))
    if isinstance(value, Mapping):
        return (type(value), tuple((key, _setting(one)) for key, one in value.items()))
    if isinstance(value, partial):
        return (partial, _setting(value.func), _setting(value.args), _setting(value.keywords))
    return (type(value), value) if isinstance(value, _PLAIN) else id(value)


class StandIn(nn.Module):
    """Stands in a model's list of blocks for one that is of the kind of an earlier one, which was traced.

    The block is no part of the model meanwhile, and its weights may be of another device than the model's. Where it is
    called with something else it has to run, and does on those of the earlier one.

    Args:
        block: that it stands for.
        earlier: the other.
    """

    def __init__(self, block: nn.Module, earlier: nn.Module) -> None:
        super().__init__()
        self._pair = block, earlier  # in a tuple, so that neither is registered
        self._recorders: tuple[BlockRecorder, BlockRecorder] | None = None

    def follow(self, recorder: BlockRecorder, like: BlockRecorder) -> None:
        """Write down what happens with the recorder of this block, by what that of the earlier one has seen."""
        self._recorders = recorder, like

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self._recorders is not None
        recorder, like = self._recorders
        if not recorder.follows(like, args, kwargs):
            return self._filled()(*args, **kwargs)
        output = torch.empty_like(args[0])
        recorder.pass_by(like, output)
        return output

    def _filled(self) -> nn.Module:
        """The block, with weights and buffers of the earlier one, whose shapes and dtypes are the same."""
        block, earlier = self._pair
        for own, other in zip(block.modules(), earlier.modules(), strict=True):
            own._parameters.update(other._parameters)
            own._buffers.update(other._buffers)
        return block

    def __getattr__(self, name: str) -> Any:
        # Some models read attributes of their blocks in the loop over them (attention type, layer index).
        try:
            return super().__getattr__(name)
        except AttributeError:
            block, _ = self._pair
            found = getattr(block, name)
            return getattr(self._filled(), name) if isinstance(found, nn.Module | torch.Tensor) else found
