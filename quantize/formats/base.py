"""What an on-disk format of quantized weights has to do, and the table of those there are."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from llmconvert.errors import UnsupportedError
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import TensorSpec

__all__ = ["FORMATS", "Format", "half_scale_dtype", "load_format"]

#: Format name → where its class lies; loaded on use.
FORMATS: Mapping[str, str] = {
    "compressed-tensors": "llmconvert.quantize.formats.compressed_tensors:CompressedTensors",
    "gptq": "llmconvert.quantize.formats.gptq_v1:GptqV1",
    "awq": "llmconvert.quantize.formats.awq_gemm:AwqGemm",
    "bitsandbytes": "llmconvert.quantize.formats.bitsandbytes:BitsAndBytes",
}


class Format(Protocol):
    """Packs canonical quantized tensors into named tensors of a checkpoint, and back, bit for bit."""

    def check(self, scheme: Scheme) -> None:
        """Refuse a scheme the format cannot hold.

        Raises:
            UnsupportedError: with the schemes that it can.
        """

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a method has to choose its scales, for a model in ``dtype``."""

    def specs(self, linear: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> list[TensorSpec]:
        """What :meth:`pack` will write for a linear, known from its shape alone.

        Raises:
            UnsupportedError: the format cannot hold a weight of this shape.
        """

    def pack(self, linear: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """The tensors to store, by checkpoint name. ``linear`` is the name without ``.weight``."""

    def unpack(self, linear: str, stored: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedTensor:
        """The inverse of :meth:`pack`."""

    def quantization_config(self, schemes: Mapping[str, Scheme], kept: Sequence[str]) -> dict[str, Any]:
        """The ``quantization_config`` of ``config.json``: schemes by linear, and the linears left unquantized.

        Raises:
            UnsupportedError: the format cannot hold these schemes in one model.
        """

    def files(self, declared: Mapping[str, Any]) -> Mapping[str, bytes]:
        """Files that readers want beside ``config.json``, by name; ``declared`` is :meth:`quantization_config`'s."""


def half_scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where scales are stored in float16: in which dtype to choose them, for a model in ``dtype``.

    A runtime that computes in bfloat16 rounds the scales it reads to that. Scales chosen in bfloat16 are not changed by
    this, and float16 holds them as they are from 2⁻¹⁷ up; below, they move by at most 2⁻²⁵.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


def load_format(name: str) -> Format:
    """The format of that name.

    Raises:
        UnsupportedError: there is none; the message lists those there are.
    """
    if name not in FORMATS:
        raise UnsupportedError(f"format {name!r} is not known; known are {', '.join(FORMATS)}")
    module, _, attribute = FORMATS[name].partition(":")
    instance: Format = getattr(importlib.import_module(module), attribute)()
    return instance
