"""The canonical quantized weight."""

from __future__ import annotations

import pytest
import torch
from support.quantized import random_tensor

from llmconvert.quantize.numbers import Int
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor


@pytest.mark.parametrize("name", ["w4a16-g16", "w4a16-g16-asym", "w8a16-channel", "w3a16-channel-asym"])
def test_weights_are_scale_times_code_minus_zero(name: str) -> None:
    tensor = random_tensor(Scheme.parse(name), 10, 48)
    dense = tensor.dequantize(torch.float32)
    size = tensor.scheme.columns_per_group(48)
    for row, column in ((0, 0), (3, 17), (9, 47)):
        group = column // size
        zero = 0 if tensor.zero is None else int(tensor.zero[row, group])
        expected = (int(tensor.codes[row, column]) - zero) * float(tensor.scale[row, group])
        assert float(dense[row, column]) == pytest.approx(expected, rel=1e-6)


def test_rounding_to_the_target_happens_once() -> None:
    tensor = random_tensor(Scheme(Int(8, symmetric=False), 16), 32, 64, torch.bfloat16)
    assert torch.equal(tensor.dequantize(torch.bfloat16), tensor.dequantize(torch.float64).to(torch.bfloat16))


@pytest.mark.parametrize("name", ["w4a16-g16", "w4a16-g16-asym"])
def test_rows_and_concatenation_are_inverse(name: str) -> None:
    tensor = random_tensor(Scheme.parse(name), 10, 48)
    parts = [tensor.rows(0, 3), tensor.rows(3, 4), tensor.rows(4, 10)]
    whole = QuantizedTensor.concatenate(parts)
    assert [part.shape for part in parts] == [(3, 48), (1, 48), (6, 48)]
    assert torch.equal(whole.codes, tensor.codes) and torch.equal(whole.scale, tensor.scale)
    if tensor.zero is None:
        assert whole.zero is None
    else:
        assert whole.zero is not None and torch.equal(whole.zero, tensor.zero)
    assert QuantizedTensor.concatenate([tensor]) is tensor


def test_parts_that_do_not_belong_together_are_refused() -> None:
    codes, scale = torch.zeros((4, 32), dtype=torch.int8), torch.ones((4, 2))
    zero = torch.zeros((4, 2), dtype=torch.int8)
    QuantizedTensor(codes, scale, None, Scheme(Int(4), 16))
    QuantizedTensor(codes, scale, zero, Scheme(Int(4, symmetric=False), 16))
    with pytest.raises(ValueError, match=r"codes must be int8, found torch\.int32"):
        QuantizedTensor(codes.int(), scale, None, Scheme(Int(4), 16))
    with pytest.raises(ValueError, match=r"scale must have shape \(4, 1\), found \(4, 2\)"):
        QuantizedTensor(codes, scale, None, Scheme(Int(4)))
    with pytest.raises(ValueError, match="has no zero point"):
        QuantizedTensor(codes, scale, zero, Scheme(Int(4), 16))
    with pytest.raises(ValueError, match="needs a zero point"):
        QuantizedTensor(codes, scale, None, Scheme(Int(4, symmetric=False), 16))
    with pytest.raises(ValueError, match="zero must be int8"):
        QuantizedTensor(codes, scale, zero.int(), Scheme(Int(4, symmetric=False), 16))
