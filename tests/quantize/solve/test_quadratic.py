"""The quadratic form, against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from support.quantized import hessian_of, random_inputs, random_weight

from llmconvert.quantize.solve import quadratic
from llmconvert.quantize.solve.quadratic import quadratic_form


@pytest.mark.parametrize("at_once", [600 * 17, 1 << 23], ids=["slices", "whole"])
@pytest.mark.parametrize("columns", [1, 64, 256, 257, 600])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-3), (torch.bfloat16, 2e-3)], ids=str
)
def test_it_is_the_squared_output_of_the_inputs(
    columns: int, dtype: torch.dtype, tolerance: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three digits are what is promised where the processor multiplies bfloat16."""
    monkeypatch.setattr(quadratic, "_WEIGHTS_AT_ONCE", at_once)
    inputs, weight = random_inputs(900, columns), random_weight(50, columns).to(dtype)
    hessian = hessian_of(inputs, torch.float64 if dtype == torch.float64 else torch.float32).matrix
    before = weight.clone(), hessian.clone()
    expected = float((inputs @ weight.double().T).square().sum()) / len(inputs)
    assert quadratic_form(weight, hessian) == pytest.approx(expected, rel=tolerance)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])
