"""The solvers of the refit against textbook solutions."""

from __future__ import annotations

import pytest
import torch

from llmconvert.convert.gqa.refit.solve import conjugate_gradients, ridge
from llmconvert.errors import CalibrationError


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_ridge_equals_least_squares_on_augmented_data() -> None:
    inputs, targets, prior = normal(30, 6, seed=0), normal(30, 4, seed=1), normal(4, 6, seed=2)
    gram, strength = inputs.T @ inputs, 0.3
    found = ridge("o", gram, targets.T @ inputs, prior, strength)
    root = (strength * gram.diagonal().mean()).sqrt() * torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([inputs, root]), torch.cat([targets, root @ prior.T])).solution.T
    torch.testing.assert_close(found, expected)


def test_ridge_keeps_what_it_is_drawn_to_where_nothing_comes_in() -> None:
    prior = normal(4, 6, seed=2)
    assert ridge("o", torch.zeros(6, 6), torch.zeros(4, 6), prior, 1e-3) is prior
    inputs = normal(30, 6, seed=0)
    inputs[:, 2] = 0
    found = ridge("o", inputs.T @ inputs, normal(30, 4, seed=1).T @ inputs, prior, 1e-6)
    torch.testing.assert_close(found[:, 2], prior[:, 2])


def test_moments_that_cannot_be_factorized_are_named() -> None:
    with pytest.raises(CalibrationError, match=r"layer\.o_proj"):
        ridge("layer.o_proj", torch.full((3, 3), 5.0) - 4 * torch.eye(3), torch.zeros(2, 3), torch.zeros(2, 3), 1e-3)


def test_conjugate_gradients_solve_in_as_many_steps_as_there_are_unknowns() -> None:
    matrix = normal(8, 8, seed=3)
    matrix = matrix @ matrix.T + torch.eye(8, dtype=torch.float64)
    target = normal(8, seed=4)
    diagonal = matrix.diagonal()
    found = conjugate_gradients(lambda x: matrix @ x, target, lambda r: r / diagonal, 8)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, target))
    few = conjugate_gradients(lambda x: matrix @ x, target, lambda r: r / diagonal, 2)
    error, start = (matrix @ few - target) @ few, target @ torch.linalg.solve(matrix, target)
    assert abs(float(error)) < 1e-9 * float(start)  # each step is optimal along what was searched
    assert torch.equal(conjugate_gradients(lambda x: matrix @ x, 0 * target, lambda r: r, 5), 0 * target)
