"""Quantized activations, against compressed-tensors' dynamic quantization."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import nn

from llmconvert.compute.activations import InputKind, quantize_input, quantize_inputs_of

ARGUMENTS = {
    kind: QuantizationArgs(num_bits=8, type=type_, strategy="token", dynamic=True, symmetric=True)
    for kind, type_ in (("int8", "int"), ("fp8", "float"))
}


def tokens(dtype: torch.dtype) -> torch.Tensor:
    """Tokens of very different sizes, one of them zero."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((1, 33, 96), generator=generator)
    sizes = torch.exp(3 * torch.randn((1, 33, 1), generator=generator))
    sizes[0, 5] = 0
    return (values * sizes).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_values_are_those_of_compressed_tensors(kind: InputKind, dtype: torch.dtype) -> None:
    values = tokens(dtype)
    before = values.clone()
    scale, zero = compute_dynamic_scales_and_zp(values, ARGUMENTS[kind], nn.Identity())
    expected = fake_quantize(values, scale, zero, ARGUMENTS[kind])
    found = quantize_input(values, kind)
    assert torch.equal(found, expected) and found.dtype == dtype
    assert torch.equal(values, before)
    assert not torch.equal(found, values)


def test_a_linear_sees_its_inputs_quantized() -> None:
    linear, plain = nn.Linear(96, 8), nn.Linear(96, 8)
    plain.load_state_dict(linear.state_dict())
    quantize_inputs_of(linear, "int8")
    values = tokens(torch.float32)
    assert torch.equal(linear(values), plain(quantize_input(values, "int8")))
