"""Quantization schemes and their names, ``w4a16-g128-sym`` and its kin.

Grammar: ``w<bits>a<bits>[-g<size>|-g<rows>x<columns>|-channel|-tensor][-sym|-asym|-<number>]``, e.g. ``w4a16-g64``,
``w8a8``, ``w3a16-g128-asym``, ``w8a8-g128x128-fp8``. Weights default to symmetric integers, one scale per output
channel when no group size is given; ``tensor`` is one scale for all. ``fp8`` weights are E4M3 floats, ``nf4`` weights
one of 16 fixed levels, with ``dq`` (``nf4-dq``) their scales are quantized too; ``affine`` weights are integers with a
float scale and a float bias per group, as MLX has them (``w4a16-g64-affine``); ``nvfp4``, ``mxfp4`` and ``mxfp8`` are
E2M1 or E4M3 floats whose scales are numbers of 8 bits. ``a16`` leaves activations alone; ``a8`` and ``a4`` quantize
them while the model runs, to the kind that the weights have; ``afp8`` to E4M3 beside integers. ``absmax`` weights are
integers whose largest magnitude in a row is 127, as LLM.int8 has them.

Names that stand for a scheme: those of compressed-tensors (``fp8-dynamic``, ``fp8-block``, ``fp8-static``, ``nvfp4``,
``nvfp4a16``, ``mxfp4``, ``mxfp4a16``, ``mxfp8``, ``w4afp8``), ``nf4``, ``nf4-dq`` and ``llm.int8``; ``fp8`` for
``fp8-dynamic``, ``int8`` for ``w8a8``, and ``4bit`` (8, 3, 2) for weights in groups of 128.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from llmconvert.errors import SchemeError
from llmconvert.gguf.ggml.mix import MIXES, GgmlMix
from llmconvert.quantize.numbers import AFFINE, NAMED, Int, Levels, Number, Whole

if TYPE_CHECKING:
    from llmconvert.compute.activations import InputKind

__all__ = ["ALIASES", "Override", "Scheme", "SchemeOrMix", "parse_scheme"]

# Where a dash was left out: w4a16g32, w8a16channel-sym.
_UNDASHED = re.compile(r"(?<=[\dl])(?=g\d|channel|a?sym)(?<!-)")
_PATTERN = re.compile(
    r"w(?P<bits>\d+)a(?P<act>\d+|fp8)(?:-(?:g(?:(?P<rows>\d+)x)?(?P<group>\d+)|channel|(?P<tensor>tensor)))?"
    rf"(?:-(?:(?P<sym>a?sym)|(?P<other>{'|'.join(map(re.escape, NAMED))})(?P<nested>-dq)?))?"
)
_SHORT = {
    "fp8-dynamic": "w8a8-channel-fp8",
    "fp8-block": "w8a8-g128x128-fp8",
    "fp8-static": "w8a8-tensor-fp8",
    "nvfp4": "w4a4-g16-nvfp4",
    "nvfp4a16": "w4a16-g16-nvfp4",
    "mxfp4": "w4a4-g32-mxfp4",
    "mxfp4a16": "w4a16-g32-mxfp4",
    "mxfp8": "w8a8-g32-mxfp8",
    "mxfp8a16": "w8a16-g32-mxfp8",
    "w4afp8": "w4afp8-g128",
    "nf4": "w4a16-g64-nf4",
    "nf4-dq": "w4a16-g64-nf4-dq",
    "llm.int8": "w8a8-channel-absmax",
    # What people type.
    "int8": "w8a8",
    "int4": "w4a16-g128",
    **{f"{bits}{word}": f"w{bits}a16-g128" for bits in (2, 3, 4, 8) for word in ("bit", "-bit", "bits", "-bits")},
}
#: Other names of named schemes: compressed-tensors' own FP8 is ``fp8-static``.
ALIASES = {"fp8": "fp8-dynamic"}
_USUAL = ("w8a16-g128", "w8a8", "w4a16-g128", "w4a16-g64", "w4a16-g128-asym", "w3a16-g64", "w2a16-g64")
_GUESSES = (*_USUAL, "w4a16-g64-affine", *_SHORT, *ALIASES)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a linear's weights (and inputs) are represented.

    Attributes:
        number: what a weight's code is.
        group_size: columns that share one scale; None for all of them.
        activation_bits: 16 (untouched), 8 or 4.
        nested: whether the scales are quantized themselves (the double quantization of QLoRA, super-blocks of GGML).
        rows: rows that share one scale: one, those of a block, or None for all of them.
        float_inputs: whether activations of 8 bits are E4M3 beside integer weights.
        block: the GGML type whose blocks store codes and scales, and say what scales there are; None in other formats.
    """

    number: Number
    group_size: int | None = None
    activation_bits: int = 16
    nested: bool = False
    rows: int | None = 1
    block: str | None = None
    float_inputs: bool = False

    def __post_init__(self) -> None:
        number = self.number
        if self.block is not None:
            return
        if not 2 <= number.bits <= 8:
            raise SchemeError(f"scheme {self}: weights can have 2 to 8 bits, found {number.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise SchemeError(f"scheme {self}: group size must be positive, found {self.group_size}")
        if self.rows is not None and self.rows < 1:
            raise SchemeError(f"scheme {self}: the rows of a block must be positive, found {self.rows}")
        if self.rows != 1 and not number.blocks:
            raise SchemeError(f"scheme {self}: rows share no scales of {number.name} weights; one per channel or group")
        if self.activation_bits not in (4, 8, 16) or (self.activation_bits == 4 and 4 not in number.activations):
            raise SchemeError(f"scheme {self}: activations can have 16 or 8 bits, found {self.activation_bits}")
        if number.grouped not in (None, self.group_size is not None):
            raise SchemeError(f"scheme {self}: {_demands(number)}")
        if self.activation_bits not in number.activations:
            left = f"{number.name} weights leave activations at 16 bits"
            raise SchemeError(f"scheme {self}: {_demands(number) if self.activation_bits == 16 else left}")
        if self.float_inputs and not (isinstance(number, Int) and self.activation_bits == 8 and not number.absmax):
            raise SchemeError(f"scheme {self}: E4M3 activations go beside integer weights; with floats they are a8")
        if self.nested and not number.nestable:
            able = " and ".join(one.name for one in NAMED.values() if one.nestable)
            raise SchemeError(f"scheme {self}: only {able} weights have quantized scales")

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read a scheme's name.

        Raises:
            SchemeError: it does not follow the grammar, or a number is out of range.
        """
        name = text.strip().lower()
        named = ALIASES.get(name, name)
        match = _PATTERN.fullmatch(_SHORT.get(named, named))
        if match is None:
            raise SchemeError(
                f"scheme {text!r} is not understood; expected w<bits>a<bits>[-g<size>|-channel][-sym|-asym|-fp8|-nf4], "
                "for example w4a16-g128, w8a8 or fp8"
            )
        bits, group = int(match["bits"]), match["group"]
        number = NAMED[match["other"]] if match["other"] else Int(bits, match["sym"] != "asym")
        if number == AFFINE:
            number = replace(number, bits=bits)
        if number.bits != bits:
            raise SchemeError(f"scheme {text}: {_demands(number)}")
        rows = None if match["tensor"] else int(match["rows"] or 1)
        floats = match["act"] == "fp8"
        inputs = 8 if floats else int(match["act"])
        size, nested = int(group) if group else None, match["nested"] is not None
        return cls(number, size, inputs, nested, rows, float_inputs=floats)

    @classmethod
    def of_block(cls, name: str) -> Scheme:
        """The scheme of a GGML type: ``Q4_K``.

        Raises:
            SchemeError: it has no blocks, and so no codes.
        """
        # Types come with numpy and their kernels, which who parses a name does not wait for.
        from llmconvert.gguf.ggml.blocks import BlockCodec, load_codec

        codec = load_codec(name)
        if not isinstance(codec, BlockCodec):
            raise SchemeError(f"GGUF type {name} stores floats, there are no codes to choose")
        number: Number = Int(codec.bits)
        if codec.levels:
            number = Levels(codec.bits, name=name.lower(), levels=codec.levels)
        elif codec.minima:
            number = Whole(codec.bits)
        return cls(number, codec.group, nested=codec.sub_range is not None, block=name)

    def __str__(self) -> str:
        if self.block is not None:
            return self.block.lower()
        number, grouping = self.number, f"g{'' if self.rows == 1 else f'{self.rows}x'}{self.group_size}"
        if self.group_size is None:
            grouping = "tensor" if self.rows is None else "channel"
        kind = ("sym" if number.symmetric else "asym") if number.name == "int" else number.name
        inputs = "fp8" if self.float_inputs else self.activation_bits
        return f"w{self.bits}a{inputs}-{grouping}-{kind}{'-dq' if self.nested else ''}"

    @property
    def bits(self) -> int:
        """Width of a weight's code."""
        return self.number.bits

    @property
    def words(self) -> str:
        """What a weight is, for people: ``4-bit integers, one scale per 128 columns``."""
        if self.group_size is None:
            shared = "tensor" if self.rows is None else "output channel"
        else:
            shared = f"{self.group_size} columns" if self.rows == 1 else f"block of {self.rows} × {self.group_size}"
        return f"{self.number.words}, one scale per {shared}"

    @property
    def symmetric(self) -> bool:
        """Whether there are no zero points."""
        return self.number.symmetric

    @property
    def adjustable(self) -> bool:
        """Whether there are others with more or fewer bits: integer weights with 16-bit activations."""
        return self.number.even and self.activation_bits == 16 and self.block is None

    @property
    def unnested(self) -> Scheme:
        """The same codes in the same groups, with scales that are not quantized."""
        return replace(self, nested=False, block=None)

    @property
    def input_kind(self) -> InputKind | None:
        """What runtimes quantize the inputs of such a linear to, nothing fixed yet; None if they leave them alone.

        Beside integers and E4M3 that is by token; with blocks of weights in groups as wide as these, and with one scale
        for the tensor by one for all inputs. Scales that are numbers of 8 bits go with the same for the inputs.
        """
        from llmconvert.compute.activations import InputKind

        number, scales = self.number, self.number.scales
        if self.activation_bits == 16:
            return None
        if scales is not None:
            return InputKind(
                "fp4" if self.activation_bits == 4 else "fp8", self.group_size, "e4m3" if scales.shared else "e8m0"
            )
        if not (self.float_inputs or number.parts is not None):
            return InputKind("int8")
        return InputKind("fp8", None if self.rows in (1, None) else self.group_size, static=self.rows is None)

    @property
    def fixes_inputs(self) -> bool:
        """Whether calibration text fixes something of how inputs are quantized, whatever chooses the codes."""
        scales = self.number.scales
        fixed = self.rows is None or (scales is not None and scales.shared)
        return fixed and self.activation_bits != 16 and self.block is None

    def with_bits(self, bits: int) -> Scheme:
        """The same in another width."""
        return replace(self, number=replace(self.number, bits=bits))

    def groups(self, columns: int) -> int:
        """Scales per row of a weight with ``columns`` input columns; the last block may be cut off."""
        return 1 if self.group_size is None else -(-columns // self.group_size)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Scales of a weight ``[rows, columns]``, counted along both."""
        return 1 if self.rows is None else -(-rows // self.rows), self.groups(columns)

    def columns_per_group(self, columns: int) -> int:
        """Columns that share a scale in a weight with ``columns`` input columns."""
        return self.group_size or columns

    def check_fits(self, name: str, columns: int) -> None:
        """Refuse a group size that does not divide a layer's columns.

        Raises:
            SchemeError: naming the layer and the sizes that would fit.
        """
        by_blocks = self.rows != 1 and self.activation_bits == 16
        if self.group_size is None or by_blocks or columns % self.group_size == 0:
            return
        if self.rows != 1:
            raise SchemeError(
                f"scheme {self}: inputs are quantized in groups of {self.group_size}, which does not divide the "
                f"{columns} columns of {name}; take fp8-dynamic, or w8a16-g{self.rows}x{self.group_size}-fp8, whose "
                "last blocks may be cut off"
            )
        if self.number.scales is not None:
            raise SchemeError(
                f"scheme {self}: its groups are of {self.group_size}, which does not divide the {columns} columns of "
                f"{name}; leave it dense with an override (scheme: none), or give it fp8-dynamic"
            )
        fitting = [size for size in (16, 32, 64, 128, 256) if columns % size == 0]
        advice = f"sizes that fit it: {', '.join(map(str, fitting))}" if fitting else "only per-channel scales fit it"
        raise SchemeError(
            f"scheme {self}: group size {self.group_size} does not divide the {columns} columns of {name}; {advice}"
        )


@dataclass(frozen=True, slots=True)
class Override:
    """What matches the shell pattern ``match`` gets ``scheme``; None leaves it as it is.

    Patterns are of linears' names. In formats that hold them, ``head`` and ``embedding`` are the output head and the
    embedding, and in GGUF files names of theirs (``blk.0.attn_v``) count as well.
    """

    match: str
    scheme: Scheme | None

    @staticmethod
    def chosen(names: Sequence[str], scheme: Scheme | None, overrides: Iterable[Override]) -> Scheme | None:
        """What a linear of these names gets: the first override's that matches one of them, or else ``scheme``."""
        for override in overrides:
            if any(fnmatchcase(name, override.match) for name in names):
                return override.scheme
        return scheme


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
        raise SchemeError(
            f"{error}; or a GGUF type: {', '.join(MIXES)}{_nearest(text, (*MIXES, *_GUESSES))}"
        ) from error


def _nearest(text: str, names: Sequence[str]) -> str:
    """A question for the name that was meant, if one is near; of what is only a beginning, for one that goes on so."""
    wanted = text.strip().lower()
    dashed = _UNDASHED.sub("-", wanted)
    if dashed != wanted and _PATTERN.fullmatch(dashed):
        return f"; did you mean {dashed}?"
    close = difflib.get_close_matches(wanted, names, n=1) or [
        name for name in names if wanted and name.startswith(wanted)
    ]
    return f"; did you mean {close[0]}?" if close else ""


def _demands(number: Number) -> str:
    """What schemes with a number have to look like, in words."""
    activations = ["8-bit activations"] if number.activations == (8,) else []
    grouping = {True: ["a group size"], False: ["a scale per channel"], None: []}[number.grouped]
    listed = ", ".join([f"{number.bits} bits", *activations, *grouping])
    return f"{number.name} weights have {listed} and no zero point"
