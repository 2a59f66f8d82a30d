"""Error feedback on the grids of GGML's types, and of MLX's: against the textbook, the gguf package and llama.cpp."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from support.ggml_reference import ggml_dequantize
from support.quantized import hessian_of, random_inputs, random_weight

from llmconvert.engine.statistics import Hessian
from llmconvert.errors import CheckpointError, SchemeError, UnsupportedError
from llmconvert.gguf.ggml.blocks import CODECS
from llmconvert.gguf.ggml.mix import FLOATS
from llmconvert.quantize.formats.gguf import Gguf
from llmconvert.quantize.methods.base import Quantizer, Target
from llmconvert.quantize.methods.gptq import Gptq
from llmconvert.quantize.methods.nearest import NearestCodes
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve.refine import refine
from llmconvert.quantize.tensor import QuantizedTensor, SuperBlockScales

TYPES = [name for name in CODECS if name not in FLOATS]
AFFINE = ["w3a16-g64-affine", "w8a16-g32-affine"]
ROWS, COLUMNS = 40, 512
EXACT = Gptq(dtype=torch.float64)

every_type = pytest.mark.parametrize("name", TYPES)


def problem(seed: int = 0) -> tuple[torch.Tensor, Hessian]:
    return random_weight(ROWS, COLUMNS, seed), hessian_of(random_inputs(1200, COLUMNS, seed), torch.float64)


def solved(method: Quantizer | NearestCodes, name: str, weight: torch.Tensor, hessian: Hessian) -> QuantizedTensor:
    fresh = Hessian(hessian.matrix.clone(), hessian.tokens)
    target = Target("layer", weight, Scheme.parse(name) if name in AFFINE else Scheme.of_block(name))
    return method.quantize([target], fresh, torch.float16)["layer"].tensor


def lost(weight: torch.Tensor, tensor: QuantizedTensor, hessian: Hessian) -> float:
    error = tensor.dequantize(torch.float64) - weight
    return float(((error @ hessian.matrix) * error).sum())


def textbook(
    weight: np.ndarray, hessian: np.ndarray, tokens: int, tensor: QuantizedTensor, levels: np.ndarray
) -> np.ndarray:
    """What every weight becomes by Frantar et al., algorithm 1, on the grids that the type's parameters leave.

    Args:
        levels: what the codes of the type stand for; each group's grid is these times its scale, plus its offset.
    """
    size = weight.shape[1] // tensor.scale.shape[1]
    scale = tensor.scale.double().numpy().repeat(size, 1)
    offset = np.zeros_like(scale) if tensor.offset is None else tensor.offset.double().numpy().repeat(size, 1)
    share = min(0.6, 2 * len(hessian) / (tokens + 2 * len(hessian)))
    hessian = (1 - share) * hessian + share * np.diag(np.diag(hessian))
    order = sorted(range(len(hessian)), key=lambda column: -hessian[column, column])
    matrix = hessian[np.ix_(order, order)] + 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(matrix)).T
    work, found = weight[:, order].copy(), np.empty(weight.shape)
    for column, place in enumerate(order):
        grid = scale[:, place, None] * levels + offset[:, place, None]
        nearest = np.abs(work[:, column, None] - grid).argmin(1)
        found[:, place] = np.take_along_axis(grid, nearest[:, None], 1)[:, 0]
        error = (work[:, column] - found[:, place]) / upper[column, column]
        work[:, column:] -= np.outer(error, upper[column, column:])
    return found


@pytest.mark.parametrize("name", [*TYPES, *AFFINE])
def test_codes_are_those_of_the_textbook(name: str) -> None:
    weight, hessian = problem()
    ours = solved(EXACT, name, weight.double(), hessian)
    low, high = ours.scheme.number.limits
    table = ours.scheme.number.table
    levels = np.arange(low, high + 1) if table is None else table.double().numpy()
    expected = textbook(weight.double().numpy(), hessian.matrix.numpy(), hessian.tokens, ours, levels)
    # float32 is what llama.cpp multiplies in; the textbook has float64.
    np.testing.assert_allclose(ours.dequantize(torch.float64).numpy(), expected, rtol=0, atol=1e-6)


@every_type
@pytest.mark.parametrize("sweeps", [0, 2])
def test_what_is_stored_decodes_to_the_solution_to_the_bit(name: str, sweeps: int) -> None:
    weight, hessian = problem()
    ours = solved(Gptq(sweeps=sweeps), name, weight, hessian)
    raw = Gguf().pack("layer", ours)["layer.weight"].numpy()
    expected = ours.dequantize(torch.float32).numpy()
    np.testing.assert_array_equal(dequantize(raw, GGMLQuantizationType[name]), expected)
    np.testing.assert_array_equal(ggml_dequantize(raw, name), expected)
    again = Gguf().unpack("layer", {"layer.weight": torch.from_numpy(raw)}, ours.scheme)
    assert torch.equal(again.codes, ours.codes) and torch.equal(again.dequantize(torch.float32), torch.tensor(expected))


@pytest.mark.parametrize("name", [*TYPES, AFFINE[0]])
def test_feedback_loses_less_than_an_importance_matrix_and_sweeps_less_than_that(name: str) -> None:
    weight, hessian = problem()
    methods = NearestCodes(), Gptq(shrinkage=0), Gptq(sweeps=2, shrinkage=0)
    nearest, once, swept = (lost(weight, solved(method, name, weight, hessian), hessian) for method in methods)
    assert swept < 0.99 * once < 0.6 * nearest


@pytest.mark.parametrize("name", ["Q2_K", "Q4_1", "Q6_K", "IQ4_XS", AFFINE[1]])
def test_a_sweep_changes_scales_within_what_the_type_can_store(name: str) -> None:
    weight, hessian = problem()
    before = solved(Gptq(), name, weight, hessian)
    after, loss = refine(weight.double(), before, hessian.matrix, 1)
    assert not torch.equal(before.scale, after.scale)
    torch.testing.assert_close(float(loss.sum()), lost(weight, after, hessian), rtol=1e-6, atol=0)
    if isinstance(before.nested, SuperBlockScales) and isinstance(after.nested, SuperBlockScales):
        low, high = after.nested.limits
        assert int(after.nested.subs.min()) >= low and int(after.nested.subs.max()) <= high
        assert torch.equal(after.nested.scale, before.nested.scale)
        assert torch.equal(after.scale, after.nested.steps)


@every_type
def test_zeros_stay_zeros(name: str) -> None:
    weight, hessian = problem()
    weight[3] = 0
    weight[:, 256:] = 0
    for sweeps in (0, 1):
        found = solved(Gptq(sweeps=sweeps), name, weight, hessian).dequantize(torch.float32)
        assert torch.isfinite(found).all() and not found[3].any()


def test_rows_are_cut_and_joined_with_their_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem()
    whole = solved(Gptq(), "Q4_K", weight, hessian)
    parts = QuantizedTensor.concatenate([whole.rows(0, 7), whole.rows(7, ROWS)])
    assert torch.equal(parts.dequantize(torch.float32), whole.dequantize(torch.float32))
    assert torch.equal(Gguf().pack("l", parts)["l.weight"], Gguf().pack("l", whole)["l.weight"])
    monkeypatch.setattr("llmconvert.quantize.methods.gptq._WEIGHTS_AT_ONCE", COLUMNS * 9)
    assert torch.equal(solved(Gptq(), "Q4_K", weight, hessian).codes, whole.codes)


def test_what_float16_scales_do_not_reach_is_refused() -> None:
    weight, hessian = problem()
    with pytest.raises(UnsupportedError, match=r"layer: scales of 100% of it .* too small"):
        solved(Gptq(), "Q4_0", weight * 1e-9, hessian)
    weight[2, 5] = torch.nan
    with pytest.raises(CheckpointError, match=r"'layer' has values that are not finite"):
        solved(Gptq(), "Q4_K", weight, hessian)


def test_a_type_of_floats_is_no_scheme() -> None:
    with pytest.raises(SchemeError, match=r"GGUF type BF16 stores floats"):
        Scheme.of_block("BF16")
