"""Keys and values as an FP8 cache holds them: E4M3 under fixed scales, one for a layer's keys and one for its values,
or one for each of its heads.

An attention module hands keys, after their rotation, and values to a cache, and goes on with what that gives back. What
it is handed here stands between: it looks at what comes, or rounds it as the caches of compressed-tensors or vLLM do,
and passes it on to the model's own cache, if there is one.

compressed-tensors divides by the scale in the dtype of keys and values. vLLM's CUDA and Triton kernels
(``scaled_convert`` of its ``quant_utils.cuh``, ``triton_reshape_and_cache_flash.py``) divide in float32, cut off at the
largest E4M3 number and round to nearest; what a code stands for is rounded once, to the dtype that attention computes
in. (Its CPU kernel, ``cpu_attn_fp8.hpp``, drops the bits that E4M3 lacks instead, toward zero; that is not computed
here.)
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmconvert.compute.activations import ActivationRuntime, round_by
from llmconvert.compute.small_floats import E4M3_PARTS

__all__ = ["CacheQuantizer", "CacheScales", "cache_quantizers"]

# What runtimes look for scales in, and what its forward calls the cache.
_ATTENTION = re.compile(r"(?:^|\.)(?:self_attn|attention)$")
_CACHES = ("past_key_values", "past_key_value")


@dataclass(frozen=True, slots=True)
class CacheScales:
    """What a layer's keys and values are divided by before they are rounded.

    Attributes:
        key: in the model's dtype, ``[1]`` or ``[heads, 1, 1]``.
        value: the same of the values.
        runtime: whose formula they are rounded by.
    """

    key: torch.Tensor
    value: torch.Tensor
    runtime: ActivationRuntime = "transformers"

    def round(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What comes back from the cache, in the dtype of what goes in, ``[batch, heads, length, head size]`` each."""
        by = _round_in_float32 if self.runtime == "vllm" else _round_in_its_dtype
        return by(key, self.key), by(value, self.value)


def _round_in_its_dtype(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return round_by(values, scale.to(values), "fp8")


def _round_in_float32(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return round_by(values.float(), scale.to(values.device, torch.float32), "fp8").to(values.dtype)


class CacheQuantizer:
    """Looks at the keys and values of an attention module, and rounds them once their scales are there.

    Args:
        attention: the module.

    Attributes:
        largest: magnitudes of the keys and of the values that have come, float32 ``[heads]`` each; None before any.
    """

    def __init__(self, attention: nn.Module) -> None:
        self.largest: tuple[torch.Tensor, torch.Tensor] | None = None
        self._scales: CacheScales | None = None
        parameters = inspect.signature(attention.forward).parameters
        self._name = next(name for name in _CACHES if name in parameters)
        attention.register_forward_pre_hook(self._enter, with_kwargs=True)

    @property
    def met(self) -> bool:
        """Whether keys and values other than zero have come."""
        return self.largest is not None and all(bool(found.any()) for found in self.largest)

    def scales(self, dtype: torch.dtype, *, by_head: bool = False) -> CacheScales:
        """Those that reach the largest magnitudes that have come, as a model in ``dtype`` stores them.

        A head that nothing but zeros came to has the scale of magnitudes up to one.
        """
        assert self.largest is not None
        found = [largest[:, None, None] if by_head else largest.amax()[None] for largest in self.largest]
        key, value = (torch.where(largest == 0, 1, largest) / E4M3_PARTS.largest for largest in found)
        return CacheScales(key.to(dtype), value.to(dtype))

    def fix(self, scales: CacheScales) -> None:
        """Round from here on."""
        self._scales = scales

    def pass_on(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What becomes of keys and values, ``[batch, heads, length, head size]``, in a cache."""
        if self._scales is not None:
            return self._scales.round(key, value)
        if not key.is_meta and key.numel():
            keys, values = (part.detach().abs().amax((0, 2, 3)).float().cpu() for part in (key, value))
            before = self.largest or (keys, values)
            self.largest = torch.maximum(before[0], keys), torch.maximum(before[1], values)
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
