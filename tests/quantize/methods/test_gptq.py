"""GPTQ against the textbook: one column at a time, in float64, by way of the explicit inverse Hessian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from support.quantized import hessian_of, random_inputs, random_weight

from llmconvert.compute.rows import over_rows
from llmconvert.engine.statistics import Hessian
from llmconvert.errors import CalibrationError, CheckpointError
from llmconvert.quantize.methods import gptq as gptq_module
from llmconvert.quantize.methods.base import Solution, Target
from llmconvert.quantize.methods.gptq import Gptq
from llmconvert.quantize.numbers import Int, Number
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve.kernels import descend_columns, load_kernels, solve_columns, transpose_in_order
from llmconvert.quantize.solve.scales import search_scales
from llmconvert.quantize.solve.search_kernels import best_candidates, weighted_squares
from llmconvert.quantize.tensor import QuantizedTensor

NAMES = ["w4a16-g32", "w4a16-g32-asym", "w4a16-channel", "w3a16-g64-asym", "w2a16-g32", "w8a16-channel-asym"]
EXACT = Gptq(dtype=torch.float64, sweeps=0)
COLUMNS = 320  # more than a block of the solver and more than a panel of the factorization, a multiple of neither


FLOATS = ["nvfp4a16", "mxfp4a16", "mxfp8a16", "w8a16-fp8", "w8a16-g128x128-fp8", "w8a16-tensor-fp8"]


def shrunk(matrix: np.ndarray, tokens: int, strength: float) -> np.ndarray:
    """``(n H + κ D) / (n + κ)`` with κ by the columns, and at most 0.6 of the diagonal."""
    share = min(0.6, strength * len(matrix) / (tokens + strength * len(matrix)))
    mixed: np.ndarray = (1 - share) * matrix + share * np.diag(np.diag(matrix))
    return mixed


def textbook(
    weight: np.ndarray, moments: Hessian, tensor: QuantizedTensor, damping: float = 0.01, strength: float = 2.0
) -> np.ndarray:
    """Codes by Frantar et al., algorithm 1 with blocks of one column, in order of falling diagonal.

    Scale and zero point of every group are taken from ``tensor`` (static groups). Of floats the values, not codes.
    """
    hessian = shrunk(moments.matrix.double().numpy(), moments.tokens, strength)
    scheme, (rows, columns) = tensor.scheme, weight.shape
    size = scheme.columns_per_group(columns)
    divisor = 1.0 if tensor.divisor is None else float(tensor.divisor)
    scale = (tensor.scale.double().numpy() / divisor).repeat(size, axis=1)[:, :columns]
    scale = scale.repeat(scheme.rows or rows, axis=0)[:rows]
    zero = np.zeros_like(scale) if tensor.zero is None else tensor.zero.double().numpy().repeat(size, axis=1)
    diagonal = np.diag(hessian)
    order = sorted(range(len(hessian)), key=lambda column: -diagonal[column])
    matrix = hessian[np.ix_(order, order)].copy()
    dead = np.diag(matrix) == 0
    matrix[dead, dead] = 1
    matrix += damping * np.diag(matrix).mean() * np.eye(len(matrix))
    upper = np.linalg.cholesky(np.linalg.inv(matrix)).T
    work = weight[:, order].copy()
    codes = np.zeros(weight.shape, dtype=np.int8 if scheme.number.even else np.float64)
    for column, place in enumerate(order):
        step, origin = scale[:, place], zero[:, place]
        code = rounded(work[:, column] / step, scheme.number, origin)
        error = (work[:, column] - (code - origin) * step) / upper[column, column]
        work[:, column:] -= np.outer(error, upper[column, column:])
        codes[:, place] = code
    return codes


def rounded(values: np.ndarray, number: Number, origin: np.ndarray) -> np.ndarray:
    """By numpy, or as compressed-tensors and torch round to floats."""
    if number.even:
        return np.clip(np.rint(values) + origin, *number.limits)
    single = torch.from_numpy(values).float()
    if number.bits == 4:
        return cast_to_fp4(single).double().numpy()
    return single.clamp(-448, 448).to(torch.float8_e4m3fn).double().numpy()


def quantized(
    method: Gptq, weight: torch.Tensor, hessian: Hessian, name: str, scale_dtype: torch.dtype = torch.float32
) -> Solution:
    fresh = Hessian(hessian.matrix.clone(), hessian.tokens)
    return method.quantize([Target("layer", weight, Scheme.parse(name))], fresh, scale_dtype)["layer"]


def agreement(ours: QuantizedTensor, codes: np.ndarray) -> float:
    number = ours.scheme.number
    found = ours.codes.numpy() if number.even else number.values(ours.codes).double().numpy()
    return float((found == codes).mean())


@pytest.mark.parametrize("name", [*NAMES, *FLOATS])
def test_codes_are_those_of_the_textbook(name: str) -> None:
    weight = random_weight(96, COLUMNS).double()
    hessian = hessian_of(random_inputs(800, COLUMNS), torch.float64)
    exact = quantized(EXACT, weight, hessian, name).tensor
    expected = textbook(weight.numpy(), hessian, exact)
    assert agreement(exact, expected) == 1.0


@pytest.mark.parametrize(("tokens", "strength"), [(800, 0.0), (9600, 2.0), (800, 0.5), (100, 2.0)])
def test_moments_of_few_tokens_are_shrunk_toward_their_diagonal(tokens: int, strength: float) -> None:
    weight = random_weight(96, COLUMNS).double()
    hessian = hessian_of(random_inputs(tokens, COLUMNS), torch.float64)
    ours = quantized(replace(EXACT, shrinkage=strength), weight, hessian, "w3a16-g32")
    assert agreement(ours.tensor, textbook(weight.numpy(), hessian, ours.tensor, strength=strength)) == 1.0
    plain = quantized(replace(EXACT, shrinkage=0.1), weight, hessian, "w3a16-g32")
    assert not torch.equal(ours.tensor.codes, plain.tensor.codes)
    error = ours.tensor.dequantize(torch.float64) - weight
    lost, energy = (float(((part @ hessian.matrix) * part).sum()) for part in (error, weight))
    assert ours.error == pytest.approx(lost / energy, rel=1e-6), "errors are of the inputs that came"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_float32_gives_nearly_the_same_codes(name: str, seed: int) -> None:
    weight = random_weight(96, COLUMNS, seed)
    hessian = hessian_of(random_inputs(800, COLUMNS, seed))
    ours = quantized(Gptq(sweeps=0), weight, hessian, name).tensor
    expected = textbook(weight.double().numpy(), hessian, ours)
    assert agreement(ours, expected) >= 0.999


@pytest.mark.parametrize("block", [1, 4, 50, 64, 128, 1000])
@pytest.mark.parametrize("rows", [1, 63, 65, 130])
def test_the_size_of_blocks_and_the_number_of_rows_change_nothing(block: int, rows: int) -> None:
    weight = random_weight(rows, 130).double()
    hessian = hessian_of(random_inputs(300, 130), torch.float64)
    ours = quantized(Gptq(dtype=torch.float64, block=block, sweeps=0), weight, hessian, "w3a16-channel-asym").tensor
    assert agreement(ours, textbook(weight.numpy(), hessian, ours)) == 1.0


def test_columns_without_input_are_rounded_and_spread_nothing() -> None:
    inputs = random_inputs(400, 128)
    dead = [0, 5, 64, 127]
    inputs[:, dead] = 0
    weight = random_weight(40, 128).double()
    hessian = hessian_of(inputs, torch.float64)
    ours = quantized(EXACT, weight, hessian, "w4a16-g32").tensor
    assert agreement(ours, textbook(weight.numpy(), hessian, ours)) == 1.0
    nearest = torch.round(weight / ours.scale.double().repeat_interleave(32, 1)).clamp(-8, 7)
    assert torch.equal(ours.codes[:, dead].double(), nearest[:, dead])


def test_inputs_that_are_all_zero_give_rounding_to_nearest() -> None:
    weight = random_weight(8, 64)
    solution = quantized(Gptq(sweeps=0), weight, Hessian(torch.zeros(64, 64), 10), "w4a16-g32")
    nearest = torch.round(weight / solution.tensor.scale.repeat_interleave(32, 1)).clamp(-8, 7)
    assert torch.equal(solution.tensor.codes.float(), nearest)
    assert solution.error == 0


def with_eigenvalue(columns: int, smallest: float) -> Hessian:
    """A Hessian of mean diagonal one with one eigenvalue of the given size."""
    matrix = hessian_of(random_inputs(3 * columns, columns), torch.float64).matrix
    matrix /= matrix.diagonal().mean()
    values, vectors = torch.linalg.eigh(matrix)
    values[0] = smallest
    matrix = vectors @ values.diag() @ vectors.T
    return Hessian((matrix + matrix.T) / 2, 3 * columns)


@pytest.mark.parametrize(("smallest", "damping"), [(0.0, 0.01), (-0.005, 0.01), (-0.05, 0.1), (-0.5, 1.0)])
@pytest.mark.parametrize("columns", [96, COLUMNS])
def test_damping_grows_until_the_hessian_factorizes(columns: int, smallest: float, damping: float) -> None:
    hessian = with_eigenvalue(columns, smallest)
    weight = random_weight(24, columns).double()
    solution = quantized(EXACT, weight, hessian, "w4a16-g32")
    assert solution.damping == pytest.approx(damping)
    expected = textbook(weight.numpy(), hessian, solution.tensor, damping)
    assert agreement(solution.tensor, expected) == 1.0


def test_fewer_tokens_than_columns_are_no_obstacle() -> None:
    weight = random_weight(24, COLUMNS)
    solution = quantized(Gptq(), weight, hessian_of(random_inputs(40, COLUMNS)), "w4a16-g32")
    assert solution.damping == 0.01
    assert solution.error is not None and 0 <= solution.error < 0.1


def test_a_hessian_that_no_damping_helps_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"layer: the Hessian .*\(288 tokens, 96 columns\) cannot be factorized"):
        quantized(Gptq(), random_weight(8, 96), with_eigenvalue(96, -3.0), "w4a16-g32")


@pytest.mark.parametrize("name", ["w4a16-g32", "w3a16-channel-asym"])
def test_stacked_linears_get_what_they_get_alone(name: str) -> None:
    hessian = hessian_of(random_inputs(400, 128), torch.float64)
    scheme = Scheme.parse(name)
    targets = [Target(f"l{i}", random_weight(rows, 128, i).double(), scheme) for i, rows in enumerate((40, 8, 100))]
    together = EXACT.quantize(targets, Hessian(hessian.matrix.clone(), hessian.tokens), torch.float32)
    assert list(together) == ["l0", "l1", "l2"]
    for target in targets:
        alone = quantized(EXACT, target.weight, hessian, name)
        found = together[target.name]
        assert torch.equal(found.tensor.codes, alone.tensor.codes)
        assert torch.equal(found.tensor.scale, alone.tensor.scale)
        assert found.error == pytest.approx(alone.error, rel=1e-9)


def test_linears_of_different_schemes_share_a_factorization(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    factorize: Callable[[torch.Tensor], bool] = gptq_module.lower_factor_

    def counted(matrix: torch.Tensor) -> bool:
        calls.append(len(matrix))
        return factorize(matrix)

    monkeypatch.setattr(gptq_module, "lower_factor_", counted)
    hessian = hessian_of(random_inputs(400, 128), torch.float64)
    names = ["w4a16-g32", "w8a16-channel", "w4a16-g32"]
    targets = [Target(f"l{i}", random_weight(16, 128, i).double(), Scheme.parse(name)) for i, name in enumerate(names)]
    together = EXACT.quantize(targets, Hessian(hessian.matrix.clone(), hessian.tokens), torch.float32)
    assert calls == [128]
    for target, name in zip(targets, names, strict=True):
        alone = quantized(EXACT, target.weight, hessian, name).tensor
        assert together[target.name].tensor.scheme == Scheme.parse(name)
        assert torch.equal(together[target.name].tensor.codes, alone.codes)


def test_slices_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(100, 128).double()
    hessian = hessian_of(random_inputs(400, 128), torch.float64)
    whole = quantized(EXACT, weight, hessian, "w4a16-g32-asym")
    monkeypatch.setattr(gptq_module, "_WEIGHTS_AT_ONCE", 128 * 17)
    sliced = quantized(EXACT, weight, hessian, "w4a16-g32-asym")
    assert torch.equal(whole.tensor.codes, sliced.tensor.codes)
    assert torch.equal(whole.tensor.scale, sliced.tensor.scale)
    assert whole.tensor.zero is not None and sliced.tensor.zero is not None
    assert torch.equal(whole.tensor.zero, sliced.tensor.zero)
    assert whole.error == pytest.approx(sliced.error, rel=1e-9)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_the_relative_error_of_the_output(name: str, scale_dtype: torch.dtype) -> None:
    weight, inputs = random_weight(96, COLUMNS), random_inputs(2000, COLUMNS)
    solution = quantized(Gptq(), weight, hessian_of(inputs), name, scale_dtype)
    output = inputs @ weight.double().T
    difference = output - inputs @ solution.tensor.dequantize(torch.float64).T
    actual = float(difference.square().sum() / output.square().sum())
    assert solution.error == pytest.approx(actual, rel=0.02)


def test_gptq_beats_rounding_to_nearest() -> None:
    weight, inputs = random_weight(96, COLUMNS).double(), random_inputs(2000, COLUMNS)
    hessian = hessian_of(inputs, torch.float64)
    scheme = Scheme(Int(3), 32)
    ours = quantized(EXACT, weight, hessian, str(scheme)).tensor.dequantize(torch.float64)
    scales = search_scales("w", weight, hessian.matrix.diagonal(), scheme, torch.float32)
    scale = scales.scale.double().repeat_interleave(32, 1)
    nearest = torch.round(weight / scale).clamp(-4, 3) * scale
    errors = [((weight - other) @ inputs.T).square().sum() for other in (ours, nearest)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*NAMES, "nvfp4a16", "w8a16-g128x128-fp8"])
def test_kernel_and_plain_torch_agree(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(96, COLUMNS).to(dtype)
    hessian = hessian_of(random_inputs(800, COLUMNS), dtype)
    method = Gptq(dtype=dtype, sweeps=0)
    kernel = quantized(method, weight, hessian, name)

    def plain(work: torch.Tensor, *arguments: Any) -> None:
        *tensors, scheme = arguments
        numbered: Any = (*tensors, scheme.number)
        gptq_module._solve_block_plain(work, *numbered)

    monkeypatch.setattr(gptq_module, "_solve_block", plain)
    other = quantized(method, weight, hessian, name)
    same = (kernel.tensor.codes == other.tensor.codes).double().mean()
    assert same == 1 if dtype == torch.float64 else same >= 0.999
    assert kernel.error == pytest.approx(other.error, rel=1e-3)


def test_threads_change_nothing() -> None:
    """Rows are independent: however many threads share them, every row is computed the same way."""
    weight, columns = random_weight(333, 128), 128
    hessian = hessian_of(random_inputs(400, columns))
    prepared = Gptq().prepare("layer", hessian)
    work = weight.T.contiguous().index_select(0, prepared.order)
    scales = search_scales("w", weight, prepared.diagonal, Scheme(Int(4), 32), torch.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            codes, errors = torch.empty((columns, 333), dtype=torch.int8), work.clone()
            loss = torch.zeros(333)
            scale = scales.scale.T.contiguous()
            zero, carried = torch.zeros_like(scale), torch.zeros_like(errors)
            arguments = errors, carried, scale, zero, codes, loss, prepared.order, prepared.added, prepared.factor
            over_rows(solve_columns, 333, *arguments, 0, -8.0, 7.0, loss[:0], 0, 0, 0)
            results.append((codes, errors, loss))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


def test_weights_are_left_as_they_were() -> None:
    weight = random_weight(16, 64)
    before = weight.clone()
    quantized(Gptq(), weight, hessian_of(random_inputs(100, 64)), "w4a16-g32")
    assert torch.equal(weight, before)


def test_a_weight_that_is_not_finite_is_named() -> None:
    weight = random_weight(16, 64)
    weight[3, 3] = torch.inf
    with pytest.raises(CheckpointError, match="'layer' has values that are not finite"):
        quantized(Gptq(), weight, hessian_of(random_inputs(100, 64)), "w4a16-g32")


def test_kernels_are_loaded_beforehand() -> None:
    """What :func:`load_kernels` loads is what solving in float32 calls: no linear waits for a compiler."""
    kernels = (best_candidates, descend_columns, solve_columns, transpose_in_order, weighted_squares)
    load_kernels()
    before = [len(kernel.signatures) for kernel in kernels]
    for name in ("w4a16-g32", "w4a16-channel-asym"):
        quantized(Gptq(), random_weight(80, 64), hessian_of(random_inputs(100, 64)), name, torch.bfloat16)
    assert [len(kernel.signatures) for kernel in kernels] == before
