"""The refit of values and output projections: against dense least squares, and where rows are too few."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmconvert.convert.gqa.refit.values import ValueFit
from llmconvert.convert.gqa.weights import LayerWeights

HEADS, SHARED, SIZE, INPUTS, HIDDEN = 4, 2, 3, 6, 8


def layer(generator: torch.Generator) -> LayerWeights:
    value = torch.randn(SHARED, SIZE, INPUTS, generator=generator)
    return LayerWeights(value, value, value, torch.randn(HEADS, HIDDEN, SIZE, generator=generator))


def fitted(rows: int, steps: int) -> tuple[ValueFit, LayerWeights, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    attended = torch.randn(rows, HEADS, INPUTS, generator=generator)
    targets = torch.randn(rows, HIDDEN, generator=generator)
    importance = torch.rand(rows, generator=generator) + 0.5
    parts = [part.split(7) for part in (attended, targets, importance)]
    fit = ValueFit("o", iter(parts[0]), parts[1], parts[2], ridge=1e-3, steps=steps)
    return fit, layer(generator), attended, targets, importance


def test_values_alone_are_the_least_squares_of_the_dense_system() -> None:
    """With rows for the values and not for the output projection, which stays; importance counts rows."""
    fit, start, attended, targets, importance = fitted(20, steps=30)
    assert fit.enough(start, 20) and not fit.enough(start, 11)
    found = fit.fit(start)
    assert torch.equal(found.output, start.output)
    # Every output as a linear function of the flattened values.
    design = torch.zeros(20, HIDDEN, SHARED, SIZE, INPUTS)
    for head in range(HEADS):
        design[:, :, head * SHARED // HEADS] += torch.einsum("od,ni->nodi", start.output[head], attended[:, head])
    roots = importance.sqrt()
    system = (design * roots[:, None, None, None, None]).flatten(2).flatten(0, 1).double()
    wanted = (targets * roots[:, None]).flatten().double()
    best = torch.linalg.lstsq(system, wanted[:, None]).solution
    least = float((system @ best - wanted[:, None]).square().sum() / wanted.square().sum())
    assert least == pytest.approx(fit.loss(found), rel=1e-3) and fit.loss(start) > 1.5 * least


def test_both_in_turns_come_lower_than_either() -> None:
    fit, start, *_ = fitted(60, steps=6)
    found = fit.fit(start)
    assert not torch.equal(found.output, start.output) and not torch.equal(found.value, start.value)
    assert fit.loss(found) < fit.loss(start)
    assert fit.loss(found) < min(
        fit.loss(LayerWeights(start.query, start.key, start.value, found.output)),
        fit.loss(LayerWeights(start.query, start.key, found.value, start.output)),
    )


def test_the_stronger_the_ridge_the_less_moves() -> None:
    moved = []
    for ridge in (1e-3, 0.1, 1e6):
        _, start, attended, targets, importance = fitted(60, steps=30)
        found = ValueFit("o", [attended], [targets], [importance], ridge=ridge, steps=30).fit(start)
        moved.append([float((found.value - start.value).norm()), float((found.output - start.output).norm())])
    for weaker, stronger in itertools.pairwise(moved):
        assert stronger[0] < weaker[0] and stronger[1] < weaker[1]
    assert max(moved[-1]) < 1e-3


def test_what_nothing_comes_into_stays() -> None:
    start = layer(torch.Generator().manual_seed(0))
    rows = torch.zeros(60, HEADS, INPUTS)
    found = ValueFit("o", [rows], [torch.zeros(60, HIDDEN)], [torch.ones(60)], ridge=0.1).fit(start)
    assert torch.equal(found.value, start.value) and torch.equal(found.output, start.output)
