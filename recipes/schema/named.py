"""Recipe values that are names of something with parts: schemes, GGUF types, and scalings of positions."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Literal

from pydantic import BeforeValidator, PlainSerializer, PlainValidator, WithJsonSchema

from llmconvert.convert.dtype_names import ALIASES
from llmconvert.convert.rope_factor import RopeScaling
from llmconvert.errors import SchemeError, UsageError
from llmconvert.gguf.ggml.mix import BLOCK_TYPES, MIXES, GgmlMix, GgmlType
from llmconvert.quantize.catalog.formats import FORMATS
from llmconvert.quantize.catalog.methods import METHODS
from llmconvert.quantize.scheme import Scheme, parse_scheme

__all__ = [
    "Dtype",
    "OptionalScheme",
    "ScalingField",
    "SchemeOrMix",
    "TensorType",
    "WidthOrScheme",
    "engine_scheme",
]


def _parse_dtype(value: object) -> object:
    return ALIASES.get(value.lower(), value) if isinstance(value, str) else value


def _parse_scheme(value: object) -> Scheme:
    if isinstance(value, Scheme):
        return value
    if not isinstance(value, str):
        raise ValueError("expected a scheme such as w4a16-g128")
    try:
        return Scheme.parse(value)
    except SchemeError as error:
        raise ValueError(str(error)) from error


def _parse_scheme_or_mix(value: object) -> Scheme | GgmlMix:
    if isinstance(value, Scheme | GgmlMix):
        return value
    if not isinstance(value, str):
        raise ValueError("expected a scheme such as w4a16-g128, or a GGUF type such as q4_k_m")
    try:
        return parse_scheme(value)
    except SchemeError as error:
        raise ValueError(_no_scheme(value) or str(error)) from error


def _no_scheme(value: str) -> str:
    """What a name stands for that people take for a scheme, as ``awq``; empty if it is nothing known."""
    name = value.strip().lower()
    kinds = {"method": METHODS, "format": FORMATS}
    found = [f"a {kind} ([[quantize.{kind}={name}]])" for kind, known in kinds.items() if name in known]
    return f"is {' and '.join(found)}; a scheme says how many bits: w4a16-g128" if found else ""


def _parse_override(value: object) -> Scheme | GgmlType | Literal["none"]:
    if value == "none":
        return "none"
    if isinstance(value, GgmlType):
        return value
    if not isinstance(value, str):
        return _parse_scheme(value)
    with suppress(SchemeError):
        return GgmlType.parse(value)
    try:
        return _parse_scheme(value)
    except ValueError as error:
        types = ", ".join(kind.lower() for kind in BLOCK_TYPES)
        mix = f"{value.strip().lower()} is a mix of several types for a whole file; " * (value.strip().lower() in MIXES)
        raise ValueError(f"{error}; or none; or with format: gguf a tensor's type: {mix}{types}") from error


def _parse_type(value: object) -> GgmlType:
    if isinstance(value, GgmlType):
        return value
    if not isinstance(value, str):
        raise ValueError("expected a type of GGUF's tensors such as q6_k")
    try:
        return GgmlType.parse(value)
    except SchemeError as error:
        raise ValueError(str(error)) from error


def _parse_width(value: object) -> int | Scheme:
    if isinstance(value, int) and not isinstance(value, bool):
        if 2 <= value <= 8:
            return value
        raise ValueError(f"weights can have 2 to 8 bits, found {value}")
    if isinstance(value, str) and value.strip().isdigit():
        return _parse_width(int(value))
    return _parse_scheme(value)


def _parse_scaling(value: object) -> RopeScaling:
    if isinstance(value, RopeScaling):
        return value
    if not isinstance(value, str):
        raise ValueError("expected a scaling such as yarn:2.0")
    try:
        return RopeScaling.parse(value)
    except UsageError as error:
        raise ValueError(str(error)) from error


def _text(description: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "description": description})


#: What weights are stored in where they are not quantized.
Dtype = Annotated[Literal["bfloat16", "float16", "float32"], BeforeValidator(_parse_dtype)]
#: What quantizes a layer, or one of GGUF's types.
SchemeOrMix = Annotated[
    Scheme | GgmlMix,
    PlainValidator(_parse_scheme_or_mix),
    PlainSerializer(str),
    _text("a scheme: `w4a16-g128`, `w8a8`, `nf4`, or a GGUF type: `q4_k_m`"),
]
#: ``none`` leaves a layer as it is.
OptionalScheme = Annotated[
    Scheme | GgmlType | Literal["none"],
    PlainValidator(_parse_override),
    PlainSerializer(str),
    _text("a scheme, a type of GGUF's tensors: `q6_k`, or `none`"),
]
#: One of GGUF's types of tensors.
TensorType = Annotated[
    GgmlType, PlainValidator(_parse_type), PlainSerializer(str), _text("a type of GGUF's tensors: `q6_k`")
]
#: Bits of integers, or a whole scheme.
WidthOrScheme = Annotated[
    int | Scheme,
    PlainValidator(_parse_width),
    PlainSerializer(lambda value: value if isinstance(value, int) else str(value)),
    WithJsonSchema({"type": ["integer", "string"], "description": "2 to 8, or a scheme: `nvfp4`"}),
]
#: How positions are stretched.
ScalingField = Annotated[
    RopeScaling,
    PlainValidator(_parse_scaling),
    PlainSerializer(str),
    _text("kind and factor: `yarn:2.0`, `linear:4`, `dynamic:2`"),
]


def engine_scheme(value: Scheme | GgmlType | Literal["none"] | None) -> Scheme | None:
    """What a recipe's value is to the engine, which has a scheme for each type; None for ``none`` or nothing."""
    if isinstance(value, GgmlType):
        return Scheme.of_block(value.name)
    return value if isinstance(value, Scheme) else None
