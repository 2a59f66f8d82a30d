"""Refined codes and scales against coordinate descent written out number by number, and as optima."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.quantized import hessian_of, random_inputs, random_weight

from llmconvert.engine.statistics import Hessian
from llmconvert.quantize.methods.base import Target
from llmconvert.quantize.methods.gptq import Gptq
from llmconvert.quantize.methods.rtn import Rtn
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve import refine as refine_module
from llmconvert.quantize.solve.refine import refine
from llmconvert.quantize.tensor import QuantizedTensor

# Groups within a chunk of columns, of more than one, and of all of them.
NAMES = ["w4a16-g32", "w3a16-g32-asym", "w3a16-g160", "w2a16-g32", "w3a16-channel", "w4a16-channel-asym"]
COLUMNS = 320


def start(
    name: str, rows: int = 24, scale_dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, QuantizedTensor, torch.Tensor]:
    """A weight, its nearest codes, and a damped Hessian, in float64."""
    weight = random_weight(rows, COLUMNS, seed)
    tensor = Rtn().quantize([Target("layer", weight, Scheme.parse(name))], None, scale_dtype)["layer"].tensor
    hessian = hessian_of(random_inputs(800, COLUMNS, seed), torch.float64).matrix
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return weight.double(), tensor, hessian


def form(weight: torch.Tensor, tensor: QuantizedTensor, hessian: torch.Tensor) -> torch.Tensor:
    error = tensor.dequantize(torch.float64) - weight
    return ((error @ hessian) * error).sum(1)


def one_sweep(row: np.ndarray, tensor: QuantizedTensor, hessian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of the only row of ``tensor`` after a sweep, each step from the form itself."""
    scheme, groups = tensor.scheme, tensor.scale.shape[1]
    size = len(row) // groups
    codes, scale = tensor.codes[0].double().numpy().copy(), tensor.scale[0].double().numpy().copy()
    zero = np.zeros(groups) if tensor.zero is None else tensor.zero[0].double().numpy()
    for group in range(groups):
        columns = np.arange(group * size, (group + 1) * size)
        for column in columns:
            error = (codes - zero.repeat(size)) * scale.repeat(size) - row
            others = hessian[column] @ error - hessian[column, column] * error[column]
            value = row[column] - others / hessian[column, column]
            codes[column] = np.clip(np.rint(value / scale[group] + zero[group]), *scheme.number.limits)
        levels = np.zeros(len(row))
        levels[columns] = codes[columns] - zero[group]
        rest = (codes - zero.repeat(size)) * scale.repeat(size) - row - levels * scale[group]
        fitted = float(torch.tensor(-levels @ hessian @ rest / (levels @ hessian @ levels)).to(tensor.scale.dtype))
        if fitted > 0:
            scale[group] = fitted
    return codes, scale


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_is_coordinate_descent(name: str) -> None:
    weight, tensor, hessian = start(name)
    found, _ = refine(weight, tensor, hessian, 1)
    for row in range(len(weight)):
        codes, scale = one_sweep(weight[row].numpy(), tensor.rows(row, row + 1), hessian.numpy())
        assert np.array_equal(found.codes[row].numpy(), codes)
        np.testing.assert_allclose(found.scale[row].numpy(), scale, rtol=1e-6)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_every_row_comes_nearer_and_the_form_is_what_is_said(name: str, scale_dtype: torch.dtype) -> None:
    weight, tensor, hessian = start(name, scale_dtype=scale_dtype)
    before = form(weight, tensor, hessian)
    for sweeps in range(4):
        found, loss = refine(weight, tensor, hessian, sweeps)
        after = form(weight, found, hessian)
        torch.testing.assert_close(loss, after)
        assert (after <= before * (1 + 1e-9)).all()
        assert found.scale.dtype == scale_dtype
        assert found.zero is tensor.zero
        before = after
    assert after.sum() < 0.7 * form(weight, tensor, hessian).sum()


@pytest.mark.parametrize("name", ["w4a16-g32", "w3a16-g32-asym", "w3a16-channel"])
def test_many_sweeps_end_where_no_code_alone_could_be_better(name: str) -> None:
    weight, tensor, hessian = start(name, rows=4)
    found, _ = refine(weight, tensor, hessian, 60)
    least = form(weight, found, hessian)
    scheme = found.scheme
    for column in range(COLUMNS):
        for step in (-1, 1):
            codes = found.codes.clone()
            codes[:, column] = (codes[:, column] + step).clamp(*scheme.number.limits)
            other = QuantizedTensor(codes, found.scale, found.zero, scheme)
            assert (form(weight, other, hessian) >= least * (1 - 1e-9)).all()


@pytest.mark.parametrize("name", NAMES)
def test_kernel_and_plain_torch_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, tensor, hessian = start(name, rows=100)
    kernel, loss = refine(weight, tensor, hessian, 2)

    def plain(_: object, __: int, *arguments: Any) -> None:
        numbered: Any = (*arguments[:-6], tensor.scheme.number)
        refine_module._descend_plain(*numbered)

    monkeypatch.setattr(refine_module, "over_rows", plain)
    other, other_loss = refine(weight, tensor, hessian, 2)
    assert torch.equal(kernel.codes, other.codes) and torch.equal(kernel.scale, other.scale)
    torch.testing.assert_close(loss, other_loss)


def test_a_group_of_zeros_keeps_its_scale() -> None:
    weight, tensor, hessian = start("w4a16-g32", rows=3)
    weight[1, 32:64] = 0
    codes = tensor.codes.clone()
    codes[1, 32:64] = 0
    hessian[32:64, :32] = hessian[:32, 32:64] = hessian[64:, 32:64] = hessian[32:64, 64:] = 0
    found, loss = refine(weight, QuantizedTensor(codes, tensor.scale, None, tensor.scheme), hessian, 2)
    assert found.scale[1, 1] == tensor.scale[1, 1] and not found.codes[1, 32:64].any()
    assert torch.isfinite(loss).all()


@pytest.mark.parametrize("name", ["w3a16-g32", "w4a16-g32-asym", "w3a16-channel"])
def test_gptq_ends_with_less_error(name: str) -> None:
    """And says how much, also for linears of several schemes and columns without input."""
    inputs = random_inputs(800, COLUMNS)
    inputs[:, [3, 40]] = 0
    hessian = hessian_of(inputs, torch.float64)
    targets = [
        Target(f"l{i}", random_weight(24, COLUMNS, i), Scheme.parse(n))
        for i, n in enumerate((name, "w8a16-channel", name))
    ]
    errors = {}
    for sweeps in (0, 2):
        fresh = Hessian(hessian.matrix.float(), hessian.tokens)
        solutions = Gptq(sweeps=sweeps).quantize(targets, fresh, torch.bfloat16)
        for target in targets:
            output = inputs @ target.weight.double().T
            difference = output - inputs @ solutions[target.name].tensor.dequantize(torch.float64).T
            actual = float(difference.square().sum() / output.square().sum())
            assert solutions[target.name].error == pytest.approx(actual, rel=0.02)
            errors[sweeps, target.name] = actual
    for target in targets:
        assert errors[2, target.name] < 0.97 * errors[0, target.name]


@pytest.mark.parametrize("columns", [96, COLUMNS])
def test_the_hessian_comes_back_out_of_its_factor(columns: int) -> None:
    hessian = hessian_of(random_inputs(400, columns), torch.float64)
    prepared = Gptq(dtype=torch.float64).prepare("layer", Hessian(hessian.matrix.clone(), hessian.tokens))
    matrix, ridge = prepared.restore()
    expected = hessian.matrix + ridge.diag()
    torch.testing.assert_close(matrix, expected)
    own = min(1.5, 2 * columns / 400)
    diagonal = hessian.matrix.diagonal()
    torch.testing.assert_close(ridge, own * diagonal + 0.01 * (1 + own) * diagonal.mean())
