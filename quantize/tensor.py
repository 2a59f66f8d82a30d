"""The canonical quantized weight: unpacked codes with scales and zero points.

Algorithms produce it, formats pack it, readers dequantize it: ``w = (value of code - zero) * scale + offset``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from llmconvert.quantize.scheme import Scheme

__all__ = ["NESTED_GROUP", "NestedScales", "QuantizedTensor", "SuperBlockScales", "dynamic_levels", "scaled"]

#: Scales that share a scale of their own.
NESTED_GROUP = 256
# bitsandbytes divides by no less.
_SMALLEST = 1e-38
_STEPS = 65_535
_EXPONENTS = 7


def dynamic_levels(device: torch.device | None = None) -> torch.Tensor:
    """The 256 values of 8-bit dynamic floats (Dettmers 2016, arXiv 1511.04561), ascending, float32.

    The smaller one is, the fewer bits of it are left.
    """
    positive: list[float] = []
    for exponent in range(_EXPONENTS):
        edges = torch.linspace(0.1, 1, (1 << exponent) + 1, dtype=torch.float32)
        positive += ((10 ** (exponent - _EXPONENTS + 1)) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
    values = sorted([*positive, *(-value for value in positive), 0.0, 1.0])
    return torch.tensor(values, dtype=torch.float32, device=device)


@dataclass(frozen=True, slots=True)
class NestedScales:
    """Scales that are quantized themselves: the double quantization of QLoRA, bit for bit as bitsandbytes has it.

    Less their mean, they are quantized :data:`NESTED_GROUP` at a time to 8-bit dynamic floats.

    Attributes:
        codes: uint8 ``[rows · groups]``, one per scale of the flattened weight.
        absmax: float32, one per 256 codes.
        offset: float32 scalar tensor, added to all of them.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    offset: torch.Tensor

    @classmethod
    def quantize(cls, scale: torch.Tensor) -> NestedScales:
        """Quantize scales, float32 of any shape; flattened."""
        offset = scale.mean()
        centred = (scale - offset).reshape(-1)
        padded = torch.nn.functional.pad(centred, (0, -len(centred) % NESTED_GROUP)).view(-1, NESTED_GROUP)
        absmax = padded.abs().amax(-1)
        levels = dynamic_levels(scale.device)
        values = padded * (1.0 / absmax.clamp(min=_SMALLEST)).unsqueeze(-1)
        # bitsandbytes looks levels up in a table of 2¹⁶ steps; what lies next to a middle falls where its step does.
        values = torch.floor((values + 1) * 0.5 * _STEPS + 0.5) / _STEPS * 2 - 1
        middles = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(values, middles).where(absmax.unsqueeze(-1) > 0, 0).to(torch.uint8)
        return cls(codes.view(-1)[: len(centred)].contiguous(), absmax, offset)

    def dequantize(self) -> torch.Tensor:
        """The scales that were quantized, float32 ``[rows · groups]``."""
        values = dynamic_levels(self.codes.device)[self.codes.int()]
        return values * self.absmax.repeat_interleave(NESTED_GROUP)[: len(values)] + self.offset


def scaled(values: torch.Tensor, scale: torch.Tensor, size: int) -> torch.Tensor:
    """Values times their scales, in place.

    Args:
        values: float32 ``[rows, columns]``, contiguous.
        scale: float32 ``[rows, groups]`` or ``[1, groups]``.
        size: columns per group; the last group may be cut off.
    """
    whole, rest = divmod(values.shape[1], size)
    values[:, : whole * size].unflatten(1, (whole, size)).mul_(scale[:, :whole].unsqueeze(-1))
    if rest:
        values[:, whole * size :].mul_(scale[:, whole:])
    return values


@dataclass(frozen=True, slots=True)
class SuperBlockScales:
    """Scales, and minima, of GGML's super-blocks: small integers, times a float16 for the whole super-block.

    Attributes:
        scale: float16 ``[rows, super-blocks]``.
        subs: int16 ``[rows, groups]``, the integers.
        limits: the least and the greatest of these.
        minimum: as ``scale``, for the minima, which are taken off; None for types without.
        sub_minima: as ``subs``.
    """

    scale: torch.Tensor
    subs: torch.Tensor
    limits: tuple[int, int]
    minimum: torch.Tensor | None = None
    sub_minima: torch.Tensor | None = None

    @property
    def steps(self) -> torch.Tensor:
        """What codes are multiplied by, float32 ``[rows, groups]``."""
        return self.scale.float().repeat_interleave(self._groups, 1) * self.subs.float()

    @property
    def offsets(self) -> torch.Tensor | None:
        """What is added then, likewise; None for types without minima."""
        if self.minimum is None or self.sub_minima is None:
            return None
        return -(self.minimum.float().repeat_interleave(self._groups, 1) * self.sub_minima.float())

    @property
    def _groups(self) -> int:
        """Of a super-block."""
        return self.subs.shape[1] // self.scale.shape[1]

    def rows(self, start: int, stop: int) -> SuperBlockScales:
        """Those of the rows ``start:stop``, sharing memory."""
        least, most = self.minimum, self.sub_minima
        return replace(
            self,
            scale=self.scale[start:stop],
            subs=self.subs[start:stop],
            minimum=None if least is None else least[start:stop],
            sub_minima=None if most is None else most[start:stop],
        )

    @classmethod
    def concatenate(cls, parts: Sequence[SuperBlockScales]) -> SuperBlockScales:
        """Those of one type, one below the other."""
        minima = [part.minimum for part in parts if part.minimum is not None]
        subs = [part.sub_minima for part in parts if part.sub_minima is not None]
        return cls(
            torch.cat([part.scale for part in parts]),
            torch.cat([part.subs for part in parts]),
            parts[0].limits,
            torch.cat(minima) if minima else None,
            torch.cat(subs) if subs else None,
        )

    def nearest_step(self, group: int, wanted: torch.Tensor) -> torch.Tensor:
        """The scales next to ``wanted`` ``[rows]`` that a group can have, float32 ``[rows]``."""
        return _multiple(self.scale[:, group // self._groups], wanted, self.limits)

    def nearest_offset(self, group: int, wanted: torch.Tensor) -> torch.Tensor:
        """The same for what is added to its values."""
        assert self.minimum is not None
        return -_multiple(self.minimum[:, group // self._groups], -wanted, self.limits)

    def moved(self, scale: torch.Tensor, offset: torch.Tensor | None) -> SuperBlockScales:
        """With the integers that give these scales and offsets, which :meth:`nearest_step` and its like gave."""
        subs = _factors(self.scale.repeat_interleave(self._groups, 1), scale, self.subs)
        if offset is None or self.minimum is None or self.sub_minima is None:
            return replace(self, subs=subs)
        minima = _factors(self.minimum.repeat_interleave(self._groups, 1), -offset, self.sub_minima)
        return replace(self, subs=subs, sub_minima=minima)


def _multiple(unit: torch.Tensor, wanted: torch.Tensor, limits: tuple[int, int]) -> torch.Tensor:
    """``unit`` times the integer that comes next to ``wanted``."""
    unit = unit.float()
    count = torch.round(wanted.float() / unit).clamp_(*limits)
    return (unit * count).where(unit != 0, 0.0).to(wanted.dtype)


def _factors(unit: torch.Tensor, value: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The integers that ``value`` is of ``unit``; what was there before where the unit is zero."""
    return torch.round(value.float() / unit.float()).where(unit != 0, before.float()).to(before.dtype)


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A weight of shape ``[rows, columns]`` as codes.

    Attributes:
        codes: ``[rows, columns]`` in the number's ``code_dtype``: int8, signed also when there are zero points, or E4M3
            floats.
        scale: ``[rows, groups]`` (of blocks: see :meth:`~llmconvert.quantize.scheme.Scheme.scale_shape`) in the dtype
            the format stores, so that what an algorithm saw is what is written; where it stores numbers of 8 bits, what
            they stand for, float32.
        zero: int8 ``[rows, groups]`` in the range of the codes, or None for symmetric schemes.
        scheme: number and grouping.
        nested: what ``scale`` and ``offset`` are stored as, for schemes that quantize them too; None for all others.
        divisor: float32, one number: what all scales are divided by, where they are stored as numbers that share one
            (:attr:`~llmconvert.quantize.numbers.ScaleNumber.shared`); None for all others.
        offset: as ``scale``, what is added to the values, for numbers with minima; None for all others.
        input_scale: ``[1]``, what calibration has fixed of how the linear's inputs are quantized
            (:meth:`~llmconvert.compute.activations.InputKind.scale_for`); None where nothing is.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    scheme: Scheme
    nested: NestedScales | SuperBlockScales | None = None
    divisor: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        expected = self.scheme.scale_shape(rows, columns)
        held_in = self.scheme.number.code_dtype
        if self.codes.dtype != held_in:
            raise ValueError(f"codes must be {str(held_in)[6:]}, found {self.codes.dtype}")
        if tuple(self.scale.shape) != expected:
            raise ValueError(f"scale must have shape {expected}, found {tuple(self.scale.shape)}")
        if (self.zero is None) != self.scheme.symmetric:
            raise ValueError(f"scheme {self.scheme} {'has no' if self.scheme.symmetric else 'needs a'} zero point")
        if self.zero is not None and (tuple(self.zero.shape) != expected or self.zero.dtype != torch.int8):
            raise ValueError(f"zero must be int8 {expected}, found {self.zero.dtype} {tuple(self.zero.shape)}")
        if (self.offset is not None) != self.scheme.number.minima:
            raise ValueError(f"scheme {self.scheme} {'needs' if self.scheme.number.minima else 'has no'} offsets")
        if (self.nested is not None) != self.scheme.nested:
            raise ValueError(f"scheme {self.scheme} {'needs' if self.scheme.nested else 'has no'} nested scales")
        scales = self.scheme.number.scales
        if (self.divisor is not None) != (scales is not None and scales.shared):
            raise ValueError(f"scheme {self.scheme} {'has no' if self.divisor is not None else 'needs a'} divisor")

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, columns)`` of the weight."""
        rows, columns = self.codes.shape
        return rows, columns

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """The rows ``start:stop``, sharing memory; of blocks whole ones. QLoRA's nested scales cannot be cut: they run
        over all rows."""
        zero = None if self.zero is None else self.zero[start:stop]
        offset = None if self.offset is None else self.offset[start:stop]
        nested = self.nested.rows(start, stop) if isinstance(self.nested, SuperBlockScales) else None
        size = self.scheme.rows or self.codes.shape[0]
        if start % size:
            raise ValueError(f"row {start} lies inside a block of {size}")
        scale = self.scale[start // size : -(-stop // size)]
        return QuantizedTensor(self.codes[start:stop], scale, zero, self.scheme, nested, self.divisor, offset)

    @classmethod
    def concatenate(cls, parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
        """Tensors of one scheme and width, one below the other."""
        if len(parts) == 1:
            return parts[0]
        divisor = parts[0].divisor
        apart = divisor is not None and any(part.divisor is None or part.divisor != divisor for part in parts)
        if parts[0].scheme.rows != 1 or apart:
            raise ValueError(f"tensors in {parts[0].scheme} have scales that rows share; they can't be joined")
        zeros = [part.zero for part in parts if part.zero is not None]
        offsets = [part.offset for part in parts if part.offset is not None]
        nested = [part.nested for part in parts if isinstance(part.nested, SuperBlockScales)]
        return cls(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat(zeros) if zeros else None,
            parts[0].scheme,
            SuperBlockScales.concatenate(nested) if nested else None,
            divisor,
            offset=torch.cat(offsets) if offsets else None,
        )

    @property
    def factors(self) -> torch.Tensor:
        """What a code's value is multiplied by: float32 in the shape of ``scale``."""
        return self.scale.float() if self.divisor is None else self.scale.float() / self.divisor

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight these codes stand for, ``[rows, columns]``, computed in float32 and rounded once to ``dtype``."""
        rows, columns = self.codes.shape
        if self.scheme.rows != 1 or self.scheme.number.scales is not None:
            factors = self.factors.repeat_interleave(self.scheme.rows or rows, dim=0)[:rows]
            values = self.scheme.number.values(self.codes)
            return scaled(values, factors, self.scheme.columns_per_group(columns)).to(dtype)
        grouped = self.scheme.number.values(self.codes).reshape(rows, self.scale.shape[1], -1)
        if self.zero is not None:
            grouped -= self.zero.unsqueeze(-1).float()
        grouped *= self.scale.unsqueeze(-1).float()
        if self.offset is not None:
            grouped += self.offset.unsqueeze(-1).float()
        return grouped.reshape(rows, columns).to(dtype)
