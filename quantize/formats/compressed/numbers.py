"""What compressed-tensors says of numbers (its ``QuantizationArgs``), both ways: weights, their scales, and inputs."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.reading import Declared, spell
from llmconvert.quantize.numbers import E4M3, MXFP4, MXFP8, NVFP4, Int, Number
from llmconvert.quantize.scheme import Scheme

__all__ = ["INTS", "Numbers", "Word", "activation_args", "weight_args", "weight_scheme"]

#: Integers that weights can be.
INTS = tuple(Int(bits, symmetric) for bits in range(2, 9) for symmetric in (True, False))

#: Letters of either case.
Word = Annotated[str, BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)]
_FLOATS = ("float16", "bfloat16", "float32", "float64")
# Strategies of weights: which columns, and which rows, share a scale.
_INTEGER_STRATEGIES = ("group", "channel")
_FLOAT_STRATEGIES = (*_INTEGER_STRATEGIES, "tensor", "block")
_NVFP4_STRATEGY, _MX_GROUP = "tensor_group", 32


class Numbers(Declared):
    """What weights or activations are quantized to, with the library's defaults."""

    silent: ClassVar[frozenset[str]] = frozenset(("observer", "observer_kwargs", "zp_dtype"))

    num_bits: int = 8
    type: Word = "int"
    symmetric: bool = True
    strategy: Word | None = None
    group_size: int | None = None
    dynamic: bool | str = False
    actorder: bool | Word | None = None
    block_structure: Any = None
    scale_dtype: str | None = None

    @property
    def grouping(self) -> str:
        """The strategy; where none is declared, the one that the group size implies."""
        if self.strategy is not None:
            return self.strategy
        return {None: "tensor", -1: "channel"}.get(self.group_size, "group")

    @property
    def ordered(self) -> bool:
        """Whether groups are of columns in another order, which each linear has beside it."""
        return self.actorder in (True, "group", "dynamic")


def weight_scheme(where: str, weights: Numbers, inputs: Numbers | None) -> tuple[Scheme, str]:
    """The scheme of a group's linears, and how their inputs are quantized where nothing here does that ("" otherwise).

    Args:
        where: the group is in the config, for errors.

    Raises:
        UnsupportedError: something is not read here.
        CheckpointError: a size is missing, or is none.
    """
    number = _number(weights)
    if number is None or weights.grouping not in _strategies(number):
        raise UnsupportedError(
            f"compressed-tensors weights of {weights.num_bits}-bit type {weights.type!r} with strategy "
            f"{weights.grouping!r}; this reader knows int and 8-bit float weights by group or channel, 8-bit float "
            f"weights by tensor or block, and 4-bit float ones in the groups of NVFP4 and MXFP4"
        )
    if weights.scale_dtype is not None and weights.scale_dtype.removeprefix("torch.") not in _scale_dtypes(number):
        raise UnsupportedError(
            f"config.json: {where}.weights.scale_dtype is {weights.scale_dtype}; this reader knows scales in "
            f"{', '.join(_scale_dtypes(number))}"
        )
    rows, size = _block(where, weights)
    if inputs is None:
        return Scheme(number, size, rows=rows), ""
    bits = 8 if isinstance(number, Int) else inputs.num_bits
    if bits not in number.activations:
        raise UnsupportedError(
            f"config.json: {where}.input_activations.num_bits is {bits}; this reader knows inputs of {number.name} "
            f"weights in {' or '.join(map(str, number.activations))} bits"
        )
    scheme = Scheme(number, size, bits, rows=rows)
    return scheme, _check_inputs(f"{where}.input_activations", inputs, scheme)


def _block(where: str, weights: Numbers) -> tuple[int | None, int | None]:
    """Rows and columns that share a scale; None for all.

    Raises:
        CheckpointError: a size is missing, or is none.
    """
    if weights.grouping == "block":
        shape = weights.block_structure
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(side) is int and side > 0 for side in shape):
            raise CheckpointError(
                f"config.json: {where}.weights.block_structure: expected two positive numbers, found {spell(shape)}"
            )
        return shape[0], shape[1]
    if weights.grouping == "tensor":
        return None, None
    if weights.grouping == "channel":
        return 1, None
    if weights.group_size is None or weights.group_size < 1:
        raise CheckpointError(
            f"config.json: {where}.weights.group_size: expected a positive number, found {weights.group_size}"
        )
    return 1, weights.group_size


def _strategies(number: Number) -> tuple[str, ...]:
    if number == E4M3:
        return _FLOAT_STRATEGIES
    if isinstance(number, Int):
        return _INTEGER_STRATEGIES
    return (_NVFP4_STRATEGY,) if number == NVFP4 else ("group",)


def _scale_dtypes(number: Number) -> tuple[str, ...]:
    if number.scales is None:
        return _FLOATS
    return (str(number.scales.dtype).removeprefix("torch."),)


def _check_inputs(where: str, inputs: Numbers, scheme: Scheme) -> str:
    """How inputs are quantized, where nothing here does that: those of integer weights can be as written here alone,
    those of floats otherwise, in groups or by a scale that a file has.

    Raises:
        UnsupportedError: what is measured would not be what a runtime computes.
    """
    if not isinstance(scheme.number, Int):
        by_token = inputs.grouping == "token" and inputs.dynamic is True and inputs.type == "float"
        if by_token and scheme.input_kind is not None and inputs.symmetric:
            return ""
        fixed = "" if inputs.dynamic is True else ", with scales that the file has"
        return f"{inputs.num_bits}-bit {inputs.type} by {inputs.grouping}{fixed}"
    wanted = Numbers.read({key: value for key, value in (activation_args(scheme) or {}).items() if value is not None})
    for key in ("num_bits", "type", "symmetric", "strategy", "dynamic"):
        given, known = getattr(inputs, key), getattr(wanted, key)
        if given != known:
            raise UnsupportedError(
                f"config.json: {where}.{key} is {spell(given)}; this reader knows inputs of {scheme.number.name} "
                f"weights that are quantized with {key} {spell(known)}"
            )
    return ""


def _number(weights: Numbers) -> Number | None:
    """What a config's weights are; None for what is not read here."""
    if weights.dynamic is not False:
        return None
    if weights.type == "float":
        return _float(weights) if weights.symmetric else None
    number = Int(weights.num_bits, weights.symmetric)
    return number if weights.type == "int" and number in INTS else None


def _float(weights: Numbers) -> Number | None:
    powers = str(weights.scale_dtype).removeprefix("torch.") == "uint8"
    if weights.num_bits == MXFP8.bits:
        return MXFP8 if powers and weights.group_size == _MX_GROUP else E4M3
    if weights.num_bits != NVFP4.bits:
        return None
    if weights.grouping == _NVFP4_STRATEGY:
        return NVFP4
    return MXFP4 if weights.group_size == _MX_GROUP else None


def _type(scheme: Scheme) -> str:
    return "float" if scheme.number == E4M3 else "int"


def weight_args(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": _type(scheme),
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def activation_args(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.activation_bits == 16:
        return None
    return {
        "num_bits": 8,
        "type": _type(scheme),
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
        "observer": None,
        "observer_kwargs": {},
    }
