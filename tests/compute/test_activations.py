"""Quantized activations, against compressed-tensors' fake quantization."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.utils import generate_gparam
from torch import nn

from llmconvert.compute.activations import InputKind, InputQuantizer, quantize_input

INT8, FP8 = InputKind("int8"), InputKind("fp8")
_TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
ARGUMENTS: dict[InputKind, Any] = {
    INT8: QuantizationArgs(type="int", **_TOKEN),
    FP8: QuantizationArgs(type="float", **_TOKEN),
    InputKind("fp8", static=True): "FP8",
    InputKind("fp8", 128): "FP8_BLOCK",
    InputKind("fp4", 16, "e4m3"): "NVFP4",
    InputKind("fp4", 32, "e8m0"): "MXFP4",
    InputKind("fp8", 32, "e8m0"): "MXFP8",
}


def tokens(dtype: torch.dtype) -> torch.Tensor:
    """Tokens of very different sizes, one of them zero, with a group of zeros in another."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((1, 33, 256), generator=generator)
    sizes = torch.exp(3 * torch.randn((1, 33, 1), generator=generator))
    sizes[0, 5] = 0
    values[0, 7, :128] = 0
    return (values * sizes).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ARGUMENTS, ids=str)
def test_values_are_those_of_compressed_tensors(kind: InputKind, dtype: torch.dtype) -> None:
    values = tokens(dtype)
    before = values.clone()
    known = ARGUMENTS[kind]
    arguments = preset_name_to_scheme(known, ["Linear"]).input_activations if isinstance(known, str) else known
    module = nn.Linear(256, 1)
    module.quantization_status = QuantizationStatus.FROZEN
    if kind.calibrated:
        # Half of what comes: some values are beyond the scale.
        largest = float(values.abs().max()) / 2
        scale = kind.scale_for(largest, dtype)
        assert scale.shape == (1,) and scale.dtype == (dtype if kind.static else torch.float32)
        if kind.static:
            torch.testing.assert_close(scale.float(), torch.tensor([largest / 448]), rtol=0.01, atol=0)
        else:
            assert torch.equal(scale, generate_gparam(torch.tensor(-largest), torch.tensor(largest)))
        setattr(module, "input_scale" if kind.static else "input_global_scale", scale)
        kind = kind.at(scale)
    expected = forward_quantize(module, values, "input", arguments)
    found = quantize_input(values, kind)
    assert torch.equal(found, expected) and found.dtype == dtype
    assert torch.equal(values, before)
    assert not torch.equal(found, values)


def test_a_linear_sees_its_inputs_quantized() -> None:
    linear, plain = nn.Linear(256, 8), nn.Linear(256, 8)
    plain.load_state_dict(linear.state_dict())
    InputQuantizer(linear, INT8)
    values = tokens(torch.float32)
    assert torch.equal(linear(values), plain(quantize_input(values, INT8)))


def test_a_linear_sees_its_inputs_quantized_once_the_scale_is_fixed() -> None:
    linear, plain = nn.Linear(256, 8), nn.Linear(256, 8)
    plain.load_state_dict(linear.state_dict())
    kind = InputKind("fp8", static=True)
    quantizer = InputQuantizer(linear, kind)
    values = tokens(torch.float32)
    assert torch.equal(linear(values), plain(values))
    scale = kind.scale_for(3.0, torch.float32)
    quantizer.fix(scale)
    assert torch.equal(linear(values), plain(quantize_input(values, kind.at(scale))))


def test_a_scale_that_nothing_fixed_is_no_scale() -> None:
    with pytest.raises(ValueError, match="nothing fixed the scale"):
        quantize_input(tokens(torch.float32), InputKind("fp8", static=True))
