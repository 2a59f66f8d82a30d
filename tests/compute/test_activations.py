"""Quantized activations, against compressed-tensors' fake quantization."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.utils import generate_gparam
from torch import nn

from llmconvert.compute.activations import InputKind, InputQuantizer, quantize_input
from llmconvert.compute.saturation import uncounted

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


def vllm_int8(row: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """``dynamic_scaled_int8_quant_impl`` of vLLM's csrc/cpu/dnnl_kernels.cpp, symmetric: codes and scale of a token."""
    scale = np.float32(np.abs(row).max()) / np.float32(127.0)
    if scale == 0:
        return np.zeros(len(row), np.int8), scale
    inverse = np.float32(1.0 / np.float64(scale))
    return np.clip(np.rint(row * inverse), -128, 127).astype(np.int8), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_integers_are_those_of_vllms_kernel(dtype: torch.dtype) -> None:
    values = tokens(dtype)
    found = quantize_input(values, InputKind("int8", runtime="vllm"))
    for row, own in zip(values[0].float().numpy(), found[0], strict=True):
        codes, scale = vllm_int8(row)
        expected = torch.from_numpy(codes.astype(np.float32) * scale).to(dtype)
        assert torch.equal(own, expected)
        assert not row.any() or np.abs(codes).max() == 127
    # By half a percent, which is half a step of the largest codes, transformers' scale is the smaller one.
    assert (found != quantize_input(values, INT8)).float().mean() > 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [FP8, InputKind("fp8", 128), InputKind("fp8", static=True, scale=0.75)], ids=str)
def test_floats_are_those_of_vllms_own_reference(kind: InputKind, dtype: torch.dtype) -> None:
    """``QuantFP8.forward_native`` and ``_quantize_group_native`` of its input_quant_fp8.py, written out."""
    values = tokens(dtype)
    grouped = values if kind.group is None else values.unflatten(-1, (-1, kind.group))
    largest = grouped.abs().amax(-1, keepdim=True).to(torch.float32)
    scale = torch.tensor(0.75) if kind.static else (largest / 448.0).clamp(min=1.0 / (448.0 * 512.0))
    # Tokens are multiplied by the inverse ("performs slightly better"), groups are divided.
    codes = grouped.to(torch.float32) * scale.reciprocal() if kind.group is None else grouped / scale
    codes = codes.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    expected = (codes.float() * scale).view(values.shape).to(dtype)
    assert torch.equal(quantize_input(values, replace(kind, runtime="vllm")), expected)


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


@pytest.mark.parametrize("kind", [InputKind("fp8", static=True), InputKind("fp4", 16, "e4m3")], ids=str)
def test_what_a_fixed_scale_cuts_off_is_counted(kind: InputKind) -> None:
    values = tokens(torch.bfloat16)
    met = float(values.abs().max())
    for largest in (met, met / 4):
        linear = nn.Linear(256, 8, dtype=torch.bfloat16)
        quantizer = InputQuantizer(linear, kind)
        linear(values)
        assert quantizer.saturation("l") is None
        scale = kind.scale_for(largest, torch.bfloat16)
        quantizer.fix(scale)
        with uncounted([quantizer]):
            linear(values)
        linear(values[:, :20])
        linear(values[:, 20:])
        # What E4M3 rounds to 480, were there such a number: codes of static scales, and the scales of NVFP4's groups.
        wide, one = values.double().abs(), float(scale)
        codes = wide / one if kind.static else wide / 6 * one
        expected = int((codes > 464).sum())
        found = quantizer.saturation("l")
        assert found is not None and (found.inputs, found.largest) == (values.numel(), met)
        assert found.beyond == expected and (expected > 0) == (largest < met)
        assert found.share == expected / values.numel() and (found.excess > 1) == (expected > 0)


def test_a_scale_that_nothing_fixed_is_no_scale() -> None:
    with pytest.raises(ValueError, match="nothing fixed the scale"):
        quantize_input(tokens(torch.float32), InputKind("fp8", static=True))
