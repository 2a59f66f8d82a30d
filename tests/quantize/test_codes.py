"""Codes and what they stand for, against torch's own casts and a search over all levels."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from support.quantized import random_weight

from llmconvert.quantize.codes import FP8, NF4_LEVELS, code_values, largest_value, nearest_codes
from llmconvert.quantize.methods.base import Target
from llmconvert.quantize.methods.rtn import Rtn
from llmconvert.quantize.scheme import Scheme

NAMES = ["w4a16-g16", "w8a16", "fp8", "nf4"]


def levels_of(scheme: Scheme) -> torch.Tensor:
    """Every value that a code can stand for."""
    if scheme.kind == "nf4":
        return torch.tensor(NF4_LEVELS, dtype=torch.float64)
    if scheme.kind == "fp8":
        every = torch.arange(256, dtype=torch.int64).to(torch.uint8).view(FP8).double()
        return every[torch.isfinite(every)]
    return torch.arange(scheme.code_min, scheme.code_max + 1, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_the_nearest_of_all_levels_is_chosen(name: str) -> None:
    scheme = Scheme.parse(name)
    values = 1.1 * largest_value(scheme) * torch.linspace(-1, 1, 5001)
    found = code_values(nearest_codes(values, scheme), scheme).double()
    nearest = (values.double()[:, None] - levels_of(scheme)).abs().amin(1)
    torch.testing.assert_close((values.double() - found).abs(), nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_code_stands_for_itself(name: str) -> None:
    scheme = Scheme.parse(name)
    levels = levels_of(scheme).float()
    assert torch.equal(code_values(nearest_codes(levels, scheme), scheme), levels)


def test_float_codes_are_those_of_compressed_tensors() -> None:
    weight = random_weight(40, 96)
    ours = Rtn().quantize([Target("layer", weight, Scheme.parse("fp8"))], None, torch.float32)["layer"].tensor
    arguments = QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True)
    zero = torch.zeros_like(ours.scale)
    theirs = quantize(weight, ours.scale, zero, arguments, dtype=FP8)
    assert torch.equal(ours.codes.view(torch.int8), theirs.view(torch.int8))
    assert torch.equal(ours.dequantize(torch.float32), dequantize(theirs, ours.scale, zero, arguments, torch.float32))
    torch.testing.assert_close(ours.scale, weight.abs().amax(1, keepdim=True) / 448)
