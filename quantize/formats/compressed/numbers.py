"""What compressed-tensors says of numbers (its ``QuantizationArgs``), both ways: weights, their scales, and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator

from llmconvert.compute.activations import InputKind, InputNumber
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.reading import Declared, spell
from llmconvert.quantize.numbers import E4M3, MXFP4, MXFP8, NVFP4, Int, Number
from llmconvert.quantize.scheme import Scheme

__all__ = ["CACHE_ARGS", "INTS", "Numbers", "Word", "activation_args", "weight_args", "weight_scheme"]

#: Integers that weights can be.
INTS = tuple(Int(bits, symmetric) for bits in range(2, 9) for symmetric in (True, False))

#: Letters of either case.
Word = Annotated[str, BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)]
_FLOATS = ("float16", "bfloat16", "float32", "float64")
# Strategies of weights: which columns, and which rows, share a scale.
_INTEGER_STRATEGIES = ("group", "channel")
_FLOAT_STRATEGIES = (*_INTEGER_STRATEGIES, "tensor", "block")
_NVFP4_STRATEGY, _NVFP4_GROUP, _MX_GROUP = "tensor_group", 16, 32


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


def weight_scheme(where: str, weights: Numbers, inputs: Numbers | None) -> tuple[Scheme, InputKind | str | None]:
    """The scheme of a group's linears, and how their inputs are quantized, if they are.

    Args:
        where: the group is in the config, for errors.

    Returns:
        the kind, or in words what nothing here does.

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
        return Scheme(number, size, rows=rows), None
    kind = _input_kind(inputs)
    if isinstance(number, Int):
        scheme = Scheme(number, size, 8, rows=rows, float_inputs=inputs.type == "float")
        if kind != scheme.input_kind:
            _refuse_inputs(f"{where}.input_activations", inputs, scheme)
        return scheme, kind
    bits = inputs.num_bits
    if bits not in number.activations:
        raise UnsupportedError(
            f"config.json: {where}.input_activations.num_bits is {bits}; this reader knows inputs of {number.name} "
            f"weights in {' or '.join(map(str, number.activations))} bits"
        )
    fixed = "" if inputs.dynamic is True else ", with scales that the file has"
    words = f"{inputs.num_bits}-bit {inputs.type} by {inputs.grouping}{fixed}"
    return Scheme(number, size, bits, rows=rows), words if kind is None else kind


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


def _input_kind(inputs: Numbers) -> InputKind | None:
    """What evaluation makes of inputs; None for what it doesn't know."""
    if not inputs.symmetric or (inputs.type, inputs.num_bits) not in (("int", 8), ("float", 8), ("float", 4)):
        return None
    number: InputNumber = "int8" if inputs.type == "int" else "fp8" if inputs.num_bits == 8 else "fp4"
    powers = str(inputs.scale_dtype).removeprefix("torch.") == "uint8"
    kinds: dict[tuple[str, bool | str], InputKind] = {}
    if number != "fp4":
        kinds["token", True] = InputKind(number)
    if number == "fp8":
        kinds["tensor", False] = InputKind(number, static=True)
    if number == "fp4" and inputs.group_size == _NVFP4_GROUP:
        kinds[_NVFP4_STRATEGY, "local"] = InputKind(number, _NVFP4_GROUP, "e4m3")
    if powers and inputs.group_size == _MX_GROUP:
        kinds["group", True] = InputKind(number, _MX_GROUP, "e8m0")
    elif number == "fp8" and inputs.scale_dtype is None and inputs.group_size is not None and inputs.group_size > 0:
        kinds["group", True] = InputKind(number, inputs.group_size)
    return kinds.get((inputs.grouping, inputs.dynamic))


def _refuse_inputs(where: str, inputs: Numbers, scheme: Scheme) -> None:
    """Refuse inputs of integer weights that are quantized otherwise than by token.

    Raises:
        UnsupportedError: what is measured would not be what a runtime computes.
    """
    wanted = Numbers.read({key: value for key, value in (activation_args(scheme) or {}).items() if value is not None})
    for key in ("num_bits", "type", "symmetric", "strategy", "dynamic"):
        given, known = getattr(inputs, key), getattr(wanted, key)
        if given != known:
            raise UnsupportedError(
                f"config.json: {where}.{key} is {spell(given)}; this reader knows inputs of {scheme.number.name} "
                f"weights that are quantized with {key} {spell(known)}"
            )


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


#: A cache in E4M3 under fixed scales: one for a layer's keys, one for its values.
CACHE_ARGS: Mapping[str, Any] = {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor",
    "group_size": None,
    "dynamic": False,
    "observer": "static_minmax",
    "observer_kwargs": {},
}


def weight_args(scheme: Scheme) -> dict[str, Any]:
    number = scheme.number
    strategy = "channel" if scheme.group_size is None else "group"
    if scheme.rows != 1:
        strategy = "tensor" if scheme.rows is None else "block"
    elif number.scales is not None and number.scales.shared:
        strategy = _NVFP4_STRATEGY
    return {
        "num_bits": scheme.bits,
        "type": "int" if number.parts is None else "float",
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "group_size": None if strategy == "block" else scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": [scheme.rows, scheme.group_size] if strategy == "block" else None,
        "observer": "minmax",
        "observer_kwargs": {},
        **({} if number.scales is None else {"scale_dtype": str(number.scales.dtype)}),
    }


def activation_args(scheme: Scheme) -> dict[str, Any] | None:
    kind = scheme.input_kind
    if kind is None:
        return None
    strategy = "tensor" if kind.static else "token" if kind.group is None else "group"
    scales = {"float": None, "e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}[kind.scales]
    dynamic: bool | str = not kind.static
    if kind.scales == "e4m3":
        strategy, dynamic = _NVFP4_STRATEGY, "local"
    return {
        "num_bits": 4 if kind.number == "fp4" else 8,
        "type": "int" if kind.number == "int8" else "float",
        "symmetric": True,
        "strategy": strategy,
        "group_size": kind.group,
        "dynamic": dynamic,
        "observer": "static_minmax" if kind.calibrated else None,
        "observer_kwargs": {},
        **({} if scales is None else {"scale_dtype": scales}),
    }
