"""Quantization schemes and their names, ``w4a16-g128-sym`` and its kin.

Grammar: ``w<bits>a<bits>[-g<size>|-channel][-sym|-asym|-fp8|-nf4|-nf4-dq|-absmax]``, e.g. ``w4a16-g64``, ``w8a8``,
``w3a16-g128-asym``. Weights default to symmetric integers, one scale per output channel when no group size is given.
``fp8`` weights are E4M3 floats, ``nf4`` weights one of 16 fixed levels, with ``dq`` their scales are quantized too.
``a16`` leaves activations alone; ``a8`` quantizes them per token while the model runs (dynamically), to the kind that
the weights have. ``absmax`` weights are integers whose largest magnitude in a row is 127, as LLM.int8 has them.
``fp8``, ``nf4``, ``nf4-dq`` and ``llm.int8`` alone stand for their usual schemes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

from llmconvert.errors import SchemeError
from llmconvert.gguf.ggml.mix import MIXES, GgmlMix

__all__ = ["Kind", "Scheme", "SchemeOrMix", "input_kind", "parse_scheme"]

Kind = Literal["int", "fp8", "nf4", "absmax"]

_PATTERN = re.compile(
    r"w(?P<bits>\d+)a(?P<act>\d+)(?:-(?:g(?P<group>\d+)|(?P<channel>channel)))?"
    r"(?:-(?:(?P<sym>a?sym)|(?P<other>fp8|nf4|absmax)(?P<nested>-dq)?))?"
)
_SHORT = {
    "fp8": "w8a8-channel-fp8",
    "nf4": "w4a16-g64-nf4",
    "nf4-dq": "w4a16-g64-nf4-dq",
    "llm.int8": "w8a8-channel-absmax",
}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a linear's weights (and inputs) are represented.

    Attributes:
        bits: width of a weight code, 2 to 8.
        group_size: columns that share one scale; None for one scale per output channel.
        symmetric: no zero point when true.
        activation_bits: 16 (untouched) or 8 (dynamic, per token).
        kind: what a code is: an integer, an E4M3 float, an index into the levels of NF4, or an integer of −127 … 127.
        nested: whether the scales are quantized themselves (the double quantization of QLoRA).
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    activation_bits: int = 16
    kind: Kind = "int"
    nested: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SchemeError(f"scheme {self}: weights can have 2 to 8 bits, found {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise SchemeError(f"scheme {self}: group size must be positive, found {self.group_size}")
        if self.activation_bits not in (8, 16):
            raise SchemeError(f"scheme {self}: activations can have 16 or 8 bits, found {self.activation_bits}")
        if self.kind == "fp8" and (self.bits != 8 or not self.symmetric):
            raise SchemeError(f"scheme {self}: fp8 weights have 8 bits and no zero point")
        if self.kind == "nf4" and (self.bits != 4 or not self.symmetric or not self.group_size):
            raise SchemeError(f"scheme {self}: nf4 weights have 4 bits, a group size and no zero point")
        if self.kind == "nf4" and self.activation_bits != 16:
            raise SchemeError(f"scheme {self}: nf4 weights leave activations at 16 bits")
        rows_of_bytes = (self.bits, self.activation_bits, self.group_size, self.symmetric) == (8, 8, None, True)
        if self.kind == "absmax" and not rows_of_bytes:
            raise SchemeError(f"scheme {self}: absmax weights have 8 bits, 8-bit activations and a scale per channel")
        if self.nested and self.kind != "nf4":
            raise SchemeError(f"scheme {self}: only nf4 weights have quantized scales")

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read a scheme's name.

        Raises:
            SchemeError: it does not follow the grammar, or a number is out of range.
        """
        name = text.strip().lower()
        match = _PATTERN.fullmatch(_SHORT.get(name, name))
        if match is None:
            raise SchemeError(
                f"scheme {text!r} is not understood; expected w<bits>a<bits>[-g<size>|-channel][-sym|-asym|-fp8|-nf4], "
                "for example w4a16-g128, w8a8 or fp8"
            )
        group = match["group"]
        kind = cast(Kind, match["other"] or "int")
        return cls(
            int(match["bits"]),
            int(group) if group else None,
            match["sym"] != "asym",
            int(match["act"]),
            kind,
            match["nested"] is not None,
        )

    def __str__(self) -> str:
        grouping = "channel" if self.group_size is None else f"g{self.group_size}"
        kind = ("sym" if self.symmetric else "asym") if self.kind == "int" else self.kind
        return f"w{self.bits}a{self.activation_bits}-{grouping}-{kind}{'-dq' if self.nested else ''}"

    @property
    def code_min(self) -> int:
        """Smallest integer code: signed whatever the symmetry, as in compressed-tensors; an index for nf4."""
        if self.kind == "absmax":
            return -127
        return 0 if self.kind == "nf4" else -(1 << (self.bits - 1))

    @property
    def code_max(self) -> int:
        """Largest integer code."""
        return 127 if self.kind == "absmax" else self.code_min + (1 << self.bits) - 1

    def groups(self, columns: int) -> int:
        """Scales per row of a weight with ``columns`` input columns."""
        return 1 if self.group_size is None else columns // self.group_size

    def columns_per_group(self, columns: int) -> int:
        """Columns that share a scale in a weight with ``columns`` input columns."""
        return self.group_size or columns

    def check_fits(self, name: str, columns: int) -> None:
        """Refuse a group size that does not divide a layer's columns.

        Raises:
            SchemeError: naming the layer and the sizes that would fit.
        """
        if self.group_size is None or columns % self.group_size == 0:
            return
        fitting = [size for size in (16, 32, 64, 128, 256) if columns % size == 0]
        advice = f"sizes that fit it: {', '.join(map(str, fitting))}" if fitting else "only per-channel scales fit it"
        raise SchemeError(
            f"scheme {self}: group size {self.group_size} does not divide the {columns} columns of {name}; {advice}"
        )


#: How a model's linears are stored: in a scheme, or in the GGML types that one of llama.cpp's mixes gives its tensors.
SchemeOrMix = Scheme | GgmlMix


def parse_scheme(text: str) -> SchemeOrMix:
    """Read the name of a scheme or of a mix: ``w4a16-g128``, ``q4_k_m``.

    Raises:
        SchemeError: it is neither; the message says what there is.
    """
    try:
        return GgmlMix.parse(text)
    except SchemeError:
        pass
    try:
        return Scheme.parse(text)
    except SchemeError as error:
        raise SchemeError(f"{error}; or a GGUF type: {', '.join(MIXES)}") from error


def input_kind(scheme: Scheme) -> Literal["int8", "fp8"] | None:
    """What runtimes quantize the inputs of such a linear to; None for schemes that leave them alone."""
    if scheme.activation_bits == 16:
        return None
    return "fp8" if scheme.kind == "fp8" else "int8"
