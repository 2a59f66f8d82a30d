"""The triangular factor in place and the quadratic form, against their definitions."""

from __future__ import annotations

import pytest
import torch
from support.quantized import hessian_of, random_inputs, random_weight

from llmconvert.quantize.solve import hessian as hessian_module
from llmconvert.quantize.solve.hessian import lower_factor_, mirror_upper_, permute_, quadratic_form

SIZES = [1, 7, 255, 256, 257, 600]


@pytest.fixture(params=[64, 768], ids=["panels", "whole"])
def panel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels so narrow that these matrices have several, or as wide as they are."""
    monkeypatch.setattr(hessian_module, "_PANEL", request.param)


@pytest.mark.usefixtures("panel")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factor_times_its_transpose_is_the_matrix(size: int, dtype: torch.dtype) -> None:
    matrix = hessian_of(random_inputs(2 * size + 5, size), dtype).matrix
    above = torch.ones_like(matrix, dtype=torch.bool).triu(1)
    work = matrix.masked_fill(above, torch.nan)
    assert lower_factor_(work)
    assert torch.equal(work.isnan(), above), "the upper triangle is left alone"
    factor = work.nan_to_num().double()
    assert (factor.diagonal() > 0).all()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    assert (factor @ factor.T - matrix.double()).norm() <= tolerance * matrix.double().norm()


@pytest.mark.usefixtures("panel")
@pytest.mark.parametrize("size", [1, 40, 300, 600])
@pytest.mark.parametrize("place", ["first", "last"])
def test_matrices_that_are_not_positive_definite_are_told(size: int, place: str) -> None:
    matrix = hessian_of(random_inputs(2 * size + 5, size), torch.float32).matrix
    index = 0 if place == "first" else size - 1
    matrix[index, index] = -1
    upper = matrix.triu(1).clone()
    assert not lower_factor_(matrix)
    assert torch.equal(matrix.triu(1), upper)


@pytest.mark.parametrize("size", SIZES)
def test_a_spoilt_lower_triangle_is_restored_from_the_upper(size: int) -> None:
    matrix = hessian_of(random_inputs(size + 5, size)).matrix
    work = matrix.clone().masked_fill_(torch.ones_like(matrix, dtype=torch.bool).tril(-1), torch.nan)
    mirror_upper_(work)
    assert torch.equal(work, matrix)


@pytest.mark.parametrize("size", SIZES)
def test_rows_and_columns_are_permuted_alike(size: int) -> None:
    matrix = hessian_of(random_inputs(size + 5, size)).matrix
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    expected = matrix[order][:, order]
    permute_(matrix, order)
    assert torch.equal(matrix, expected)


@pytest.mark.parametrize("at_once", [600 * 17, 1 << 23], ids=["slices", "whole"])
@pytest.mark.parametrize("columns", [1, 64, 256, 257, 600])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-3), (torch.bfloat16, 2e-3)], ids=str
)
def test_it_is_the_squared_output_of_the_inputs(
    columns: int, dtype: torch.dtype, tolerance: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three digits are what is promised where the processor multiplies bfloat16."""
    monkeypatch.setattr(hessian_module, "_WEIGHTS_AT_ONCE", at_once)
    inputs, weight = random_inputs(900, columns), random_weight(50, columns).to(dtype)
    hessian = hessian_of(inputs, torch.float64 if dtype == torch.float64 else torch.float32).matrix
    before = weight.clone(), hessian.clone()
    expected = float((inputs @ weight.double().T).square().sum()) / len(inputs)
    assert quadratic_form(weight, hessian) == pytest.approx(expected, rel=tolerance)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])
