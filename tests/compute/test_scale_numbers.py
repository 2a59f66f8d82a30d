"""Scales that are numbers of 8 bits, against the OCP's definition and torch's own dtypes."""

from __future__ import annotations

import math

import pytest
import torch

from llmconvert.compute.scale_numbers import E4M3_SCALES, E8M0

EVERY = torch.arange(256).to(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_exponents_stand_for_powers_of_two(dtype: torch.dtype) -> None:
    values = E8M0.values(EVERY.view(dtype))
    assert values[:255].double().tolist() == [math.ldexp(1.0, code - 127) for code in range(255)]
    assert math.isnan(values[255])
    assert torch.equal(values[:255], EVERY.view(torch.float8_e8m0fnu).float()[:255])
    assert torch.equal(E8M0.nearest(values[:255]), EVERY[:255])


def test_a_scale_becomes_the_power_of_two_at_or_above() -> None:
    scale = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 100 + 1e-6
    rounded = E8M0.values(E8M0.nearest(scale))
    assert torch.all((rounded >= scale) & (rounded < 2 * scale))


def test_floats_are_rounded_by_torch_and_end_at_their_largest() -> None:
    scale = torch.tensor([1e-9, 0.3, 447.0, 1e6])
    assert E4M3_SCALES.values(E4M3_SCALES.nearest(scale)).tolist() == [0.0, 0.3125, 448.0, 448.0]
