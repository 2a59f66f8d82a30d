"""Round to nearest, against compressed-tensors' own rounding."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from support.quantized import every_code, random_weight

from llmconvert.errors import CheckpointError
from llmconvert.quantize.methods import rtn as rtn_module
from llmconvert.quantize.methods.base import Target
from llmconvert.quantize.methods.rtn import Rtn
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor

NAMES = ["w4a16-g16", "w4a16-g16-asym", "w3a16-channel", "w2a16-g32-asym", "w8a16-channel-asym", "w5a16-g32"]


def rounded(
    weight: torch.Tensor, name: str, *, search: bool = False, dtype: torch.dtype = torch.float32
) -> QuantizedTensor:
    target = Target("layer", weight, Scheme.parse(name))
    return Rtn(search=search).quantize([target], None, dtype)["layer"].tensor


def arguments(scheme: Scheme) -> QuantizationArgs:
    strategy = "channel" if scheme.group_size is None else "group"
    return QuantizationArgs(
        num_bits=scheme.bits, symmetric=scheme.symmetric, strategy=strategy, group_size=scheme.group_size
    )


@pytest.mark.parametrize("search", [False, True], ids=["range", "search"])
@pytest.mark.parametrize("name", NAMES)
def test_codes_are_those_of_compressed_tensors(name: str, search: bool) -> None:
    weight = random_weight(70, 96)
    ours = rounded(weight, name, search=search)
    zero = torch.zeros_like(ours.scale) if ours.zero is None else ours.zero.float()
    theirs = quantize(weight, ours.scale, zero, arguments(ours.scheme), dtype=torch.int8)
    assert torch.equal(ours.codes, theirs)
    restored = dequantize(theirs, ours.scale, zero, arguments(ours.scheme), dtype=torch.float32)
    assert torch.equal(ours.dequantize(torch.float32), restored)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_at_its_nearest_level(name: str, dtype: torch.dtype) -> None:
    weight = random_weight(30, 96).to(dtype)
    ours = rounded(weight, name, dtype=dtype)
    size = ours.scheme.columns_per_group(96)
    scale = ours.scale.double().repeat_interleave(size, 1).unsqueeze(-1)
    zero = 0 if ours.zero is None else ours.zero.double().repeat_interleave(size, 1).unsqueeze(-1)
    codes = every_code(ours.scheme.number).double()
    nearest = (weight.double().unsqueeze(-1) - (codes - zero) * scale).abs().amin(-1)
    chosen = (weight.double() - ours.dequantize(torch.float64)).abs()
    torch.testing.assert_close(chosen, nearest, rtol=1e-4, atol=1e-7)


def test_searched_scales_have_less_squared_error() -> None:
    weight = random_weight(64, 96)
    plain, searched = (
        (rounded(weight, "w3a16-g32", search=search).dequantize(torch.float32) - weight).square().sum()
        for search in (False, True)
    )
    assert searched < 0.9 * plain


def test_slices_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(50, 96)
    whole = rounded(weight, "w4a16-g32-asym")
    monkeypatch.setattr(rtn_module, "_WEIGHTS_AT_ONCE", 7 * 96)
    sliced = rounded(weight, "w4a16-g32-asym")
    assert torch.equal(whole.codes, sliced.codes)
    assert torch.equal(whole.scale, sliced.scale)


def test_the_weight_is_left_as_it_was() -> None:
    weight = random_weight(50, 96)
    before = weight.clone()
    rounded(weight, "w4a16-g32-asym", search=True)
    assert torch.equal(weight, before)


def test_a_weight_that_is_not_finite_is_named() -> None:
    weight = random_weight(4, 32)
    weight[1, 1] = torch.nan
    with pytest.raises(CheckpointError, match="'layer' has values that are not finite"):
        rounded(weight, "w4a16-g32")
