"""Weights as codes with a grid of scales beside them, matrices and fused experts: what formats of floats share.

A matrix ``[rows, columns]`` has one scale for all of it, for each row, for each group of columns in a row, or for each
block of rows and columns; the last blocks may be cut off. Experts of a layer may lie in one tensor, ``[experts, rows,
columns]``, with a grid for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmconvert.compute.activations import InputKind
from llmconvert.compute.scale_numbers import E8M0
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.base import FLOATS, StoredLinear
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor, scaled
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["EXPONENTS", "ScaledLinear", "require_scales"]

#: Dtypes that scales of powers of two are stored in.
EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)


@dataclass(frozen=True)
class ScaledLinear(StoredLinear):
    """A matrix, or the experts' in one tensor, as codes of a number with a grid of scales.

    Attributes:
        name: of the dense weight.
        codes: the tensor that holds codes: in the number's dtype, or two 4-bit ones in a byte, the lower half first.
        scale: the tensor that holds scales, in a shape that has the grid's numbers in order.
        factor: a tensor of one number that every scale is multiplied by; "" for none.
        divisor: a tensor of one number that every scale is divided by; "" for none.
        transposed: whether experts are stored ``[experts, outputs, inputs]`` and the model has inputs before outputs.
        channels_last: whether the output channels, which have a scale each, are the stored matrix's columns.
        inputs_in_words: see :attr:`unmeasured_inputs`.
        kind: how its inputs are quantized; None if they are not, or not here.
        input_scale: the tensor that holds what is fixed of it; "" for none.
    """

    name: str
    codes: str
    scale: str
    factor: str = ""
    divisor: str = ""
    transposed: bool = False
    channels_last: bool = False
    inputs_in_words: str = ""
    kind: InputKind | None = None
    input_scale: str = ""

    @property
    def weight(self) -> str:
        return self.name

    @property
    def unmeasured_inputs(self) -> str:
        return self.inputs_in_words

    @property
    def input_kind(self) -> InputKind | None:
        return self.kind

    def inputs(self, checkpoint: Checkpoint) -> InputKind | None:
        if self.kind is None or not self.input_scale:
            return self.kind
        return self.kind.at(checkpoint[self.input_scale].float())

    def read_rows(self, checkpoint: Checkpoint, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        if len(self.shape) == 2:
            scheme = self.scheme
            size = scheme.rows or self.shape[0]
            scale = self._scales(checkpoint, start // size, -(-stop // size))
            # One row of scales for each row of the weight, unless all have the same.
            if not self.channels_last and len(scale) > 1 and size > 1:
                scale = scale[torch.arange(start, stop) // size - start // size]
            return self._matrix(checkpoint.read_rows(self.codes, start, stop), scale).to(dtype)
        out = torch.empty((stop - start, *self.shape[1:]), dtype=dtype)
        for index in range(start, stop):
            codes = checkpoint.read_rows(self.codes, index, index + 1)[0].flatten(1)
            scale = self._grid(checkpoint, checkpoint.read_rows(self.scale, index, index + 1), len(codes))
            if not self.channels_last and len(scale) > 1:
                scale = scale.repeat_interleave(self.scheme.rows or len(codes), 0)[: len(codes)]
            matrix = self._matrix(codes, scale)
            out[index - start] = matrix.T if self.transposed else matrix
        return out

    def read(self, checkpoint: Checkpoint) -> QuantizedTensor:
        if len(self.shape) != 2 or self.factor or self.channels_last:
            raise UnsupportedError(
                f"{self.linear}: is stored in a layout of its own, which no other format holds as it is"
            )
        rows, columns = self.shape
        scale = checkpoint[self.scale].reshape(self.scheme.scale_shape(rows, columns))
        scales = E8M0 if scale.dtype in EXPONENTS else self.scheme.number.scales
        if scales is not None:
            scale = scales.values(scale)
        divisor = checkpoint[self.divisor].float().reshape(()) if self.divisor else None
        fixed = checkpoint[self.input_scale].reshape(1) if self.input_scale else None
        codes = self._unpacked(checkpoint[self.codes])
        return QuantizedTensor(codes, scale, None, self.scheme, divisor=divisor, input_scale=fixed)

    def _scales(self, checkpoint: Checkpoint, start: int, stop: int) -> torch.Tensor:
        """The grid's rows ``start:stop``, float32; all of a grid that has one row."""
        shape = checkpoint.infos[self.scale].shape
        if math.prod(shape) == 1 or self.channels_last or self.scheme.rows is None:
            return self._grid(checkpoint, checkpoint[self.scale], self.shape[0])
        return self._grid(checkpoint, checkpoint.read_rows(self.scale, start, stop), (stop - start) * self.scheme.rows)

    def _grid(self, checkpoint: Checkpoint, raw: torch.Tensor, rows: int) -> torch.Tensor:
        """Stored scales of ``rows`` rows as float32 ``[1 or block rows, groups]``."""
        values = E8M0.values(raw) if raw.dtype in EXPONENTS else raw.float()
        height = 1 if self.channels_last else self.scheme.scale_shape(rows, 1)[0]
        grid = values.reshape(height, -1)
        if self.factor:
            return grid * checkpoint[self.factor].float().reshape(())
        return grid / checkpoint[self.divisor].float().reshape(()) if self.divisor else grid

    def _matrix(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """float32 ``[rows, columns]`` of codes, and scales for each row or for all."""
        values = self.scheme.number.values(self._unpacked(codes)).contiguous()
        return scaled(values, scale, 1 if self.channels_last else self.scheme.columns_per_group(values.shape[1]))

    def _unpacked(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes in the number's dtype, ``[rows, columns]``."""
        if self.scheme.bits == 4:
            pairs = codes.contiguous().view(torch.uint8)
            return torch.stack((pairs & 15, pairs >> 4), -1).flatten(1).view(torch.int8)
        return codes


def require_scales(
    checkpoint: Checkpoint, name: str, weight: str, scheme: Scheme, shape: Sequence[int], *, last: bool = False
) -> None:
    """Refuse scales that are not there, or don't fit a weight.

    Args:
        name: of the scales.
        weight: what they belong to, for errors.
        scheme: of the weight.
        shape: of the stored matrix in codes, ``[rows, columns]`` or ``[experts, rows, columns]``.
        last: see :attr:`ScaledLinear.channels_last`.

    Raises:
        CheckpointError: they are missing, or of another shape.
        UnsupportedError: of a dtype that is not read.
    """
    found = checkpoint.infos.get(name)
    if found is None:
        raise CheckpointError(f"tensor {weight!r} holds codes, and there is no tensor {name!r} with their scales")
    *experts, rows, columns = shape
    grid = (1, columns) if last else scheme.scale_shape(rows, columns)
    expected = (*experts, *grid)
    if [side for side in found.shape if side != 1] != [side for side in expected if side != 1]:
        raise CheckpointError(
            f"tensor {name!r} has shape {list(found.shape)}; {weight!r} of {list(shape)} in {scheme} "
            f"needs {list(expected)}"
        )
    scales = scheme.number.scales
    allowed = (*FLOATS, *EXPONENTS) if scales is None else EXPONENTS if scales is E8M0 else (scales.dtype,)
    if found.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise UnsupportedError(
            f"tensor {name!r} is {str(found.dtype).removeprefix('torch.')}; this reader knows scales in {names}"
        )
