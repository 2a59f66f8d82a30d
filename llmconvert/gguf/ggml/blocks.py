"""GGML's block types: what a block of weights is made of, in values rather than bits.

A weight is ``scale · code`` (``_0`` types), ``scale · code + minimum`` (``_1`` types), or in the super-blocks of the K
types ``scale · sub_scale · code - minimum · sub_minimum`` with small integers per sub-block
(https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from llmconvert.errors import UnsupportedError

__all__ = ["CODECS", "Array", "BlockCodec", "Blocks", "Codec", "block_importance", "load_codec"]

Array = NDArray[Any]

#: Tensor type → where its codec lies; loaded on use.
CODECS: Final[Mapping[str, str]] = {
    "F32": "llmconvert.gguf.ggml.plain:F32",
    "F16": "llmconvert.gguf.ggml.plain:F16",
    "BF16": "llmconvert.gguf.ggml.plain:BF16",
    "Q8_0": "llmconvert.gguf.ggml.q8_0:CODEC",
    "Q4_0": "llmconvert.gguf.ggml.q4_0:CODEC",
    "Q4_1": "llmconvert.gguf.ggml.q4_1:CODEC",
    "Q5_0": "llmconvert.gguf.ggml.q5_0:CODEC",
    "Q5_1": "llmconvert.gguf.ggml.q5_1:CODEC",
    "Q4_K": "llmconvert.gguf.ggml.q4_k:CODEC",
    "Q5_K": "llmconvert.gguf.ggml.q5_k:CODEC",
    "Q6_K": "llmconvert.gguf.ggml.q6_k:CODEC",
}


@dataclass(frozen=True, slots=True)
class Blocks:
    """``n`` blocks of ``size`` weights, unpacked.

    Attributes:
        codes: ``[n, size]``, as the file counts them: unsigned, but for Q8_0's int8.
        scale: float16 ``[n]``.
        minimum: float16 ``[n]``; None for types without.
        sub_scales: ``[n, sub-blocks]``, uint8 below 64, or int8 for Q6_K; None for types without sub-blocks.
        sub_minima: uint8 ``[n, sub-blocks]`` below 64, or None.
    """

    codes: Array
    scale: Array
    minimum: Array | None = None
    sub_scales: Array | None = None
    sub_minima: Array | None = None


class Codec(Protocol):
    """One tensor type: from float32 values to the bytes of a file, and back."""

    #: As in ``gguf.GGMLQuantizationType``.
    name: str
    #: Weights of a block; rows are whole blocks.
    size: int
    #: Bytes of a block.
    nbytes: int

    def encode(self, values: Array, importance: Array | None = None) -> Array:
        """The bytes of weights.

        Args:
            values: finite float32 ``[rows, columns]``; columns are a multiple of :attr:`size`.
            importance: float32 ``[columns]``, how much an error of each column's weights counts, not negative.
                Without it blocks of 32 are encoded as llama.cpp does, and in super-blocks all columns count alike.

        Returns:
            uint8 ``[rows, row bytes]``.
        """

    def decode(self, raw: Array) -> Array:
        """float32 ``[rows, columns]`` of bytes ``[rows, row bytes]``."""


class BlockCodec(Codec, Protocol):
    """A type with blocks, whose values can be had and given."""

    def pack(self, blocks: Blocks) -> Array:
        """uint8 ``[n, nbytes]``."""

    def unpack(self, raw: Array) -> Blocks:
        """The inverse of :meth:`pack`."""


def load_codec(name: str) -> Codec:
    """The codec of a tensor type.

    Raises:
        UnsupportedError: there is none; the message lists those there are.
    """
    if name not in CODECS:
        raise UnsupportedError(f"GGUF tensor type {name!r} cannot be written; known are {', '.join(CODECS)}")
    module, _, attribute = CODECS[name].partition(":")
    return cast(Codec, getattr(importlib.import_module(module), attribute))


def block_importance(importance: Array | None, columns: int) -> Array:
    """What the kernels take: float32 ``[columns]`` with mean 1, all ones without (or with no) importance."""
    if importance is None or not importance.any():
        return np.ones(columns, np.float32)
    # Columns no calibration token reached still hold weights: a floor keeps their error finite.
    scaled = importance.astype(np.float64) / importance.mean(dtype=np.float64)
    floored: Array = np.maximum(scaled, 1e-6).astype(np.float32)
    return floored
