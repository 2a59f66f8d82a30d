"""What reading a quantized artifact takes, whoever wrote it, and the table of the formats that are read."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["READERS", "StoredLinear", "find_linears", "model_dtype", "require_shape", "settings"]

#: ``quant_method`` of a config → where the function lies that finds the quantized linears; loaded on use.
READERS: Mapping[str, str] = {
    "compressed-tensors": "llmconvert.quantize.readers.compressed_tensors:find",
    "gptq": "llmconvert.quantize.readers.gptq:find",
    "awq": "llmconvert.quantize.readers.awq:find",
    "bitsandbytes": "llmconvert.quantize.readers.bitsandbytes:find",
}


@dataclass(frozen=True)
class StoredLinear(ABC):
    """One quantized linear of a checkpoint; each format has a subclass that knows how it is stored.

    Attributes:
        linear: its name, without ``.weight``.
        shape: ``(rows, columns)`` of the dense weight.
        dtype: what the dense weight is rounded to, unless the reader is asked for another one.
        scheme: what it is stored in.
        parts: the tensors that make it up.
    """

    linear: str
    shape: tuple[int, int]
    dtype: torch.dtype
    scheme: Scheme
    parts: tuple[str, ...]

    @abstractmethod
    def read_rows(self, checkpoint: Checkpoint, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows ``start:stop`` (at least one) of the dense weight, computed in float32 and rounded once to ``dtype``."""

    @abstractmethod
    def read(self, checkpoint: Checkpoint) -> QuantizedTensor:
        """The canonical tensor.

        Raises:
            UnsupportedError: there is none: groups of scattered columns, or levels of another kind.
        """


def find_linears(checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Iterable[StoredLinear]:
    """Every quantized linear of a checkpoint whose ``quantization_config`` is ``declared``.

    Raises:
        UnsupportedError: stored in a way that no reader here knows.
        CheckpointError: the tensors contradict the config.
    """
    method = declared.get("quant_method", "")
    if method not in READERS:
        raise UnsupportedError(f"quantized with {method!r}; this reader knows {', '.join(READERS)}")
    module, _, attribute = READERS[method].partition(":")
    find: Callable[[Checkpoint, Mapping[str, Any]], Iterable[StoredLinear]]
    find = getattr(importlib.import_module(module), attribute)
    return find(checkpoint, declared)


def require_shape(checkpoint: Checkpoint, linear: str, part: str, shape: tuple[int, ...] | None = None) -> str:
    """The full name of a linear's part.

    Raises:
        CheckpointError: it is not there, or has another shape.
    """
    name = f"{linear}.{part}"
    stored = checkpoint.infos.get(name)
    if stored is None:
        raise CheckpointError(f"quantized linear {linear!r} has no tensor {name!r}")
    if shape is not None and stored.shape != shape:
        raise CheckpointError(f"tensor {name!r} has shape {list(stored.shape)}, expected {list(shape)}")
    return name


def model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating dtype that a config declares; float16, in which such models are usually saved, if it has none."""
    text = checkpoint.config.get("text_config") or {}
    declared = [config.get(key) for config in (checkpoint.config, text) for key in ("dtype", "torch_dtype")]
    dtype = getattr(torch, next((str(value) for value in declared if value), "float16").removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float16


def settings(declared: Mapping[str, Any], *keys: str) -> str:
    """What a config declares under some keys, for an error."""
    return ", ".join(f"{key}: {declared[key]}" for key in keys if key in declared)
