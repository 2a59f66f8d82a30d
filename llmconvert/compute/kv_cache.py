"""Keys and values as an FP8 cache holds them: E4M3 under one fixed scale for a layer's keys, and one for its values.

An attention module hands keys, after their rotation, and values to a cache, and goes on with what that gives back. What
it is handed here stands between: it looks at what comes, or rounds it as the caches of vLLM and compressed-tensors do,
and passes it on to the model's own cache, if there is one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmconvert.compute.activations import InputKind, quantize_input

__all__ = ["CacheQuantizer", "CacheScales", "cache_quantizers"]

_KIND = InputKind("fp8", static=True)
# What runtimes look for scales in, and what its forward calls the cache.
_ATTENTION = re.compile(r"(?:^|\.)(?:self_attn|attention)$")
_CACHES = ("past_key_values", "past_key_value")


@dataclass(frozen=True, slots=True)
class CacheScales:
    """What a layer's keys and values are divided by before they are rounded; ``[1]`` each, in the model's dtype."""

    key: torch.Tensor
    value: torch.Tensor


class CacheQuantizer:
    """Looks at the keys and values of an attention module, and rounds them once their scales are there.

    Args:
        attention: the module.

    Attributes:
        largest: magnitudes of the keys and of the values that have come.
    """

    def __init__(self, attention: nn.Module) -> None:
        self.largest = (0.0, 0.0)
        self._kinds: tuple[InputKind, InputKind] | None = None
        parameters = inspect.signature(attention.forward).parameters
        self._name = next(name for name in _CACHES if name in parameters)
        attention.register_forward_pre_hook(self._enter, with_kwargs=True)

    def scales(self, dtype: torch.dtype) -> CacheScales:
        """Those that reach the largest magnitudes that have come, as a model in ``dtype`` stores them."""
        key, value = (_KIND.scale_for(largest, dtype) for largest in self.largest)
        return CacheScales(key, value)

    def fix(self, scales: CacheScales) -> None:
        """Round from here on."""
        self._kinds = _KIND.at(scales.key), _KIND.at(scales.value)

    def pass_on(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What becomes of keys and values, ``[batch, heads, length, head size]``, in a cache."""
        if self._kinds is not None:
            return quantize_input(key, self._kinds[0]), quantize_input(value, self._kinds[1])
        if not key.is_meta and key.numel():
            found = (float(key.detach().abs().max()), float(value.detach().abs().max()))
            self.largest = max(self.largest[0], found[0]), max(self.largest[1], found[1])
        return key, value

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, self._name: _Passage(self, kwargs.get(self._name))}


class _Passage:
    """The cache that an attention module is handed."""

    def __init__(self, quantizer: CacheQuantizer, cache: Any) -> None:
        self._quantizer, self._cache = quantizer, cache

    def update(self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        key, value = self._quantizer.pass_on(key, value)
        return (key, value) if self._cache is None else self._cache.update(key, value, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def cache_quantizers(blocks: Mapping[str, nn.Module], names: Mapping[str, str]) -> dict[str, CacheQuantizer]:
    """One for every attention module of a model whose keys and values runtimes quantize, by what a checkpoint calls it.

    Args:
        blocks: by the prefix of their modules' names.
        names: parameter → tensor of the checkpoint.
    """
    found: dict[str, CacheQuantizer] = {}
    for prefix, block in blocks.items():
        for name, module in block.named_modules():
            caches = _ATTENTION.search(name) and set(_CACHES) & inspect.signature(module.forward).parameters.keys()
            if caches:
                found[_stored(prefix + name, names)] = CacheQuantizer(module)
    return found


def _stored(module: str, names: Mapping[str, str]) -> str:
    """What a checkpoint calls a module."""
    for parameter, tensor in names.items():
        inside = parameter.removeprefix(f"{module}.")
        if inside != parameter and tensor.endswith(f".{inside}"):
            return tensor.removesuffix(f".{inside}")
    return module
