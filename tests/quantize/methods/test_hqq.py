"""HQQ: its threshold against the formula, and errors against a search over all scales."""

from __future__ import annotations

import pytest
import torch
from support.quantized import random_weight

from llmconvert.errors import CheckpointError
from llmconvert.quantize.methods.base import Target
from llmconvert.quantize.methods.hqq import Hqq
from llmconvert.quantize.methods.rtn import Rtn
from llmconvert.quantize.scheme import Scheme

NAMES = ["w4a16-g32", "w4a16-g32-asym", "w3a16-g16-asym", "w2a16-g32", "w8a16"]


def p_error(weight: torch.Tensor, found: torch.Tensor, norm: float = 0.7) -> float:
    return float((weight.double() - found.double()).abs().pow(norm).sum())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_it_minimizes_is_smaller_than_that_of_rounding(name: str, dtype: torch.dtype) -> None:
    target = Target("layer", random_weight(64, 96), Scheme.parse(name))
    ours, plain = (
        method.quantize([target], None, dtype)["layer"].tensor.dequantize(torch.float32) for method in (Hqq(), Rtn())
    )
    assert p_error(target.weight, ours) < (0.97 if name != "w8a16" else 1.0001) * p_error(target.weight, plain)


def test_outliers_do_not_spoil_a_lattice() -> None:
    """Weights on a lattice with a few outliers, of a size that the threshold sees: most others come back."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-7, 8, (32, 64), generator=generator).float()
    weight = codes.clone()
    weight[:, ::32] = torch.where(codes[:, ::32] > 0, 8.5, -8.5)
    target = Target("layer", weight, Scheme.parse("w4a16-g32-asym"))
    found = Hqq().quantize([target], None, torch.float32)["layer"].tensor.dequantize(torch.float32)
    plain = Rtn().quantize([target], None, torch.float32)["layer"].tensor.dequantize(torch.float32)
    assert p_error(weight, found) < 0.3 * p_error(weight, plain)


def test_the_threshold_is_the_papers() -> None:
    error = torch.tensor([-0.5, -0.01, 0.0, 0.001, 0.2])
    found = Hqq(norm=0.7)._shrink(error.clone(), 10.0)
    size = error.abs().double()
    expected = torch.sign(error) * torch.clamp(size - size.clamp_min(1e-8) ** -0.3 / 10, min=0)
    torch.testing.assert_close(found.double(), expected.double())


def test_slices_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target("layer", random_weight(50, 96), Scheme.parse("w4a16-g32-asym"))
    whole = Hqq().quantize([target], None, torch.float32)["layer"].tensor
    monkeypatch.setattr("llmconvert.quantize.methods.hqq._WEIGHTS_AT_ONCE", 7 * 96)
    sliced = Hqq().quantize([target], None, torch.float32)["layer"].tensor
    assert torch.equal(whole.codes, sliced.codes) and torch.equal(whole.scale, sliced.scale)


def test_damaged_weights_are_named() -> None:
    weight = random_weight(4, 32)
    weight[1, 3] = torch.nan
    with pytest.raises(CheckpointError, match=r"'a\.b' has values that are not finite"):
        Hqq().quantize([Target("a.b", weight, Scheme.parse("w4a16-g32"))], None, torch.float32)
