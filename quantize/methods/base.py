"""The protocol of a quantization method; which there are is in ``quantize/catalog/methods.py``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch

from llmconvert.engine.discovery import Stop
from llmconvert.engine.skeleton import BlockCall
from llmconvert.engine.statistics import Hessian
from llmconvert.errors import UnsupportedError
from llmconvert.gguf.ggml.blocks import Codec
from llmconvert.quantize.catalog.methods import METHODS, check_options, require_method
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor

__all__ = [
    "AimingQuantizer",
    "BlockData",
    "BlockQuantizer",
    "Calibration",
    "GgmlQuantizer",
    "InputSquares",
    "Method",
    "Numbers",
    "Quantizer",
    "ScaledEdge",
    "ScalingQuantizer",
    "Solution",
    "Target",
    "load_method",
    "load_quantizer",
]

#: What a method wants to see of the running model: nothing; of its linears' inputs the mean squares, or all second
#: moments; whole blocks.
Calibration = Literal["none", "squares", "inputs", "block"]


#: Which numbers a method can choose codes of: all there are; those whose levels lie evenly; these and floats; these and
#: all that lie in a table, under any scales, so that GGML's types are among them; or none but GGML's types.
Numbers = Literal["any", "even", "scaled", "solved", "none"]


@dataclass(frozen=True, slots=True)
class Target:
    """A weight to quantize.

    Attributes:
        name: its linear's.
        weight: values ``[rows, columns]`` in any floating dtype.
        scheme: its own.
        reach: the largest magnitude of all weights that have a float32 scale in common with it, where the scheme's
            scales are below one (NVFP4); 0 where these are told together, or there are no others.
    """

    name: str
    weight: torch.Tensor
    scheme: Scheme
    reach: float = 0.0


@dataclass(frozen=True, slots=True)
class Solution:
    """A quantized weight, and what its method knows about it.

    Attributes:
        tensor: the weight.
        error: squared error of the linear's output over its squared output, on the calibration inputs; None if the
            method has none.
        damping: share of the mean diagonal that the Hessian needed; None without one.
        tokens: of calibration text that the router sent to the expert that the weight belongs to; None of others.
        energy: the squared output per token that the error is a share of; None where there is none.
    """

    tensor: QuantizedTensor
    error: float | None = None
    damping: float | None = None
    tokens: int | None = None
    energy: float | None = None


@dataclass(frozen=True, slots=True)
class InputSquares:
    """What is known of a linear that the artifact's container encodes in a type of its own.

    Attributes:
        mean: float32 ``[columns]``, the mean squares of its inputs in the original model.
    """

    mean: torch.Tensor


@dataclass(frozen=True, slots=True)
class BlockData:
    """A decoder block with its calibration data.

    Attributes:
        prefix: what the names of its linears begin with, ``model.layers.0.``.
        parameters: target → what the block calls the parameter that holds it.
        stops: the targets by the input, and so the moments, that they share, in the order a batch reaches them.
        tokens: length of each batch.
        entries: for batch indices, what those batches enter the block with: the hidden state ``[1, length, width]``
            in the model quantized so far, and the call that takes it.
        originals: the same in the original model, to be asked for before any outputs.
        outputs: for batch indices, what the original block gives for the original model's hidden state.
    """

    prefix: str
    parameters: Mapping[str, str]
    stops: tuple[Stop, ...]
    tokens: tuple[int, ...]
    entries: Callable[[Iterable[int]], Iterator[tuple[torch.Tensor, BlockCall]]]
    originals: Callable[[Iterable[int]], Iterator[tuple[torch.Tensor, BlockCall]]]
    outputs: Callable[[Iterable[int]], Iterator[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class ScaledEdge:
    """Linears whose input columns may be scaled, because what produces them can be divided by the same.

    Attributes:
        targets: the linears, which share their input; weights must not be changed. They may be read anew each time
            that they are gone through, one after the other: keep none.
        channels: int64 ``[columns]``, the producer's channel behind each column; columns of one channel need one scale.
        hessian: of the inputs, if the method asks for moments.
        mean: float32 ``[columns]``, mean magnitude of the inputs over the tokens.
        largest: float32 ``[columns]``, their largest magnitude.
        sample: the inputs at some tokens, ``[tokens, columns]``, if the method asks for any.
        binary: whether scales have to be powers of two, because others see the producer whose values are not to change.
    """

    targets: Iterable[Target]
    channels: torch.Tensor
    hessian: Hessian | None
    mean: torch.Tensor
    largest: torch.Tensor
    sample: torch.Tensor | None = None
    binary: bool = False


class Method(Protocol):
    """What is asked of any method before it is run; it is a :class:`Quantizer`, a :class:`GgmlQuantizer`, or both."""

    calibration: ClassVar[Calibration]
    #: Whether it also wants to see what the original, unquantized model makes of the text.
    original: ClassVar[bool]
    #: Which numbers of a scheme's it can choose codes of.
    numbers: ClassVar[Numbers]


@runtime_checkable
class Quantizer(Method, Protocol):
    """A method that chooses the codes of schemes: statistics and weights in, codes out."""

    def quantize(
        self, targets: Sequence[Target], hessian: Hessian | None, scale_dtype: torch.dtype
    ) -> dict[str, Solution]:
        """Quantize linears that share one input; ``hessian`` is theirs to overwrite, None without calibration.

        Raises:
            CheckpointError: a weight is not finite.
            CalibrationError: the statistics are unusable.
        """

    def nbytes(self, rows: int, columns: int) -> int:
        """Peak bytes of :meth:`quantize` beside the weights and the Hessian, for ``rows`` in all."""


@runtime_checkable
class AimingQuantizer(Quantizer, Protocol):
    """A method that aims at the original's outputs; its ``calibration`` is ``inputs``, ``original`` is set."""

    @property
    def residual(self) -> float:
        """How much of what the residual stream has lost before a linear that adds to it this is to make up for."""


@runtime_checkable
class GgmlQuantizer(Method, Protocol):
    """A method that chooses the codes of GGML's block types; its ``calibration`` is ``none`` or ``squares``."""

    def encode(self, codec: Codec, rows: torch.Tensor, squares: torch.Tensor | None) -> torch.Tensor:
        """The bytes of rows in a tensor type.

        Args:
            codec: the type.
            rows: finite float32 ``[rows, columns]``, in the file's order.
            squares: float32 ``[columns]``, the mean squares of the inputs that meet each column on calibration text;
                None without calibration, and for tensors that are no linear of a block.

        Returns:
            uint8 ``[rows, row bytes]``.
        """


@runtime_checkable
class BlockQuantizer(Quantizer, Protocol):
    """A method that takes all linears of a block at once; its ``calibration`` is ``block``, ``original`` is set."""

    def quantize_block(
        self, targets: Sequence[Target], data: BlockData, scale_dtype: torch.dtype
    ) -> dict[str, Solution]:
        """Quantize the linears of a block; weights in the targets must not be changed.

        Raises:
            CheckpointError: a weight is not finite.
            CalibrationError: the block's activations are unusable.
        """

    def refine(
        self, targets: Sequence[Target], started: Mapping[str, Solution], data: BlockData
    ) -> dict[str, Solution]:
        """The part of :meth:`quantize_block` that begins with solutions; asks for entries and outputs alone.

        Raises:
            CalibrationError: the block's activations are unusable.
        """

    def block_nbytes(self, weights: int, batch: int) -> int:
        """Peak bytes of :meth:`quantize_block` beside the block.

        Args:
            weights: how many numbers the block's targets have in all.
            batch: most bytes that one batch has alive inside the block in a forward pass without gradients.
        """


@runtime_checkable
class ScalingQuantizer(Quantizer, Protocol):
    """A method that moves scales from activations to weights before it quantizes; its ``calibration`` is ``inputs``."""

    #: Whether :meth:`scales` wants second moments.
    moments: ClassVar[bool]
    #: At how many tokens, about, it wants the inputs themselves.
    sample_tokens: ClassVar[int]

    def scales(self, edge: ScaledEdge, scale_dtype: torch.dtype) -> torch.Tensor:
        """What the columns of an edge's linears are to be multiplied by: ``[columns]``, positive, alike for a channel.

        Raises:
            CheckpointError: a weight is not finite.
        """

    def scales_nbytes(self, rows: int, columns: int) -> int:
        """Peak bytes of :meth:`scales` beside weights and statistics, for ``rows`` in all."""


def load_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method of that name with its options.

    Raises:
        UnsupportedError: there is none of that name, or it has no such option.
    """
    require_method(name)
    module, _, attribute = METHODS[name].partition(":")
    made = getattr(importlib.import_module(module), attribute)
    check_options(name, (option for option in options if option not in {field.name for field in fields(made)}))
    try:
        instance: Method = made(**options)
    except TypeError as error:  # a comparison of a value with one of another type
        raise UnsupportedError(
            f"method {name!r}: an option's value is of another type than expected: {error}"
        ) from error
    return instance


def load_quantizer(name: str, options: Mapping[str, Any]) -> Quantizer:
    """The method of that name with its options, for codes of schemes.

    Raises:
        UnsupportedError: see :func:`load_method`; or the method chooses codes of GGML's types alone.
    """
    method = load_method(name, options)
    if not isinstance(method, Quantizer):
        raise UnsupportedError(f"method {name!r} chooses codes of GGUF types only; it needs a scheme such as q4_k_m")
    return method
