"""Scales and biases of affine groups: the kernel against torch, a fit against numpy, and what a search finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.quantized import random_weight

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.methods.rtn import round_to_codes
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve.affine import _Groups, fit_affine
from llmconvert.quantize.solve.group_scales import GroupScales
from llmconvert.quantize.solve.scales import full_range_scales, search_scales

IMPORTANCE = torch.rand(128, generator=torch.Generator().manual_seed(5)) * 3 + 0.1


def lost(weight: torch.Tensor, scales: GroupScales, scheme: Scheme) -> float:
    tensor = round_to_codes(weight, scales, scheme)
    return float(((tensor.dequantize(torch.float32) - weight).square() * IMPORTANCE).sum())


def test_sums_are_those_of_the_nearest_codes() -> None:
    weight = random_weight(37, 96).reshape(37, 3, 32)
    groups = _Groups(weight, IMPORTANCE[:96].reshape(3, 32).contiguous(), 7.0, torch.bfloat16)
    scale = torch.rand(37, 3) * 0.1 + 0.02
    bias = torch.randn(37, 3) * 0.2
    torch.testing.assert_close(groups.sums(scale, bias), groups._sums_plain(scale, bias), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_search_loses_less_than_full_ranges_and_integer_zero_points(bits: int, dtype: torch.dtype) -> None:
    weight = random_weight(64, 128)
    affine, integer = Scheme.parse(f"w{bits}a16-g64-affine"), Scheme.parse(f"w{bits}a16-g64-asym")
    found = search_scales("w", weight, IMPORTANCE, affine, dtype)
    assert found.offset is not None and found.scale.dtype == found.offset.dtype == dtype
    full = lost(weight, full_range_scales("w", weight, affine, dtype), affine)
    zeros = lost(weight, search_scales("w", weight, IMPORTANCE, integer, dtype), integer)
    # In 8 bits ranges are all there is to choose, and biases in bfloat16 are as coarse as a step.
    assert lost(weight, found, affine) < (0.97 if bits < 8 else 1.001) * min(full, zeros)


def test_no_pair_next_to_the_one_that_is_found_is_much_better() -> None:
    """Brute force over pairs around it, in the digits that are stored."""
    weight, scheme = random_weight(4, 128), Scheme.parse("w3a16-g64-affine")
    found = search_scales("w", weight, IMPORTANCE, scheme, torch.bfloat16)
    assert found.offset is not None
    best = lost(weight, found, scheme)
    for scale in np.linspace(0.97, 1.03, 7):
        for shift in np.linspace(-0.3, 0.3, 7):
            moved = found.offset.float() + shift * found.scale.float()
            near = GroupScales((found.scale.float() * scale).to(torch.bfloat16), None, moved.to(torch.bfloat16))
            assert lost(weight, near, scheme) > 0.97 * best


def test_groups_without_spread_without_inputs_and_beyond_the_dtype() -> None:
    scheme = Scheme.parse("w4a16-g64-affine")
    weight = torch.full((2, 128), 0.25)
    weight[1, :64] = 0
    for scales in (
        search_scales("w", weight, torch.zeros(128), scheme, torch.bfloat16),
        full_range_scales("w", weight, scheme, torch.bfloat16),
    ):
        assert torch.equal(round_to_codes(weight, scales, scheme).dequantize(torch.float32), weight)
    with pytest.raises(CheckpointError, match="not finite"):
        search_scales("w", weight.where(weight > 0, torch.nan), torch.ones(128), scheme, torch.bfloat16)
    with pytest.raises(UnsupportedError, match="w: one of its biases is beyond float16"):
        search_scales("w", weight * -1e6, torch.ones(128), scheme, torch.float16)


def test_a_fit_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(3, 2, 32, generator=generator)
    codes = (values * 3 + 4).round().clamp(0, 7)
    scale, bias = fit_affine(values, codes, torch.ones(3, 2, 1), torch.float32)
    for row in range(3):
        for group in range(2):
            slope, start = np.polyfit(codes[row, group].double().numpy(), values[row, group].double().numpy(), 1)
            assert float(scale[row, group]) == pytest.approx(slope, rel=1e-4)
            assert float(bias[row, group]) == pytest.approx(start, rel=1e-3, abs=1e-5)
    alike = fit_affine(values, torch.full_like(codes, 3.0), torch.full((3, 2, 1), 0.5), torch.float32)
    assert torch.equal(alike[0], torch.full((3, 2, 1), 0.5))
