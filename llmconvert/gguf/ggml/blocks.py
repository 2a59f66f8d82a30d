"""GGML's block types: what a block of weights is made of, in values rather than bits.

A weight is ``scale · code`` (``_0`` types), ``scale · code + minimum`` (``_1`` types), or in the super-blocks of the K
types ``scale · sub_scale · code - minimum · sub_minimum`` with small integers per sub-block
(https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h).
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from llmconvert.errors import UnsupportedError

__all__ = ["CODECS", "Array", "BlockCodec", "Blocks", "Codec", "block_importance", "load_codec"]

Array = NDArray[Any]

_ROOT: Final = "llmconvert.gguf.ggml"

#: Tensor type → where its codec lies; loaded on use.
CODECS: Final[Mapping[str, str]] = {
    **{name: f"{_ROOT}.plain:{name}" for name in ("F32", "F16", "BF16")},
    **{name: f"{_ROOT}.simple.{name.lower()}:CODEC" for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")},
    **{
        name: f"{_ROOT}.super_blocks.{name.lower()}:CODEC"
        for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
    },
}


@dataclass(frozen=True, slots=True)
class Blocks:
    """``n`` blocks of ``size`` weights, unpacked.

    Attributes:
        codes: ``[n, size]``, as the file counts them: unsigned, but for Q8_0's int8.
        scale: float16 ``[n]``.
        minimum: float16 ``[n]``; None for types without.
        sub_scales: ``[n, sub-blocks]``, uint8 below 64, or int8 where they have a sign; None for types without
            sub-blocks.
        sub_minima: uint8 ``[n, sub-blocks]`` below 64, or None.
    """

    codes: Array
    scale: Array
    minimum: Array | None = None
    sub_scales: Array | None = None
    sub_minima: Array | None = None

    @property
    def steps(self) -> Array:
        """What a level is multiplied by, float32 ``[n, sub-blocks]``; one sub-block for types without."""
        scale = self.scale.astype(np.float32)[:, None]
        return scale if self.sub_scales is None else scale * self.sub_scales.astype(np.float32)

    @property
    def offsets(self) -> Array | None:
        """What is added then, likewise; None for types without minima."""
        if self.minimum is None:
            return None
        minimum = self.minimum.astype(np.float32)[:, None]
        return minimum if self.sub_minima is None else -(minimum * self.sub_minima.astype(np.float32))


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


class BlockCodec(ABC):
    """A type with blocks: parameters of a block, codes for them, and their bytes, each apart from the others.

    A :class:`Codec` whose weights are ``step · level + offset``.
    """

    name: str
    size: int
    nbytes: int
    #: Width of a code.
    bits: int
    #: Weights that share step and offset.
    group: int
    #: What a code is more than its level in the file.
    shift: int = 0
    #: What codes stand for, if not for themselves; ascending.
    levels: tuple[float, ...] = ()
    #: Whether there are offsets.
    minima: bool = False
    #: The least and the greatest factor of a sub-block's scale; None for types without sub-blocks.
    sub_range: tuple[int, int] | None = None

    @abstractmethod
    def fit(self, values: Array, importance: Array | None = None) -> Blocks:
        """Parameters with the least error, weighted by importance, and the codes next to the weights."""

    @abstractmethod
    def pack(self, blocks: Blocks) -> Array:
        """uint8 ``[n, nbytes]``."""

    @abstractmethod
    def unpack(self, raw: Array) -> Blocks:
        """The inverse of :meth:`pack`."""

    def encode(self, values: Array, importance: Array | None = None) -> Array:
        return self.pack(self.fit(values, importance)).reshape(len(values), -1)

    def decode(self, raw: Array) -> Array:
        """In llama.cpp's order of operations, which decides the last bit."""
        blocks = self.unpack(raw.reshape(-1, self.nbytes))
        codes = blocks.codes.reshape(len(blocks.codes), -1, self.group)
        levels = np.array(self.levels, np.float32)[codes] if self.levels else codes.astype(np.float32) - self.shift
        levels *= blocks.steps[..., None]
        if blocks.offsets is not None:
            levels += blocks.offsets[..., None]
        weights: Array = levels.reshape(len(raw), -1)
        return weights


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
