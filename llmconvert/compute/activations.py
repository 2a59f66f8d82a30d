"""Activation quantization as runtimes do it before each linear: by token, by group of columns, or by a fixed scale.

What is computed are the values the codes stand for, in the dtype of the input: the product that follows then equals
that of an integer or float kernel up to the rounding of its sums. The formulas are those of compressed-tensors' fake
quantization, which transformers runs, bit for bit: symmetric, a largest magnitude at the middle between the two
outermost codes of integers or at the largest float, scales in the input's dtype unless they are numbers of 8 bits.

vLLM does otherwise (its ``csrc/cpu/dnnl_kernels.cpp``, the Triton and CUDA kernels of ``scaled_int8_quant``, and
``input_quant_fp8.py``): a largest magnitude is the code 127 of integers, scales and quotients are float32, and those
of E4M3 have a least value. Codes and scales are computed so for :attr:`InputKind.runtime` ``vllm``; what they stand for
is rounded to the input's dtype here, where its kernels multiply the codes and scale their sums. Scales that are numbers
of 8 bits are the same in both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from llmconvert.compute.saturation import Saturation
from llmconvert.compute.scale_numbers import E4M3_SCALES, E8M0
from llmconvert.compute.small_floats import E2M1_PARTS, E4M3_PARTS

__all__ = ["ActivationRuntime", "InputKind", "InputNumber", "InputQuantizer", "quantize_input", "round_by"]

InputNumber = Literal["int8", "fp8", "fp4"]
#: Whose formulas inputs are quantized by.
ActivationRuntime = Literal["transformers", "vllm"]

_FP8 = torch.float8_e4m3fn
# What the largest magnitude comes to: half the range of all codes; the largest float.
_LARGEST = {"int8": 127.5, "fp8": E4M3_PARTS.largest, "fp4": E2M1_PARTS.largest}
# Exponents of the largest power of two below; a magnitude from 1¾ of a power on counts as the next one.
# vLLM's scales: the code of a largest magnitude, and what those of E4M3 are at least.
_VLLM_LARGEST, _VLLM_LEAST = {"int8": 127.0, "fp8": E4M3_PARTS.largest}, 1 / (E4M3_PARTS.largest * 512)
_TOP = {"fp8": 8, "fp4": 2}
_NEXT_POWER = 1.75 / 2
# Half the distance of the two largest E4M3 numbers.
_HALF_STEP = 16.0


@dataclass(frozen=True, slots=True)
class InputKind:
    """How a linear's inputs are quantized.

    Attributes:
        number: of the codes.
        group: columns that share a scale; None for a whole token, or all of a text if the scale is fixed.
        scales: what the scales of groups are: floats, or numbers of 8 bits: E4M3 below a fixed float32 divisor (NVFP4),
            powers of two (MX).
        static: whether one scale, fixed by calibration text, is for all inputs.
        scale: this scale, or the divisor; None where nothing is fixed, or not yet.
        runtime: whose formulas these are.
    """

    number: InputNumber
    group: int | None = None
    scales: Literal["float", "e4m3", "e8m0"] = "float"
    static: bool = False
    scale: float | None = None
    runtime: ActivationRuntime = "transformers"

    @property
    def calibrated(self) -> bool:
        """Whether something about it is fixed by calibration text."""
        return self.static or self.scales == "e4m3"

    def __str__(self) -> str:
        where = "by token" if self.group is None else f"in groups of {self.group}"
        kinds = {"float": "", "e4m3": ", scales in E4M3", "e8m0": ", scales powers of two"}
        return f"{self.number} {'by a fixed scale' if self.static else where}{kinds[self.scales]}"

    def scale_for(self, largest: float, dtype: torch.dtype) -> torch.Tensor:
        """The fixed scale, or the divisor, for inputs up to a magnitude; one number, as it is stored.

        Args:
            largest: magnitude on calibration text; zero if nothing ever came in, which then counts as one.
            dtype: of the model, in which a scale is stored; a divisor is float32.
        """
        magnitude = torch.tensor([largest or 1.0], dtype=torch.float32)
        if self.static:
            return (magnitude / _LARGEST[self.number]).to(dtype)
        return E4M3_PARTS.largest * _LARGEST[self.number] / magnitude

    @property
    def limit(self) -> float | None:
        """The magnitude above which inputs are cut off; None where nothing is fixed.

        Up to half a step above the largest E4M3 number a code, or a group's scale, is rounded down to that as any other
        is to its neighbour: that is no overflow.
        """
        if not self.calibrated or self.scale is None:
            return None
        top = E4M3_PARTS.largest + _HALF_STEP
        return self.scale * top if self.static else _LARGEST[self.number] * top / self.scale

    def at(self, scale: torch.Tensor) -> InputKind:
        """The same with what calibration has fixed."""
        return replace(self, scale=float(scale))


def quantize_input(values: torch.Tensor, kind: InputKind) -> torch.Tensor:
    """Round activations to what their codes stand for.

    Args:
        values: ``[…, columns]``, one token per row of the last dimension; a multiple of the group's columns, if the
            kind has groups.
        kind: how; with its scale, if calibration fixes one.

    Returns:
        the same shape and dtype.
    """
    if kind.calibrated and kind.scale is None:
        raise ValueError(f"inputs are quantized to {kind}, and nothing fixed the scale")
    if kind.runtime == "vllm" and kind.scales == "float":
        grouped = values if kind.group is None else values.unflatten(-1, (-1, kind.group))
        return _as_vllm(grouped, kind).view(values.shape).to(values.dtype)
    if kind.group is not None:
        grouped = values.unflatten(-1, (-1, kind.group))
        return round_by(grouped, _group_scale(grouped, kind), kind.number).flatten(-2).to(values.dtype)
    if kind.static:
        return round_by(values, torch.tensor([kind.scale], dtype=values.dtype, device=values.device), kind.number)
    return round_by(values, _float_scale(values, kind.number), kind.number)


def _as_vllm(grouped: torch.Tensor, kind: InputKind) -> torch.Tensor:
    """What vLLM's codes stand for, float32, of values whose last dimension shares a scale."""
    wide = grouped.float()
    if kind.static:
        scale = torch.tensor([kind.scale], dtype=torch.float32, device=wide.device)
    else:
        scale = wide.abs().amax(-1, keepdim=True) / _VLLM_LARGEST[kind.number]
    if kind.number == "int8":
        codes = (wide * (1 / scale)).round_().clamp_(-128, 127)
        return (codes * scale).where(scale > 0, 0)
    scale = scale if kind.static else scale.clamp(min=_VLLM_LEAST)
    # Groups are divided by their scale, tokens multiplied by its inverse.
    codes = wide / scale if kind.group is not None else wide * scale.reciprocal()
    bound = E4M3_PARTS.largest
    return codes.clamp_(-bound, bound).to(_FP8).float() * scale


def round_by(values: torch.Tensor, scale: torch.Tensor, number: InputNumber) -> torch.Tensor:
    """Values rounded to codes of a number times a scale, which is of their dtype and broadcasts to them."""
    codes = values / scale
    if number == "int8":
        return codes.round_().clamp_(-128, 127).mul_(scale)
    if number == "fp4":
        return E2M1_PARTS.round(codes).to(codes.dtype).mul_(scale)
    bound = E4M3_PARTS.largest
    return codes.clamp_(-bound, bound).to(_FP8).to(codes.dtype).mul_(scale)


def _float_scale(values: torch.Tensor, number: InputNumber) -> torch.Tensor:
    """``[…, 1]``, in the dtype of the values."""
    scale = values.abs().amax(-1, keepdim=True) / _LARGEST[number]
    return torch.where(scale == 0, torch.finfo(values.dtype).eps, scale)


def _group_scale(grouped: torch.Tensor, kind: InputKind) -> torch.Tensor:
    """Of values ``[…, groups, columns]`` the scales, ``[…, groups, 1]``."""
    if kind.scales == "float":
        return _float_scale(grouped, kind.number)
    largest = grouped.abs().amax(-1, keepdim=True)
    if kind.scales == "e8m0":
        mantissa, exponent = torch.frexp(largest.float())
        exponent = exponent - 1 - _TOP[kind.number] + (mantissa >= _NEXT_POWER).int()
        codes = (exponent + 127).clamp_(0, 254).masked_fill_(largest == 0, 0).to(torch.uint8)
        scale = E8M0.values(codes).to(grouped.dtype)
        return torch.where(scale == 0, 1, scale)
    divisor = torch.tensor([kind.scale], dtype=torch.float32, device=grouped.device)
    scale = E4M3_SCALES.values(E4M3_SCALES.nearest(divisor * (largest / _LARGEST[kind.number])))
    # The library takes this for a group of zeros, and for one that is next to nothing.
    return torch.where(scale == 0, 0.125, scale) / divisor


class InputQuantizer:
    """Lets a linear see its inputs quantized; where calibration fixes something, from :meth:`fix` on.

    Inputs of linears with a fixed scale are counted, and those that it cuts off.

    Args:
        linear: which.
        kind: how.

    Attributes:
        counting: whether what comes in is counted.
    """

    def __init__(self, linear: nn.Module, kind: InputKind) -> None:
        self.kind = kind
        self.counting = True
        self._inputs = 0
        self._beyond: torch.Tensor | int = 0
        self._largest: torch.Tensor | None = None
        linear.register_forward_pre_hook(self._quantize)

    def fix(self, scale: torch.Tensor) -> None:
        """What calibration has found: see :meth:`InputKind.scale_for`."""
        self.kind = self.kind.at(scale)

    def saturation(self, name: str) -> Saturation | None:
        """What has come in so far, of the linear of that name; None where no scale is fixed, or nothing came."""
        limit = self.kind.limit
        if limit is None or self._largest is None:
            return None
        return Saturation(name, self._inputs, int(self._beyond), float(self._largest), limit)

    def _quantize(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.kind.calibrated and self.kind.scale is None:
            return None
        if self.counting and self.kind.limit is not None and args[0].numel():
            self._count(args[0], self.kind.limit)
        return (quantize_input(args[0], self.kind), *args[1:])

    def _count(self, values: torch.Tensor, limit: float) -> None:
        """Without a word to a GPU that would have it wait."""
        if values.device.type == "meta":
            return
        magnitude = values.detach().abs()
        largest = magnitude.amax()
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
        self._inputs += values.numel()
        self._beyond = self._beyond + (magnitude > limit).sum()
