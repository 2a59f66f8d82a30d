"""The triangular factor in place, against its definition."""

from __future__ import annotations

import pytest
import torch
from quantized import hessian_of, random_inputs

from llmconvert.quantize.factorize import mirror_lower_, upper_factor_

SIZES = [1, 7, 255, 256, 257, 600]


def with_lower(matrix: torch.Tensor, value: float) -> torch.Tensor:
    """The matrix with everything below the diagonal replaced."""
    below = torch.ones_like(matrix, dtype=torch.bool).tril(-1)
    return matrix.masked_fill(below, value)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factor_times_its_transpose_is_the_matrix(size: int, dtype: torch.dtype) -> None:
    matrix = hessian_of(random_inputs(2 * size + 5, size), dtype).matrix
    work = with_lower(matrix, torch.nan)
    assert upper_factor_(work)
    assert work.tril(-1).isnan().sum() == size * (size - 1) // 2, "the lower triangle is left alone"
    factor = work.nan_to_num().double()
    assert (factor.diagonal() > 0).all()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    assert (factor @ factor.T - matrix.double()).norm() <= tolerance * matrix.double().norm()


@pytest.mark.parametrize("size", [1, 40, 300, 600])
@pytest.mark.parametrize("place", ["first", "last"])
def test_matrices_that_are_not_positive_definite_are_told(size: int, place: str) -> None:
    matrix = hessian_of(random_inputs(2 * size + 5, size), torch.float32).matrix
    index = 0 if place == "first" else size - 1
    matrix[index, index] = -1
    lower = matrix.tril(-1).clone()
    assert not upper_factor_(matrix)
    assert torch.equal(matrix.tril(-1), lower)


@pytest.mark.parametrize("size", SIZES)
def test_a_spoilt_upper_triangle_is_restored_from_the_lower(size: int) -> None:
    matrix = hessian_of(random_inputs(size + 5, size)).matrix
    work = matrix.clone().masked_fill_(torch.ones_like(matrix, dtype=torch.bool).triu(1), torch.nan)
    mirror_lower_(work)
    assert torch.equal(work, matrix)
