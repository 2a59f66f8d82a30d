"""Precision of matrix products: in which dtype they are multiplied and summed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = [
    "LANES",
    "Products",
    "Scratch",
    "WideLinear",
    "WideProducts",
    "all_finite",
    "bfloat16_products",
    "compute_dtype",
    "cpu_has",
    "operand_sizes",
]

#: How a model multiplies what is stored in 16 bits. ``"exact"``: as the resident model does, to the last bit.
#: ``"wide"``: in float32 where the processor is slower in 16 bits, which changes the last bit of some outputs.
#: ``"fast"``: the same, and attention in tiles where that is faster, which rounds scores to 16 bits. ``"learned"``: as
#: ``"exact"`` forward, and gradients of attention in tiles.
Products = Literal["exact", "wide", "fast", "learned"]
#: Float32 numbers that a register of AVX-512 holds.
LANES = 16
#: Measured on two cores: 2.5 to 2.7 times as fast as :class:`WideLinear` with AVX-512 BF16 alone (EPYC).
_BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")

_PRODUCTS = frozenset(
    {
        functional.linear,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.Tensor.matmul,
        torch.Tensor.mm,
        torch.Tensor.bmm,
        torch.Tensor.__matmul__,
    }
)
# Elements of the weights, and of the product, that are float32 at a time.
_OPERAND_NUMEL = 1 << 22


def cpu_has(instructions: str) -> bool:
    """Whether torch says that the processor has them, by torch's name for them."""
    # Present since torch 2.12.
    capabilities: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    return bool(capabilities().get(instructions))


def compute_dtype(device: torch.device) -> torch.dtype:
    """What to multiply in: bfloat16 where the device has instructions for it (GPUs, AMX, AVX-512 BF16), or float32."""
    if device.type != "cpu":
        return torch.bfloat16
    # Other processors convert bfloat16 on the way and gain nothing.
    return torch.bfloat16 if any(map(cpu_has, _BFLOAT16_INSTRUCTIONS)) else torch.float32


def operand_sizes(tokens: int, inputs: int, outputs: int) -> tuple[int, int, int]:
    """Elements of the input, weights and product of a linear for so many tokens."""
    return tokens * inputs, inputs * outputs, tokens * outputs


class Scratch:
    """Float32 memory for the operands of one product after the other: new memory for each costs its page faults."""

    def __init__(self) -> None:
        self._parts: dict[str, torch.Tensor] = {}

    def take(self, part: str, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """Uninitialized, valid until the same part is taken again."""
        size = math.prod(shape)
        kept = self._parts.get(part)
        if kept is None or kept.numel() < size or kept.device != device:
            kept = self._parts[part] = torch.empty(size, device=device)
        return kept[:size].view(shape)


class WideLinear(nn.Linear):
    """A linear stored in 16 bits and multiplied in float32.

    Products of 16-bit values are exact in float32 and summed in it by either kernel: the result is that of a 16-bit
    product but for the order of its sums, which changes the last bit of about one output in ten thousand. On processors
    without instructions for bfloat16 it takes little more than half the time.
    """

    scratch: Scratch

    @classmethod
    def like(cls, linear: nn.Linear, scratch: Scratch) -> WideLinear:
        """One of the same shape and dtype that shares the parameters of ``linear``; ``scratch`` may serve many."""
        wide = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        wide.weight, wide.bias, wide.scratch = linear.weight, linear.bias, scratch
        return wide.train(linear.training)

    def operand_sizes(self, tokens: int) -> tuple[int, int, int]:
        """Elements of the input, weights and product that :attr:`scratch` holds at a time for so many tokens."""
        return operand_sizes(tokens, self.in_features, self._rows(tokens))

    def _rows(self, tokens: int) -> int:
        """Outputs that are computed at a time: all, but of heads and other linears with more than the scratch holds."""
        return min(self.out_features, max(1, _OPERAND_NUMEL // max(self.in_features, tokens)))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            # What a gradient passes through is kept for it, and must not be overwritten by the next linear.
            return functional.linear(input.float(), self.weight.float(), bias).to(input.dtype)
        inputs = self._widen("input", input.reshape(-1, self.in_features))
        outputs = input.new_empty((len(inputs), self.out_features))
        for first in range(0, self.out_features, step := self._rows(len(inputs))):
            columns = self._widen("weight", self.weight[first : first + step]).T
            product = self.scratch.take("product", (len(inputs), columns.shape[1]), input.device)
            if bias is None:
                torch.mm(inputs, columns, out=product)
            else:
                torch.addmm(bias[first : first + step], inputs, columns, out=product)
            outputs[:, first : first + step] = product
        return outputs.view(*input.shape[:-1], self.out_features)

    def _widen(self, part: str, values: torch.Tensor) -> torch.Tensor:
        return self.scratch.take(part, values.shape, values.device).copy_(values)


class WideProducts(TorchFunctionMode):
    """Lets a forward multiply in float32 what is stored in 16 bits, each product rounded as :class:`WideLinear` does.

    For modules that multiply by parameters of their own, as those of experts do.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or args[0].dtype not in (torch.bfloat16, torch.float16):
            return func(*args, **kwargs)
        wide = {name: _to_float(value) for name, value in kwargs.items()}
        return func(*map(_to_float, args), **wide).to(args[0].dtype)


def _to_float(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is infinite or NaN.

    Such a value shows in the sum, which is found many times faster; but a sum can also overflow by itself.
    """
    return math.isfinite(float(values.detach().sum())) or bool(torch.isfinite(values).all())


@contextmanager
def bfloat16_products(*, enabled: bool = True) -> Iterator[None]:
    """Let oneDNN read float32 operands as bfloat16 where the processor multiplies those faster (AMX).

    Exact for values that are bfloat16; sums stay float32. Elsewhere, and on other devices, nothing changes.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if enabled:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
