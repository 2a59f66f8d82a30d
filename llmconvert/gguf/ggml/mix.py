"""llama.cpp's mixes (``q4_k_m`` and its kin): the GGML type of each tensor of a GGUF file.

A mix has a type for most matrices and better ones where an error costs more, by the rules of ``llama-quantize``
(``llama_tensor_get_type``): the output matrix, some layers' ``attn_v`` and ``ffn_down``, fused ``attn_qkv``. Vectors
stay F32. Rows that are no whole number of blocks fall back to a type with smaller blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from llmconvert.errors import SchemeError

__all__ = ["BLOCK_TYPES", "FLOATS", "MIXES", "GgmlMix", "GgmlType", "MixContext"]

_LAYER = re.compile(r"blk\.(\d+)\.")
_FALLBACKS: Final[Mapping[str, str]] = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}
#: Types without blocks, which round as a cast does.
FLOATS: Final = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class MixContext:
    """What the rules look at besides a tensor's name and shape.

    Attributes:
        layers: decoder blocks of the model.
        tied: the embedding serves as output matrix too.
        importance: the file is made with an importance matrix.
        queries_per_key: query heads that share a key-value head.
    """

    layers: int
    tied: bool
    importance: bool
    queries_per_key: int = 1


@dataclass(frozen=True, slots=True)
class GgmlMix:
    """One of :data:`MIXES`.

    Attributes:
        name: as ``llama-quantize`` calls it, in lower case.
        base: tensor type of most matrices.
        file_type: ``general.file_type``, llama.cpp's number.
    """

    name: str
    base: str
    file_type: int

    @classmethod
    def parse(cls, text: str) -> GgmlMix:
        """Read a mix's name.

        Raises:
            SchemeError: it is none; the message lists those there are.
        """
        name = text.strip().lower()
        name = _ALIASES.get(name, name)
        if name not in MIXES:
            raise SchemeError(f"GGUF type {text!r} is not known; known are {', '.join(MIXES)}")
        return MIXES[name]

    def __str__(self) -> str:
        return self.name

    def type_of(self, name: str, shape: tuple[int, ...], context: MixContext) -> str:
        """The type of a tensor.

        Args:
            name: in the file, ``blk.0.attn_v.weight`` for example.
            shape: slowest dimension first.
            context: what else decides.
        """
        from llmconvert.gguf.ggml.blocks import load_codec  # names of types are known without what encodes them

        chosen = self.wanted(name, shape, context)
        if shape[-1] % load_codec(chosen).size:
            chosen = _FALLBACKS.get(chosen, chosen)
        return chosen if shape[-1] % load_codec(chosen).size == 0 else "F16"

    def wanted(self, name: str, shape: tuple[int, ...], context: MixContext) -> str:
        """The type that the mix has for a tensor, be its rows whole blocks of it or not; see :meth:`type_of`."""
        if len(shape) < 2:
            return "F32"
        if self.base in FLOATS:
            return self.base
        match = _LAYER.match(name)
        return self._in_layer(name, int(match[1]), context) if match else self._outer(name, context)

    def _outer(self, name: str, context: MixContext) -> str:
        is_output = name == "output.weight" or (name == "token_embd.weight" and context.tied)
        return "Q6_K" if is_output and self.base != "Q8_0" else self.base

    def _in_layer(self, name: str, layer: int, context: MixContext) -> str:
        part = name.split(".")[2]
        if part == "attn_v":
            return self._values(layer, context)
        if part == "ffn_down":
            return self._down(layer, context)
        if part == "attn_output":
            return _OUTPUTS.get(self.name, self.base)
        if part == "attn_qkv":
            return _FUSED.get(self.name, self.base)
        return self.base

    def _values(self, layer: int, context: MixContext) -> str:
        shared = context.queries_per_key >= 4
        chosen = self.base
        if self.name == "q2_k":
            chosen = "Q4_K" if shared else "Q3_K"
        elif self.name == "q2_k_s" and shared:
            chosen = "Q4_K"
        elif self.name == "q3_k_m":
            chosen = "Q5_K" if layer < 2 else "Q4_K"
        elif self.name == "q3_k_l" or (self.base in ("IQ4_NL", "IQ4_XS") and shared):
            chosen = "Q5_K"
        elif self.name in ("q4_k_m", "q5_k_m") and _more_bits(layer, context.layers):
            chosen = "Q6_K"
        elif self.name == "q4_k_s" and layer < 4:
            chosen = "Q5_K"
        # Models of 80 layers have eight query heads per key-value head: their attn_v is small, and matters.
        return "Q5_K" if context.layers == 80 and chosen in ("Q3_K", "Q4_K") else chosen

    def _down(self, layer: int, context: MixContext) -> str:
        eighth = layer < context.layers // 8
        if self.name == "q2_k":
            return "Q3_K"
        if self.name == "q3_k_m":
            return "Q5_K" if layer < context.layers // 16 else "Q4_K"
        if self.name == "q3_k_l":
            return "Q5_K"
        if self.name in ("q4_k_m", "q5_k_m") and _more_bits(layer, context.layers):
            return "Q6_K"
        if eighth and self.name == "q2_k_s":
            return "Q4_K"
        if eighth and (self.name == "q4_k_s" or (self.base in ("IQ4_NL", "IQ4_XS") and not context.importance)):
            return "Q5_K"
        if eighth and context.importance:
            return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}.get(self.base, self.base)
        return self.base


def _more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


_ALIASES: Final[Mapping[str, str]] = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
#: Where attention puts out, and its fused inputs: by mix, if not the base.
_OUTPUTS: Final[Mapping[str, str]] = {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}
_FUSED: Final[Mapping[str, str]] = {"q3_k_m": "Q4_K", "q3_k_l": "Q4_K", "q4_k_m": "Q5_K", "q5_k_m": "Q6_K"}

#: Name → mix.
MIXES: Final[Mapping[str, GgmlMix]] = {
    mix.name: mix
    for mix in (
        GgmlMix("f32", "F32", 0),
        GgmlMix("f16", "F16", 1),
        GgmlMix("bf16", "BF16", 32),
        GgmlMix("q8_0", "Q8_0", 7),
        GgmlMix("q6_k", "Q6_K", 18),
        GgmlMix("q5_k_m", "Q5_K", 17),
        GgmlMix("q5_k_s", "Q5_K", 16),
        GgmlMix("q5_1", "Q5_1", 9),
        GgmlMix("q5_0", "Q5_0", 8),
        GgmlMix("q4_k_m", "Q4_K", 15),
        GgmlMix("q4_k_s", "Q4_K", 14),
        GgmlMix("q4_1", "Q4_1", 3),
        GgmlMix("q4_0", "Q4_0", 2),
        GgmlMix("iq4_nl", "IQ4_NL", 25),
        GgmlMix("iq4_xs", "IQ4_XS", 30),
        GgmlMix("q3_k_l", "Q3_K", 13),
        GgmlMix("q3_k_m", "Q3_K", 12),
        GgmlMix("q3_k_s", "Q3_K", 11),
        GgmlMix("q2_k", "Q2_K", 10),
        GgmlMix("q2_k_s", "Q2_K", 21),
    )
}

#: The types whose weights are codes, from the one that takes the most bytes on.
BLOCK_TYPES: Final = tuple(dict.fromkeys(mix.base for mix in MIXES.values() if mix.base not in FLOATS))


@dataclass(frozen=True, slots=True)
class GgmlType:
    """One of :data:`BLOCK_TYPES`, for single tensors."""

    name: str

    @classmethod
    def parse(cls, text: str) -> GgmlType:
        """Read a type's name, in upper or lower case.

        Raises:
            SchemeError: it is none; the message lists those there are.
        """
        name = text.strip().upper()
        if name not in BLOCK_TYPES:
            raise SchemeError(
                f"GGUF tensor type {text!r} is not known; known are {', '.join(map(str.lower, BLOCK_TYPES))}"
            )
        return cls(name)

    def __str__(self) -> str:
        return self.name.lower()
